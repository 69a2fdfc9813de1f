"""The torch-free runtime: bundles, encoding, scoring, search."""

if __name__ != "metaembed.runtime":
    raise ImportError(f"import metaembed.runtime, not {__name__!r}: a second copy of every module would follow")

from .budget import Budget
from .cascade import Stage
from .encoder import Encoder
from .index import Index
from .index_layout import Layout
from .maxsim import maxsim

__all__ = ["Budget", "Encoder", "Index", "Layout", "Stage", "maxsim"]
