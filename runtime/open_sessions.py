"""Choose what runs a bundle on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import MetaEmbedError
from .manifest import Bundle, cpu_graph
from .session import Session
from .session_trt import open_trt_sessions

# Above this, the float32 copies that ONNX Runtime would fold from narrow weights are worth avoiding.
LEAN_BYTES = 1 << 30


def open_sessions(bundle: Bundle, graphs: Sequence[str], *, threads: int = 0) -> list[Session]:
    """A session for each graph: the bundle's TensorRT engines for this GPU if there are any, else ONNX Runtime.

    Raises:
        BundleError: the bundle has engines for this GPU's kind that may not be loaded here.
        MetaEmbedError: neither TensorRT nor ONNX Runtime can be used.
    """
    return open_trt_sessions(bundle, graphs) or open_ort_sessions(bundle, graphs, threads=threads)


def open_ort_sessions(bundle: Bundle, graphs: Sequence[str], *, threads: int = 0) -> list[Session]:
    """ONNX Runtime on this machine's CPU, on the float32 twin of a narrow graph."""
    try:
        from .session_ort import OrtSession
    except ImportError:
        raise MetaEmbedError("onnxruntime is not installed here; pip install 'metaembed-export[runtime]'") from None
    files = bundle.manifest.files
    # Not from the manifest, which an export that is judging its new bundle has not completed yet.
    weights = sum(path.stat().st_size for path in (bundle.folder / "weights").glob("*"))
    chosen = [cpu_graph(graph) if cpu_graph(graph) in files else graph for graph in graphs]
    quantised = bundle.manifest.quantization is not None
    lean = weights > LEAN_BYTES and not quantised  # codes are not widened, and their transposes are worth folding
    return [OrtSession(bundle.path(graph), threads=threads, lean=lean, quantised=quantised) for graph in chosen]
