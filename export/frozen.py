"""A language graph frozen at one side and budget: for a device that serves nothing else.

Its Meta Token ids and answer rows are constants: the inputs are a prompt's, and ``rows`` is gone. The weights are those
of ``language.onnx``, which it lies beside.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from metaembed.runtime.frozen import frozen_meta_tokens
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.layout import NOT_IMAGE
from metaembed.runtime.manifest import DEFAULT_OPSET

from .encoder import LanguageEncoder, text_constants
from .trace import DTYPES, Arguments, repeat_decoder, trace_module


class FrozenLanguageEncoder(LanguageEncoder):
    """Prompts -> L2-normalised float32 embeddings [b, r, d] of one side and budget.

    token_ids and image_rows (b, p) end with the prompt and its padding; positions (b, 3, t) and mask (b, t) go on over
    the Meta Tokens, t = p + their number.
    """

    def __init__(self, geometry: Geometry, side: str, vectors: int) -> None:
        super().__init__(geometry)
        self.appended, self.answers = frozen_meta_tokens(geometry, side, vectors).tolist(), vectors

    def forward(
        self, token_ids: Tensor, image_rows: Tensor, image_embeddings: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        count = len(self.appended)
        meta, no_image = torch.arange(count) + self.appended[0], torch.full((count,), NOT_IMAGE)
        token_ids, image_rows = (
            torch.cat([given, added.expand(given.shape[0], -1)], dim=1)
            for given, added in ((token_ids, meta), (image_rows, no_image))
        )
        rows = torch.arange(self.answers) + (mask.shape[1] - self.answers)
        return super().forward(token_ids, image_rows, image_embeddings, positions, mask, rows)


def trace_frozen(
    geometry: Geometry, side: str, vectors: int, precision: str = "fp32", opset: int = DEFAULT_OPSET
) -> ir.Model:
    """The frozen graph, optimised; weights carry names and shapes but no values."""
    dtype, added = DTYPES[precision], len(frozen_meta_tokens(geometry, side, vectors))
    arguments: Arguments = {
        "token_ids": (("b", "p"), torch.int64),
        "image_rows": (("b", "p"), torch.int64),
        "image_embeddings": (("i", "m", geometry.text.hidden), dtype),
        "positions": (("b", 3, "t"), torch.int64),
        "mask": (("b", "t"), torch.bool),
    }
    constants = text_constants(geometry.text)
    return repeat_decoder(
        geometry,
        lambda shallow: trace_module(
            lambda: FrozenLanguageEncoder(shallow, side, vectors),
            arguments,
            "embeddings",
            constants,
            dtype,
            opset,
            added,
        ),
    )
