"""Choose what runs a bundle on this machine."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import MetaEmbedError
from .manifest import Bundle
from .session import Session


def open_sessions(bundle: Bundle, graphs: Iterable[str], *, threads: int = 0) -> list[Session]:
    """A session for each graph: ONNX Runtime on this machine's CPU."""
    try:
        from .session_ort import OrtSession
    except ImportError:
        raise MetaEmbedError("onnxruntime is not installed here; pip install 'metaembed-export[runtime]'") from None
    return [OrtSession(bundle.path(graph), threads=threads) for graph in graphs]
