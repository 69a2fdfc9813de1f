"""The torch-free runtime: bundles, encoding, scoring, search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "metaembed.runtime":
    raise ImportError(f"import metaembed.runtime, not {__name__!r}: a second copy of every module would follow")

if TYPE_CHECKING:
    from .budget import Budget
    from .encoder import Encoder
    from .maxsim import maxsim

__all__ = ["Budget", "Encoder", "maxsim"]

_PLACES = {"Budget": "budget", "Encoder": "encoder", "maxsim": "maxsim"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562): ``metaembed-export --help`` should not wait for numpy."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
