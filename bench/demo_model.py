"""The demo model's shape and its checkpoint folder, in the layout of a Hugging Face Qwen2.5-VL checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from metaembed.runtime.staged_file import staged_file

from .demo_tokenizer import build_tokenizer, write_tokenizer

QUERY_TOKENS, CANDIDATE_TOKENS = 16, 64
HIDDEN = 128
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 1024 * 28 * 28

PREPROCESSOR: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": IMAGE_MEAN,
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": IMAGE_STD,
    "max_pixels": MAX_PIXELS,
    "merge_size": 2,
    "min_pixels": MIN_PIXELS,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": MAX_PIXELS, "shortest_edge": MIN_PIXELS},
    "temporal_patch_size": 2,
}


def build_config() -> dict[str, Any]:
    """config.json: Qwen2.5-VL small enough to train on two cores, with every mechanism of the large ones."""
    tokenizer = build_tokenizer()
    ids = {text: tokenizer.token_to_id(text) for text in tokenizer.get_vocab() if text.startswith("<|")}
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "max_window_layers": 3,
        "model_type": "qwen2_5_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "rms_norm_eps": 1e-6,
        # Base 100, not 1e6: with 16 frequencies a head, 1e6 would leave the column of an image cell all but unmarked.
        "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 100.0, "rope_type": "default"},
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,  # more rows than tokens, as in the official models
    }
    vision = {
        "depth": 4,
        "fullatt_block_indexes": [3],
        "hidden_act": "silu",
        "hidden_size": 128,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "model_type": "qwen2_5_vl",
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }
    return {
        "architectures": ["Qwen2_5_VLModel"],
        "dim": -1,
        "dtype": "float32",
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen2_5_vl",
        "num_doc_prompt_tokens": CANDIDATE_TOKENS,
        "num_query_prompt_tokens": QUERY_TOKENS,
        "shared_query_doc_prompt": False,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
    }


def write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the checkpoint folder but its README; weights by Hugging Face's names, prompt_embed_tokens included."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(build_config(), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    with staged_file(folder / "model.safetensors") as part:
        save_file(plain, part, metadata={"format": "pt"})
