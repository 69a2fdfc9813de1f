"""The encoder, cut for export: Qwen2.5-VL with a Meta Token head, restated so that it traces to two static graphs.

Parameter names are those of Hugging Face's ``Qwen2_5_VLModel`` (plus ``prompt_embed_tokens`` and ``custom_text_proj``),
so a checkpoint loads strictly and a graph's initialisers can point into its shards. All data-dependent arrays come from
``metaembed.runtime.layout``. Only primitive operators are used, so that TensorRT 10.3's parser takes the graphs.

Shapes: b items, t positions, r answer rows, d hidden, h heads, k key heads, e head size, i images, w windows, c width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaembed.runtime.geometry import Geometry, TextGeometry, VisionGeometry

FP16_SCALE = 2.0**-6
VISION_ROPE_THETA = 10000.0  # fixed in Qwen2.5-VL
MASKED = -3.0e4  # finite, so that padding never makes NaN (-inf * 0); within fp16; exp(MASKED) is 0 in float32


def rotation(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * inv_freq``, doubled over the two halves of a head, in float32."""
    angles = positions.float() * inv_freq  # (..., e/2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., e)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) in float32: x (b, t, h, e), cos and sin (b, t, e)."""
    half = x.shape[-1] // 2
    wide = x.float()
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    return (wide * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k' / sqrt(e) + bias) v with the softmax in float32.

    q (b, s, h, e), k and v (b, t, k, e) with h a multiple of k, bias (b, 1, s or 1, t) -> (b, s, h * e)
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # (b, heads, positions, e)
    if groups > 1:
        k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() + bias  # (b, h, s, e) x (b, h, e, t) -> (b, h, s, t)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467): float32 in, the compute type (the weight's) out.

    Written with a power and a quotient, as the formula is: ONNX Runtime knows that pattern and makes one operator of it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x / root * self.weight.float()).to(self.weight.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202): compute type in, float32 out.

    In float16 the product is carried at 1/64 of its size: Qwen2.5-VL's reaches beyond 65504 there, most of all in the
    vision tower (github.com/ggml-org/llama.cpp/pull/17534). A power of two costs no precision.
    """

    def __init__(self, size: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, down = self.gate_proj(x).float(), self.down_proj
        product = gate * gate.sigmoid() * self.up_proj(x).float()
        scale = FP16_SCALE if down.weight.dtype == torch.float16 else 1.0
        y = nn.functional.linear((product * scale).to(down.weight.dtype), down.weight).float() / scale
        return y if down.bias is None else y + down.bias.float()


class VisionAttention(nn.Module):
    """Attention inside windows of 64 patches or, in a few blocks, over all windows of an image."""

    def __init__(self, g: VisionGeometry, *, whole_image: bool) -> None:
        super().__init__()
        self.heads = g.heads
        self.joined = (1, 2) if whole_image else (0, 1)  # (i, w, 64): which axes share a sequence or a batch
        self.qkv = nn.Linear(g.hidden, 3 * g.hidden)
        self.proj = nn.Linear(g.hidden, g.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(*self.joined).unflatten(-1, (3, self.heads, -1))  # (b, t, 3, h, e)
        q, k = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin)
        return self.proj(attend(q, k, qkv[:, :, 2], bias).reshape(x.shape)).float()


class VisionBlock(nn.Module):
    def __init__(self, g: VisionGeometry, *, whole_image: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(g.hidden, 1e-6)
        self.norm2 = RMSNorm(g.hidden, 1e-6)
        self.attn = VisionAttention(g, whole_image=whole_image)
        self.mlp = GatedMLP(g.hidden, g.intermediate, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:  # (i, w, 64, c) -> the same
        x = x + self.attn(self.norm1(x), cos, sin, bias)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The 3-d convolution over non-overlapping patches, as the matrix product that it is."""

    def __init__(self, g: VisionGeometry) -> None:
        super().__init__()
        kernel = (g.temporal, g.patch, g.patch)
        self.proj = nn.Conv3d(g.in_channels, g.hidden, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return patches.to(self.proj.weight.dtype) @ self.proj.weight.flatten(1).t()


class PatchMerger(nn.Module):
    """Four patches of a merged unit become one image embedding."""

    def __init__(self, g: VisionGeometry) -> None:
        super().__init__()
        width = g.hidden * g.merge**2
        self.ln_q = RMSNorm(g.hidden, 1e-6)
        self.mlp = nn.ModuleList([nn.Linear(width, width), nn.Identity(), nn.Linear(width, g.out_hidden)])

    def forward(self, x: Tensor) -> Tensor:  # (i, w, 64, c) -> (i, w * 16, d)
        x = self.ln_q(x).flatten(1).unflatten(1, (-1, self.mlp[0].in_features))
        wide = self.mlp[0](x).float()
        return self.mlp[2]((0.5 * wide * (1.0 + torch.erf(wide * 0.5**0.5))).to(x.dtype))  # exact GELU


class VisionTower(nn.Module):
    def __init__(self, g: VisionGeometry) -> None:
        super().__init__()
        self.whole_image = [index in g.full_attention_blocks for index in range(g.depth)]
        self.patch_embed = PatchEmbed(g)
        self.blocks = nn.ModuleList(VisionBlock(g, whole_image=whole) for whole in self.whole_image)
        self.merger = PatchMerger(g)

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = self.patch_embed(patches).float()  # (i, w, 64, c); the residual stream is float32 in every precision
        turns = {  # cos, sin and bias for attention inside windows and over the whole image
            False: (cos.flatten(0, 1), sin.flatten(0, 1), bias.flatten(0, 1)[:, None, None]),
            True: (cos.flatten(1, 2), sin.flatten(1, 2), bias.flatten(1, 2)[:, None, None]),
        }
        for whole, block in zip(self.whole_image, self.blocks, strict=True):
            x = block(x, *turns[whole])
        return self.merger(x)


class VisionEncoder(nn.Module):
    """Patches in window order -> image embeddings [i, w*16, d], still in window order (inputs: CONTRIBUTING.md)."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.visual = VisionTower(geometry.vision)
        register_constants(self, vision_constants(geometry.vision))

    def forward(self, patches: Tensor, patch_positions: Tensor, patch_mask: Tensor) -> Tensor:
        # Half of the frequencies turn with the row, half with the column: (i, w, 64, 2, e/4) -> (i, w, 64, e/2)
        quarter = self.vision_inv_freq.shape[0] // 2
        positions = patch_positions.unsqueeze(-1).expand(-1, -1, -1, -1, quarter).flatten(-2)
        cos, sin = rotation(positions, self.vision_inv_freq)
        bias = (~patch_mask).float() * MASKED
        return self.visual(patches, cos, sin, bias)


class Attention(nn.Module):
    attend = staticmethod(attend)

    def __init__(self, g: TextGeometry) -> None:
        super().__init__()
        self.head_size = g.head_dim
        self.q_proj = nn.Linear(g.hidden, g.heads * g.head_dim, bias=True)
        self.k_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=True)
        self.v_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=True)
        self.o_proj = nn.Linear(g.heads * g.head_dim, g.hidden, bias=False)

    def forward(self, x: Tensor, asking: Tensor, turn: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor) -> Tensor:
        """Positions ``asking`` (b, s, d) attend over ``x`` (b, t, d); turn = cos, sin of x, then of asking."""
        cos, sin, asking_cos, asking_sin = turn
        q, k, v = (
            project(source).unflatten(-1, (-1, self.head_size))
            for project, source in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        )
        return self.o_proj(self.attend(rotate(q, asking_cos, asking_sin), rotate(k, cos, sin), v, bias)).float()


class DecoderLayer(nn.Module):
    def __init__(self, g: TextGeometry) -> None:
        super().__init__()
        self.self_attn = Attention(g)
        self.mlp = GatedMLP(g.hidden, g.intermediate, bias=False)
        self.input_layernorm = RMSNorm(g.hidden, g.rms_eps)
        self.post_attention_layernorm = RMSNorm(g.hidden, g.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, rows: Tensor | None = None) -> Tensor:
        """With ``rows``, keys and values cover all positions but only those rows are computed and returned: exact."""
        normed = self.input_layernorm(x)
        if rows is None:
            asking, turn = normed, (cos, sin, cos, sin)
        else:
            x, asking = x.index_select(1, rows), normed.index_select(1, rows)
            turn = (cos, sin, cos.index_select(1, rows), sin.index_select(1, rows))
            bias = bias.index_select(2, rows)
        x = x + self.self_attn(normed, asking, turn, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, g: TextGeometry) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab, g.hidden)
        self.layers = nn.ModuleList(DecoderLayer(g) for _ in range(g.layers))
        self.norm = RMSNorm(g.hidden, g.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        *body, last = self.layers
        for layer in body:
            x = layer(x, cos, sin, bias)
        return self.norm(last(x, cos, sin, bias, rows))


class LanguageEncoder(nn.Module):
    """Prompt and Meta Tokens -> L2-normalised float32 embeddings [b, r, d] at ``rows``: fixed prefix slicing.

    See CONTRIBUTING.md for the inputs. Token ids from ``vocab`` on are Meta Tokens.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        hidden = geometry.text.hidden
        self.language_model = LanguageModel(geometry.text)
        self.prompt_embed_tokens = nn.Embedding(geometry.meta_tokens, hidden)
        self.custom_text_proj = None if geometry.projection is None else nn.Linear(hidden, geometry.projection)
        register_constants(self, text_constants(geometry.text))

    def forward(
        self,
        token_ids: Tensor,
        image_rows: Tensor,
        image_embeddings: Tensor,
        positions: Tensor,
        mask: Tensor,
        rows: Tensor,
    ) -> Tensor:
        x = self.embed(token_ids, image_rows, image_embeddings).float()  # (b, t, d); a float32 residual stream
        cos, sin = rotation(positions.index_select(1, self.rope_axes).transpose(1, 2), self.text_inv_freq)
        order = torch.arange(token_ids.shape[1], device=token_ids.device)
        seen = (order.unsqueeze(0) <= order.unsqueeze(1)) & mask.unsqueeze(1)  # (t, t) & (b, 1, t) -> (b, t, t)
        bias = (~seen).float().unsqueeze(1) * MASKED
        x = self.language_model(x, cos, sin, bias, rows)
        if self.custom_text_proj is not None:
            x = self.custom_text_proj(x)
        x = x.float()
        return x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)

    def embed(self, token_ids: Tensor, image_rows: Tensor, image_embeddings: Tensor) -> Tensor:
        """Each position's vector: a token's, an image embedding, or a Meta Token's row."""
        table, meta_table = self.language_model.embed_tokens, self.prompt_embed_tokens
        vocabulary = table.num_embeddings
        is_meta = (token_ids >= vocabulary).unsqueeze(-1)
        tokens = table(token_ids.clamp(max=vocabulary - 1))
        metas = meta_table((token_ids - vocabulary).clamp(min=0))
        images = nn.functional.embedding(image_rows.clamp(min=0), image_embeddings.flatten(0, 1))
        return torch.where(is_meta, metas, torch.where((image_rows >= 0).unsqueeze(-1), images, tokens))


def register_constants(module: nn.Module, constants: dict[str, Tensor]) -> None:
    """Keep tensors that follow from the geometry beside the weights, but out of the checkpoint."""
    for name, value in constants.items():
        module.register_buffer(name, value, persistent=False)


def vision_constants(g: VisionGeometry) -> dict[str, Tensor]:
    """Rotary frequencies of one half head [e/2]: the first quarter turns with the row, the second with the column."""
    half = g.head_dim // 2
    quarter = 1.0 / (VISION_ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    return {"vision_inv_freq": quarter.repeat(2)}


def text_constants(g: TextGeometry) -> dict[str, Tensor]:
    """Rotary frequencies [e/2], and which of (temporal, height, width) turns each of them: M-RoPE."""
    frequencies = 1.0 / (g.rope_theta ** (torch.arange(0, g.head_dim, 2, dtype=torch.float32) / g.head_dim))
    axes = [axis for axis, length in enumerate(g.mrope_section) for _ in range(length)]
    return {"text_inv_freq": frequencies, "rope_axes": torch.tensor(axes)}
