"""A tiny Qwen2.5-VL with MetaEmbed's keys; every size differs from every other, so that a swapped axis fails."""

from __future__ import annotations

import copy

import pytest

TINY = {
    "architectures": ["Qwen2_5_VLModel"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 72,
    "vocab_size": 301,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 300,
    "video_token_id": 299,
    "vision_start_token_id": 298,
    "vision_end_token_id": 297,
    "tie_word_embeddings": False,
    "num_query_prompt_tokens": 3,
    "num_doc_prompt_tokens": 7,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
}


@pytest.fixture(scope="session")
def tiny():
    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_config(tiny):
    """A copy to change."""
    return copy.deepcopy(tiny)
