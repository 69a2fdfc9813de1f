"""The judge: Hugging Face's own Qwen2_5_VLModel with all Meta Token rows appended the official way.

Nothing here comes from the traced encoder, its layouts or the runtime's preprocessing: prompts are written out again,
tokenised by HF's tokenizer, images cut by HF's PIL processor, positions taken from HF's ``get_rope_index``. Padding is on
the left, as in the released code (github.com/facebookresearch/MetaEmbed: read, not copied).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as hf_logging

from metaembed.runtime.golden import GoldenItem

from .source import Source, find_image_processor
from .streamed import needs_streaming, open_loaded, open_streamed

Floats = NDArray[np.float32]


class Reference:
    """HF's model in float32 on the CPU; its weights are streamed from disk when they would not fit in memory.

    Args:
        source: the checkpoint; HF reads the model from its folder.
        max_image_tokens: the export's limit, which the released code passes to the image processor as max_pixels.
    """

    def __init__(self, source: Source, max_image_tokens: int = 1024) -> None:
        hf_logging.set_verbosity_error()  # it reports prompt_embed_tokens as an unexpected key
        hf_logging.disable_progress_bar()
        self.streamed = needs_streaming(source.checkpoint)
        open_model = open_streamed if self.streamed else open_loaded
        self.model = open_model(source.folder, source.checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(source.asset("tokenizer.json").parent)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(find_image_processor(source.assets)[0])
        limit = min(self.images.size["longest_edge"], max_image_tokens * 28 * 28)
        self.images.size = {"shortest_edge": self.images.size["shortest_edge"], "longest_edge": limit}
        self.query_tokens = int(source.checkpoint.config.get("num_query_prompt_tokens", 16))
        extra = {
            name: torch.from_numpy(source.checkpoint.read(name).astype(np.float32))
            for name in source.checkpoint.tensors
            if not name.startswith(("visual.", "language_model."))
        }
        self.meta = extra.pop("prompt_embed_tokens.weight")  # (80, d)
        self.projection = [extra[name] for name in ("custom_text_proj.weight", "custom_text_proj.bias") if extra]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self._tokens(text))

    def encode(self, side: str, items: Sequence[GoldenItem]) -> Floats:
        """Embeddings [n, 16 or 64, d] of one batch."""
        with torch.inference_mode():
            return self._encode(side, items).numpy()

    def _encode(self, side: str, items: Sequence[GoldenItem]) -> Tensor:
        pictures = [self.images(_stretched(item.image), return_tensors="pt") if item.image else None for item in items]
        prompts = [
            self._tokens(prompt_text(side, item.text, None if p is None else int(p["image_grid_thw"].prod()) // 4))
            for item, p in zip(items, pictures, strict=True)
        ]
        longest, rows = max(map(len, prompts)), len(self.meta)
        filler = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        ids = torch.full((len(prompts), longest + rows), filler)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
            attention[row, longest - len(prompt) :] = 1
        seen = [picture for picture in pictures if picture is not None]
        is_image = ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        grids = torch.cat([picture["image_grid_thw"] for picture in seen]) if seen else None
        embeds = self.model.get_input_embeddings()(ids)
        embeds[:, longest:] = self.meta
        if seen:
            pixels = torch.cat([picture["pixel_values"] for picture in seen])
            embeds[is_image] = torch.cat(list(self.model.get_image_features(pixels, grids).pooler_output))
        positions, _ = self.model.get_rope_index(ids, is_image.int(), grids, attention_mask=attention)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=attention, position_ids=positions, use_cache=False
        ).last_hidden_state[:, longest:]
        hidden = hidden[:, : self.query_tokens] if side == "query" else hidden[:, self.query_tokens :]
        if self.projection:
            hidden = torch.nn.functional.linear(hidden, *self.projection)
        return torch.nn.functional.normalize(hidden, dim=-1)

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def prompt_text(side: str, text: str | None, image_tokens: int | None) -> str:
    """The released templates (``use_simple_prompt: true``), written out; FACTS of the paper's code, section 1."""
    prefix = "Query: " if side == "query" else ""
    picture = "" if image_tokens is None else f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>"
    prompt = f"<|im_start|>user\n{picture}{prefix}{text or 'Describe the image.'}<|im_end|><|endoftext|>"
    return prompt + ("<|endoftext|>" * 10 + "\n" if side == "query" else "")


def _stretched(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    return image.resize((max(28, image.width), max(28, image.height)), Image.Resampling.BICUBIC)
