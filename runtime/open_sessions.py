"""Choose what runs a bundle on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .cuda import find_gpu
from .errors import BundleError, MetaEmbedError, UsageError, describe_unusable
from .manifest import LANGUAGE, SCORER, VISION, Bundle, cpu_graph
from .memory import GIB, available_memory
from .providers import CPU, CUDA, TENSORRT, Attempt, plan_attempts, provider_options
from .session import DeviceSession, Session
from .session_trt import open_trt_sessions
from .user_cache import user_cache
from .weights import copied_bytes, count_values

if TYPE_CHECKING:
    from .session_ort import OrtSession

log = logging.getLogger(__name__)

# ONNX Runtime widens narrow weights to float32 once and packs what products read: two copies. Where those do not fit, weights
# stay mapped and are widened at each use.
COPIES = 2


def open_sessions(
    bundle: Bundle, graphs: Sequence[str], *, threads: int = 0, cuda_graphs: bool = False
) -> list[Session]:
    """A session for each graph: the bundle's TensorRT engines for this GPU if there are any, else ONNX Runtime.

    ``cuda_graphs``: what is launched in shapes that repeat is recorded and replayed, by engines and, in ONNX Runtime, by the
    language graph.

    Raises:
        BundleError: the bundle has engines for this GPU's kind that may not be loaded here.
        UsageError: CUDA graphs are asked for where nothing runs on an NVIDIA GPU.
        MetaEmbedError: neither TensorRT nor ONNX Runtime can be used, or a quantised bundle cannot fit into memory.
    """
    sessions = open_trt_sessions(bundle, graphs, cuda_graphs=cuda_graphs) or open_ort_sessions(
        bundle, graphs, threads=threads, cuda_graphs=cuda_graphs
    )
    if cuda_graphs and not all(isinstance(session, DeviceSession) for session in sessions):
        found = sessions[-1].description
        for session in sessions:
            session.close()
        raise UsageError(f"CUDA graphs record what runs on an NVIDIA GPU; here it is {found}")
    return sessions


def open_ort_sessions(
    bundle: Bundle,
    graphs: Sequence[str],
    *,
    threads: int = 0,
    available: Sequence[str] | None = None,
    cuda_graphs: bool = False,
) -> list[Session]:
    """ONNX Runtime: on an NVIDIA GPU where its build has a provider that really opens, else on the CPU.

    All graphs run in the same way, since one reads what another gives. On the CPU that is the float32 twin of a narrow
    graph. ``available`` names the providers to choose from; by default those of this build.
    """
    try:
        from .session_ort import available_providers, load_cuda
    except ImportError as error:
        raise MetaEmbedError(
            "no engine of this bundle runs here (it has none, or no GPU is found), and onnxruntime "
            f"{describe_unusable(error)}"
        ) from error
    names = available_providers() if available is None else available
    *hopeful, last = plan_attempts(names, bundle.manifest.precision, graphs)
    if hopeful:
        load_cuda()
    for attempt in hopeful:
        sessions = _try(bundle, graphs, attempt, threads, cuda_graphs)
        if sessions is not None:
            return sessions
    return list(_open(bundle, graphs, last, threads))


def _try(
    bundle: Bundle, graphs: Sequence[str], attempt: Attempt, threads: int, cuda_graphs: bool
) -> list[Session] | None:
    """The sessions, when they got what was asked for; otherwise one sentence in the log."""
    try:
        sessions = _open(bundle, graphs, attempt, threads, cuda_graphs)
    except BundleError as error:
        log.warning("%s cannot run this bundle here (%s)", attempt.providers[0], error)
        return None
    found = [session.description for session in sessions if not attempt.got(session.providers[0])]
    if not found:
        return list(sessions)
    log.warning("asked for %s and got %s; trying the next", attempt.providers[0], found[0])
    for session in sessions:
        session.close()
    return None


def _open(
    bundle: Bundle, graphs: Sequence[str], attempt: Attempt, threads: int, cuda_graphs: bool = False
) -> Sequence[OrtSession]:
    from .session_ort import OrtSession
    from .session_ort_gpu import OrtGpuSession

    manifest = bundle.manifest
    files = manifest.files
    on_cpu = attempt.providers == (CPU,)
    quantised = manifest.quantization is not None
    if on_cpu and quantised and set(graphs) != {SCORER}:
        _require_memory(bundle)
    # A quantised bundle is loaded as it is: codes stay one byte each, packed as products read them.
    lean = on_cpu and not quantised and not _fits(4 * count_values(bundle.folder / "weights"))
    if TENSORRT in attempt.providers:  # has no option for it, and builds with TensorFloat-32 unless this says no
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    cache = user_cache("onnxruntime", manifest.fingerprint[:16]) if TENSORRT in attempt.providers else None
    gpu = None if on_cpu else find_gpu()  # None too where a build of ONNX Runtime names providers and no GPU is here
    # Of the vision graph, launches are a small part, and recording it held 8 GiB more (3B, 1,024 image tokens, H200).
    recorded = {LANGUAGE} if cuda_graphs and attempt.providers[0] == CUDA else set()
    return [
        (
            OrtSession
            if gpu is None
            else partial(OrtGpuSession, gpu=gpu, keep_on_device=graph == VISION, cuda_graphs=graph in recorded)
        )(
            bundle.path(_runnable(graph, files, attempt)),
            providers={
                name: provider_options(name, manifest, graph, cache, cuda_graphs=graph in recorded)
                for name in attempt.providers
            },
            threads=threads,
            lean=lean,
            quantised=quantised,
            max_items=attempt.max_items,
        )
        for graph in graphs
    ]


def _fits(float32_bytes: int) -> bool:
    """Whether weights of so many bytes in float32 may be copied: widened, and then packed as the products want them."""
    available = available_memory()
    return available is None or COPIES * float32_bytes <= available


def _require_memory(bundle: Bundle) -> None:
    """Refuse a quantised bundle that cannot fit, before the kernel ends the process: its weights cannot stay on disk."""
    least, free = copied_bytes(bundle.folder / "weights"), available_memory(swap=True)
    if free is not None and least > free:
        raise MetaEmbedError(
            f"{bundle.folder} takes at least {least / GIB:.1f} GiB of memory on a CPU, and {free / GIB:.1f} GiB is free; close "
            "other programs, or use the bundle that it was quantised from, whose weights may stay on disk"
        )


def _runnable(graph: str, files: Container[str], attempt: Attempt) -> str:
    return graph if attempt.as_they_are or cpu_graph(graph) not in files else cpu_graph(graph)
