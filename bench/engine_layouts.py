"""What the layouts of TensorRT engines cost to build: bytes of the plans, seconds, and peak memory, against the estimates.

Ahead of time and without a GPU, so nothing here says anything about speed or accuracy on a device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaembed.export.build_options import BuildOptions, chosen_engines
from metaembed.export.engine import build_engine
from metaembed.export.memory import count_weights, estimate_build
from metaembed.export.preflight import Preflight, check_target
from metaembed.export.profiles import EngineSpec
from metaembed.export.route import installed_versions
from metaembed.runtime.budget import Budget
from metaembed.runtime.devices import Device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import Bundle

FLAVOUR = "tensorrt_rtx"
# Layout -> what it asks of the builder.
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "profile-per-budget": {"profile_per_budget": True},
    "separate": {"layout": "separate"},
}


@dataclass(frozen=True)
class Cost:
    """One engine: bytes of its plan, wall and processor seconds, peak anonymous memory, and the builder's activations."""

    name: str
    profiles: int
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None
    activation_bytes: int | None
    weight_bytes: int
    estimated_bytes: int
    estimated_peak_bytes: int


def measure_layouts(
    bundle: Bundle,
    device: Device,
    layouts: Sequence[str],
    separate: Sequence[Budget] = (),
    *,
    work: Path | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, values) of a record for each engine built (``engine_build``) and for each layout (``engine_layout``).

    Each engine is built once, whatever layouts hold it. ``separate`` names the budgets whose engines are built for the
    separate layout; the others' bytes and seconds are computed from those, and the record says so.

    Raises:
        UsageError: TensorRT-RTX is missing, or the target is none that it builds for.
        MetaEmbedError: the builder failed.
    """
    version = installed_versions().get(FLAVOUR)
    if version is None:
        raise UsageError("TensorRT-RTX is not installed here; pip install 'metaembed-export[tensorrt-rtx]'")
    built: dict[str, Cost] = {}  # by the text of its spec, which holds dicts
    common = {"model": bundle.manifest.model, "precision": bundle.manifest.precision, "target": device.name,
              "budgets": [str(budget) for budget in bundle.manifest.budgets], "builder": f"{FLAVOUR} {version}"}  # fmt: skip
    for layout in layouts:
        options = BuildOptions(budgets=bundle.manifest.budgets, **LAYOUTS[layout])
        wanted = chosen_engines(bundle.manifest, options)
        some = separate if layout == "separate" and separate else options.budgets
        specs = chosen_engines(bundle.manifest, replace(options, budgets=tuple(some)))
        for spec in specs:
            if str(spec) not in built:
                preflight = check_target(bundle, device, (spec,), flavour=FLAVOUR, version=version)
                built[str(spec)] = cost = _measure(bundle, preflight, spec, work)
                yield "engine_build", {**common, "layout": layout, **vars(cost)}
        totals = summarise(wanted, [built[str(spec)] for spec in specs])
        yield (
            "engine_layout",
            {
                **common,
                "layout": layout,
                **totals,
                "weight_bytes": estimate_build(bundle.manifest, wanted, FLAVOUR).weights,
            },
        )


def _measure(bundle: Bundle, preflight: Preflight, spec: EngineSpec, work: Path | None) -> Cost:
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, start, before = Path(name), time.perf_counter(), os.times()
        log = folder / "log"
        log.touch()
        found = build_engine(bundle, preflight, spec, folder, log)
        seconds, after = time.perf_counter() - start, os.times()
    weights = count_weights(bundle.manifest.geometry).get(Path(spec.graph).stem)
    estimate = estimate_build(bundle.manifest, (spec,), FLAVOUR)
    return Cost(
        name=spec.name,
        profiles=len(spec.profiles),
        bytes=found.record.bytes,
        seconds=round(seconds, 1),
        cpu_seconds=round(
            after.children_user + after.children_system - before.children_user - before.children_system, 1
        ),
        peak_memory_bytes=found.peak_memory,
        activation_bytes=found.activations,
        weight_bytes=weights.bytes(bundle.manifest.precision, bundle.manifest.quantization) if weights else 0,
        estimated_bytes=estimate.plans,
        estimated_peak_bytes=estimate.build_peak,
    )


def summarise(wanted: Sequence[EngineSpec], costs: Sequence[Cost]) -> dict[str, Any]:
    """A layout's totals. Language engines that were not built count as the mean of those that were."""
    language = [cost for cost in costs if cost.name not in ("vision", "scorer")]
    missing = len(wanted) - len(costs)

    def total(of: Callable[[Cost], float]) -> float:
        return sum(map(of, costs)) + missing * sum(map(of, language)) / len(language)

    return {
        "engines": len(wanted),
        "engines_built": len(costs),
        "profiles": sum(len(spec.profiles) for spec in wanted),
        "bytes": round(total(lambda cost: cost.bytes)),
        "seconds": round(total(lambda cost: cost.seconds), 1),
        "cpu_seconds": round(total(lambda cost: cost.cpu_seconds), 1),
        "peak_memory_bytes": max((cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes), default=None),
        "estimated_bytes": round(total(lambda cost: cost.estimated_bytes)),
        "estimated_peak_bytes": max(cost.estimated_peak_bytes for cost in costs),
    }
