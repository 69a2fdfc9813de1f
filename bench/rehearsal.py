"""Models of real proportions with random weights: large enough that their Linears, not call overheads, decide the time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metaembed.export.bundle import ExportRequest, export_bundle
from metaembed.export.models import DEMO_FOLDER, ResolvedModel
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.runtime.budget import Budget
from metaembed.runtime.manifest import Bundle

from .rehearsal_sizes import DEFAULT, GEOMETRIES, Config

SEED = 0
SAMPLES = 16  # calibration inputs: ranges decide nothing about speed


def rehearsal_config(geometry: str = DEFAULT) -> Config:
    """The demo's config.json at these sizes."""
    text, vision = GEOMETRIES[geometry]
    config = json.loads((DEMO_FOLDER / "config.json").read_text(encoding="utf-8"))
    return config | {
        "text_config": config["text_config"] | text,
        "vision_config": config["vision_config"] | vision | {"out_hidden_size": text["hidden_size"]},
    }


def write_rehearsal(
    folder: Path, geometry: str = DEFAULT, precision: str = "fp32", budgets: Sequence[Budget] = (Budget(8, 16),)
) -> tuple[Path, Path]:
    """A checkpoint of random weights in one precision and its bundle in the same; returns (bundle, checkpoint)."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    config = rehearsal_config(geometry)
    write_random_checkpoint(config, SEED, checkpoint, dtype=precision)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (checkpoint / name).write_bytes((DEMO_FOLDER / name).read_bytes())
    model = ResolvedModel(geometry, config, base=checkpoint)
    export_bundle(ExportRequest(model=model, budgets=budgets, precision=precision, parity=False), bundle)
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
