"""The sizes that are rehearsed, apart from what needs PyTorch to make them."""

from __future__ import annotations

import argparse
from typing import Any

Config = dict[str, Any]


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, rope: list[int]) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 32000,
        "rope_parameters": {"mrope_section": rope, "rope_theta": 1e6, "rope_type": "default"},
    }


# The decoder, and the vision tower, in the demo's vocabulary of ids.
GEOMETRIES: dict[str, tuple[Config, Config]] = {
    # A small Qwen2.5 (310 M with its table) with a tower of ViT-B's size.
    "402m": (
        _sizes(1024, 2816, 24, 16, 4, [8, 12, 12]),
        {"hidden_size": 768, "intermediate_size": 2048, "num_heads": 12, "depth": 12, "fullatt_block_indexes": [2, 5, 8, 11]},
    ),
    # Qwen2.5-VL 3B with a quarter of its layers: every product has the real size.
    "3b-quarter": (
        _sizes(2048, 11008, 9, 16, 2, [16, 24, 24]),
        {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 8, "fullatt_block_indexes": [7]},
    ),
    # All of it, but for its table of 151,936 words.
    "3b": (
        _sizes(2048, 11008, 36, 16, 2, [16, 24, 24]),
        {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32,
         "fullatt_block_indexes": [7, 15, 23, 31]},
    ),
}  # fmt: skip
DEFAULT = next(iter(GEOMETRIES))


def add_rehearse(parser: argparse.ArgumentParser, what: str) -> None:
    """The option ``--rehearse [GEOMETRY]``: None where it is not given."""
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const=DEFAULT,
        choices=GEOMETRIES,
        metavar="GEOMETRY",
        help=f"{what}: {', '.join(GEOMETRIES)} (default: {DEFAULT})",
    )
