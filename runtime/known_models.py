"""The released sizes of MetaEmbed's backbone: the config.json of each, for planning without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .geometry import Geometry


@dataclass(frozen=True)
class KnownModel:
    """One released size: ``base`` is the hub id of its backbone, ``config`` a HF config.json with MetaEmbed's keys."""

    name: str
    base: str
    config: dict[str, Any]

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config)


def _known(name: str, base: str, *, vision_intermediate: int, **text: Any) -> KnownModel:
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": vision_intermediate,
        "num_heads": 16,
        "in_channels": 3,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    decoder = {
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
    }
    tokens = {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
    }
    # Released MetaEmbed configuration: separate Meta Tokens, no projection, causal.
    metaembed = {
        "num_query_prompt_tokens": 16,
        "num_doc_prompt_tokens": 64,
        "shared_query_doc_prompt": False,
        "dim": -1,
        "use_bidirectional_attention": False,
    }
    kind = {"architectures": ["Qwen2_5_VLModel"], "model_type": "qwen2_5_vl"}
    return KnownModel(name, base, {**kind, **text, **decoder, **tokens, **metaembed, "vision_config": vision})


def _demo() -> KnownModel:
    """The demo that the package ships (export/demo/config.json, which a device does not have)."""
    text = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 512, "vocab_size": 704, "tie_word_embeddings": True}  # fmt: skip
    model = _known("demo", "", vision_intermediate=384, **text)
    vision = model.config["vision_config"] | {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "fullatt_block_indexes": [3],
    }
    tokens = {"bos_token_id": 629, "eos_token_id": 631, "vision_start_token_id": 638, "vision_end_token_id": 639,
              "image_token_id": 641, "video_token_id": 642}  # fmt: skip
    rope = {"rope_theta": 100.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    return KnownModel("demo", "", {**model.config, **tokens, **rope, "vision_config": vision})


DEMO = _demo()

# Sources: https://huggingface.co/Qwen/Qwen2.5-VL-{3B,7B,32B}-Instruct/blob/main/config.json. The sizes are confirmed by
# the parameter counts that the files' headers give, lm_head included: 3,754,622,976 (tied), 8,292,166,656 and
# 33,452,718,336. The vision MLP of 32B is wider (3456 for 3420): its tower has 688,841,984 parameters.
KNOWN = {
    model.name: model
    for model in (
        _known(
            "3b",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            vision_intermediate=3420,
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            intermediate_size=11008,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        _known(
            "7b",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            vision_intermediate=3420,
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        _known(
            "32b",
            "Qwen/Qwen2.5-VL-32B-Instruct",
            vision_intermediate=3456,
            hidden_size=5120,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            intermediate_size=27648,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
    )
}
