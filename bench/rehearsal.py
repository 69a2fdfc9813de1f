"""A model of real proportions with random weights: large enough that its Linears, not call overheads, decide the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metaembed.export.bundle import ExportRequest, export_bundle
from metaembed.export.models import DEMO_FOLDER, ResolvedModel
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.runtime.budget import Budget
from metaembed.runtime.manifest import Bundle

NAME = "402m"
SEED = 0
SAMPLES = 16  # calibration inputs: ranges decide nothing about speed
# A small Qwen2.5 (hidden 1024, 24 layers; 310 M with its table) with a tower of ViT-B's size, in the demo's vocabulary of ids.
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "rope_parameters": {"mrope_section": [8, 12, 12], "rope_theta": 1e6, "rope_type": "default"},
}
VISION = {"hidden_size": 768, "intermediate_size": 2048, "num_heads": 12, "depth": 12, "fullatt_block_indexes": [2, 5, 8, 11],
          "out_hidden_size": 1024}  # fmt: skip


def rehearsal_config() -> dict[str, Any]:
    """The demo's config.json at these sizes."""
    config = json.loads((DEMO_FOLDER / "config.json").read_text(encoding="utf-8"))
    return config | {
        "text_config": config["text_config"] | TEXT,
        "vision_config": config["vision_config"] | VISION,
    }


def write_rehearsal(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of random float32 weights and its bundle; returns (bundle, checkpoint)."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    write_random_checkpoint(rehearsal_config(), SEED, checkpoint, dtype="fp32")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (checkpoint / name).write_bytes((DEMO_FOLDER / name).read_bytes())
    model = ResolvedModel(NAME, rehearsal_config(), base=checkpoint)
    export_bundle(ExportRequest(model=model, budgets=[Budget(8, 16)], parity=False), bundle)
    return bundle, checkpoint


def quantise_rehearsal(bundle: Path, output: Path, threads: int = 0, *, quiet: bool = False) -> Path:
    """Its INT8 bundle, every Linear quantised: for its speed. Random weights have no ranking to keep, so nothing is judged."""
    from metaembed.calibration.cli import calibrate, make_request

    limit = Bundle.open(bundle, verify=False).manifest.limits.text_tokens
    request = make_request(
        "int8", "demo", text_tokens=limit, samples=SAMPLES, smooth=False, judge=False, threads=threads
    )
    calibrate(bundle, request, output, force=False, quiet=quiet)
    return output
