"""What a model costs, by arithmetic alone: floating-point operations, weight, activation and index bytes.

Counts follow the exported graphs. A multiply-accumulate is two operations; norms, softmax and other elementwise work,
below one in a hundred, are left out. Shapes in the formulas: t positions, p patches, m image tokens, n candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .budget import Budget
from .geometry import Geometry, TextGeometry, VisionGeometry
from .tensors import TOKEN_TABLE, expected_tensors

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
INDEX_TYPE = "bf16"
PATCHES_PER_TOKEN = 4  # a 2 x 2 merge


@dataclass(frozen=True)
class EncoderFlops:
    """Operations for one item, per graph."""

    vision: int
    language: int

    @property
    def total(self) -> int:
        return self.vision + self.language


def encoder_flops(
    geometry: Geometry, *, text_tokens: int, image_tokens: int, meta_tokens: int, answers: int
) -> EncoderFlops:
    """Operations to encode one item without padding.

    Args:
        text_tokens: every prompt position that is no image token, template included.
        image_tokens: merged 2x2 patches, 0 without an image.
        meta_tokens: Meta Token rows appended: r_q for a query, all query rows + r_c for a candidate.
        answers: vectors read off, r_q or r_c.
    """
    positions = text_tokens + image_tokens + meta_tokens
    return EncoderFlops(
        vision_flops(geometry.vision, image_tokens * PATCHES_PER_TOKEN) if image_tokens else 0,
        language_flops(geometry.text, positions, answers)
        + 2 * answers * geometry.text.hidden * (geometry.projection or 0),
    )


def vision_flops(vision: VisionGeometry, patches: int) -> int:
    """Operations of the vision tower for one image of ``patches``, padding counted as patches.

    Per block: 2 p (4 h^2 + 3 h i) for the Linears and 4 p k h for attention over k keys, k = 64 in a window and p in
    the blocks of full attention. Around them: 2 p 1176 h to embed patches, 2 m ((4h)^2 + 4 h D) to merge them.
    """
    h, merged = vision.hidden, vision.hidden * PATCHES_PER_TOKEN
    full = len(vision.full_attention_blocks)
    keys = full * patches + (vision.depth - full) * min(patches, vision.window_patches)
    linears = vision.depth * 2 * patches * (4 * h * h + 3 * h * vision.intermediate)
    merger = 2 * (patches // PATCHES_PER_TOKEN) * (merged * merged + merged * vision.out_hidden)
    return 2 * patches * vision.patch_values * h + linears + 4 * patches * keys * h + merger


def language_flops(text: TextGeometry, positions: int, answers: int) -> int:
    """Operations of the decoder for ``positions`` with ``answers`` rows read off.

    Per layer: 2 t (2 h^2 + 2 h kv + 3 h i) for the Linears and 4 t^2 h for attention over all t x t pairs (a kernel
    that skips masked pairs does up to half of that). In the last layer only keys and values are needed everywhere;
    queries, output and MLP are computed for the answer rows alone.
    """
    h, kv = text.hidden, text.kv_heads * text.head_dim
    rest, keys_values = 2 * h * h + 3 * h * text.intermediate, 2 * h * kv
    layer = 2 * positions * (rest + keys_values) + 4 * positions * positions * h
    last = 2 * answers * rest + 2 * positions * keys_values + 4 * answers * positions * h
    return (text.layers - 1) * layer + last


def scoring_flops(geometry: Geometry, budget: Budget, candidates: int) -> int:
    """Operations to score one query against every candidate: 2 r_q r_c D n.

    Within 0.02 % of MetaEmbed's table 4 (arXiv 2509.18095): 91.75 and 733.89 GFLOPs printed, 91.75 and 734.00 computed.
    """
    return 2 * budget.query * budget.candidate * geometry.dim * candidates


def index_bytes(geometry: Geometry, candidate_vectors: int, candidates: int, kind: str = INDEX_TYPE) -> int:
    """Bytes of an index: r_c D n values of 2 bytes for bf16; int8 adds one fp32 scale per vector.

    The same table prints 10.68 and 42.72 GiB for r_c = 16 and 64 at 100,000 candidates of 3584 dims; its 0.68 for one
    vector is 0.67 by the formula.
    """
    scale = 4 if kind == "int8" else 0
    return candidate_vectors * candidates * (geometry.dim * BYTES[kind] + scale)


def weight_bytes(geometry: Geometry, precision: str, quantization: str | None = None) -> int:
    """Bytes of the weights. int8 and fp8 quantise the Linears of blocks and layers, and the token table to INT8; the rest is
    in ``precision``, or bf16."""
    return sum(
        _tensor_bytes(name, shape, precision, quantization) for name, shape in expected_tensors(geometry).items()
    )


def weight_bytes_read(geometry: Geometry, precision: str, *, image: bool) -> int:
    """Bytes of the weights that encoding one item must read: of the token table a few rows, of the tower only images."""
    unread = (TOKEN_TABLE,) if image else (TOKEN_TABLE, "visual.")
    tensors = expected_tensors(geometry).items()
    return sum(_tensor_bytes(name, shape, precision) for name, shape in tensors if not name.startswith(unread))


def _tensor_bytes(name: str, shape: tuple[int, ...], precision: str, quantization: str | None = None) -> int:
    in_layer = ".layers." in name or ".blocks." in name
    quantised = (in_layer and len(shape) == 2) or (name == TOKEN_TABLE and quantization is not None)
    return prod(shape) * (BYTES[quantization or precision] if quantised else max(2, BYTES[precision]))


def activation_bytes(geometry: Geometry, positions: int, patches: int, precision: str = "bf16") -> int:
    """Estimated working memory of both engines for a batch: ``positions`` = b t of the decoder, ``patches`` = i p.

    Three rows of the MLP's width and three of the hidden size live at once: 6 (h + i) bytes a position in bf16. For the
    7B decoder that is 135 KB, which a TensorRT-RTX build of two layers also showed; other widths are by the formula.
    Attention is taken as fused, as it is in bf16 and fp16.
    """
    size = max(2, BYTES[precision])  # quantised Linears still pass bf16 between them
    text, vision = geometry.text, geometry.vision
    return 3 * size * (positions * (text.hidden + text.intermediate) + patches * (vision.hidden + vision.intermediate))
