"""The tensors of a MetaEmbed model: their names, as transformers 5 gives them for Qwen2_5_VLModel, and their shapes."""

from __future__ import annotations

from math import prod

from .geometry import Geometry, TextGeometry, VisionGeometry

Shapes = dict[str, tuple[int, ...]]

META_TABLE = "prompt_embed_tokens.weight"
TOKEN_TABLE = "language_model.embed_tokens.weight"


def expected_tensors(geometry: Geometry) -> Shapes:
    """Name to shape for every tensor the encoder uses, in the order of ``Qwen2_5_VLModel.state_dict()``.

    ``lm_head`` is not among them: an embedding never reaches it.
    """
    return {**vision_tensors(geometry.vision), **text_tensors(geometry.text), **meta_tensors(geometry)}


def parameter_count(geometry: Geometry) -> int:
    """Number of parameters that an exported encoder holds."""
    return sum(prod(shape) for shape in expected_tensors(geometry).values())


def meta_tensors(geometry: Geometry) -> Shapes:
    """What MetaEmbed adds to Qwen2.5-VL."""
    shapes: Shapes = {META_TABLE: (geometry.meta_tokens, geometry.text.hidden)}
    if geometry.projection is not None:
        shapes |= _linear("custom_text_proj", geometry.projection, geometry.text.hidden, bias=True)
    return shapes


def vision_tensors(vision: VisionGeometry) -> Shapes:
    """The vision tower and its merger, under ``visual.``."""
    merged = vision.hidden * vision.merge**2
    patch = (vision.hidden, vision.in_channels, vision.temporal, vision.patch, vision.patch)
    shapes: Shapes = {"visual.patch_embed.proj.weight": patch}
    for block in range(vision.depth):
        shapes |= _vision_block(f"visual.blocks.{block}", vision)
    shapes["visual.merger.ln_q.weight"] = (vision.hidden,)
    shapes |= _linear("visual.merger.mlp.0", merged, merged, bias=True)
    return shapes | _linear("visual.merger.mlp.2", vision.out_hidden, merged, bias=True)


def text_tensors(text: TextGeometry) -> Shapes:
    """The decoder without ``lm_head``, under ``language_model.``."""
    shapes: Shapes = {TOKEN_TABLE: (text.vocab, text.hidden)}
    for layer in range(text.layers):
        shapes |= _decoder_layer(f"language_model.layers.{layer}", text)
    shapes["language_model.norm.weight"] = (text.hidden,)
    return shapes


def _vision_block(name: str, vision: VisionGeometry) -> Shapes:
    return {
        f"{name}.norm1.weight": (vision.hidden,),
        f"{name}.norm2.weight": (vision.hidden,),
        **_linear(f"{name}.attn.qkv", 3 * vision.hidden, vision.hidden, bias=True),
        **_linear(f"{name}.attn.proj", vision.hidden, vision.hidden, bias=True),
        **_mlp(f"{name}.mlp", vision.hidden, vision.intermediate, bias=True),
    }


def _decoder_layer(name: str, text: TextGeometry) -> Shapes:
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    return {
        **_linear(f"{name}.self_attn.q_proj", queries, text.hidden, bias=True),
        **_linear(f"{name}.self_attn.k_proj", keys, text.hidden, bias=True),
        **_linear(f"{name}.self_attn.v_proj", keys, text.hidden, bias=True),
        **_linear(f"{name}.self_attn.o_proj", text.hidden, queries, bias=False),
        **_mlp(f"{name}.mlp", text.hidden, text.intermediate, bias=False),
        f"{name}.input_layernorm.weight": (text.hidden,),
        f"{name}.post_attention_layernorm.weight": (text.hidden,),
    }


def _mlp(name: str, hidden: int, intermediate: int, *, bias: bool) -> Shapes:
    return {
        **_linear(f"{name}.gate_proj", intermediate, hidden, bias=bias),
        **_linear(f"{name}.up_proj", intermediate, hidden, bias=bias),
        **_linear(f"{name}.down_proj", hidden, intermediate, bias=bias),
    }


def _linear(name: str, out: int, into: int, *, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out, into)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes
