"""A real-size model judged on a small machine: random weights, exported, and compared with Hugging Face's model on the same.

The reference streams its weights from the shards a layer at a time, and ONNX Runtime widens memory-mapped bf16 weights
as it meets them, so neither ever holds the model (docs/export.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaembed.runtime.manifest import Bundle

from .export import COMMAND, bundle_bytes, copy_assets, model_config, run_measured

SEED = 0


def measure_parity_export(
    model: str, folder: Path, budgets: Sequence[str] = ("8,16",), layers: int | None = None
) -> dict[str, Any]:
    """Export ``model`` with random bf16 weights and the parity gate on; the record of its cost and of what was found.

    Args:
        folder: where the bundle goes, and its config.json where ``layers`` makes it less than the known size.
        layers: decoder layers, each of the known size; all by default.

    Raises:
        MetaEmbedError: the export failed, its parity check included.
    """
    options = [option for budget in budgets for option in ("--budget", budget)]
    output, source = folder / "bundle", model
    if layers is not None:
        source = str(folder / "config")
        (folder / "config").mkdir(parents=True)
        (folder / "config" / "config.json").write_text(json.dumps(model_config(model, layers)))
        copy_assets(folder / "config")
    arguments = ["--model", source, "--random-weights", str(SEED), *options, "--parity", "quick", "-o", str(output)]
    cost = run_measured([sys.executable, "-c", COMMAND, *arguments, "--quiet"])
    found = Bundle.open(output, verify=False).manifest.parity
    assert found is not None, "an export that succeeded with its gate on has a record"
    return {
        "layers": layers or "all",
        "tool": "metaembed-export",
        "budgets": list(budgets),
        **asdict(cost),
        **bundle_bytes(output),
        **summarise(found),
    }


def summarise(parity: Mapping[str, Any]) -> dict[str, Any]:
    """The worst of each kind of input, over sides and budgets, with the tolerance that it met; and the worst ranking."""
    kinds = sorted({record["input"] for record in parity["vectors"]})
    by_kind = {kind: [record for record in parity["vectors"] if record["input"] == kind] for kind in kinds}
    return {
        "precision": parity["precision"],
        "passed": parity["passed"],
        "min_cosine": {kind: min(record["min_cosine"] for record in found) for kind, found in by_kind.items()},
        "max_abs": {kind: max(record["max_abs"] for record in found) for kind, found in by_kind.items()},
        "tolerance": parity["vectors"][0]["tolerance"],
        "top10_overlap": min(record["overlap"] for record in parity["rankings"]),
    }
