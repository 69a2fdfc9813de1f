"""The report's first question: which budget for so many candidates on which device, and what is lost by it."""

from __future__ import annotations

from collections.abc import Sequence

from metaembed.runtime.advise import Advice, Needs, advise
from metaembed.runtime.advise_report import describe_option, explain_nothing, quality_words
from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.devices import find_device
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.memory import GIB
from metaembed.runtime.plan import make_plan
from metaembed.runtime.quality_curve import QualityCurve, curve_of

from .records import Record
from .table import Table

CANDIDATES, LATENCY_MS = 1_000_000, 200.0
DEVICES = ("orin-64gb", "thor", "a100", "h100")
BUDGETS = tuple(Budget(*group) for group in TRAINED_GROUPS)


def make_advice(records: Sequence[Record]) -> Table | None:
    """One row a device and model; arithmetic on data sheets at half of their limits, quality by the measured curve."""
    curve = curve_of(records)
    if any(str(budget) not in curve.values for budget in BUDGETS):
        return None
    rows = []
    for name in DEVICES:
        device = find_device(name)
        for model, known in KNOWN.items():
            plan = make_plan(model, known.geometry, BUDGETS, CANDIDATES)
            advice = advise(plan, device, Needs(latency_ms=LATENCY_MS), curve)
            rows.append((f"{device.title}, {model}", *_cells(advice, curve)))
    note = (
        "1,1:1000 16,64 scores all with one query and one candidate vector, then the best 1,000 with 16 and 64. "
        f"At most {LATENCY_MS:g} ms a text query, encoding it included. Times are arithmetic: weights, vectors and operations "
        f"against {Needs().reached:.0%} of the data sheets' peak rates, memory fetches at assumed rates; not measured on these "
        f"devices. Quality is that of {curve.source}, over {curve.candidates:,} candidates (best {curve.best:.3f}): of another "
        f"model the numbers differ, and among {CANDIDATES:,} more candidates look alike. A cascade reaches at most what its last "
        "stage does, and at worst what its first does alone: measure yours. "
        "For your data: metaembed-bench quality, then metaembed-plan --quality-curve."
    )
    return Table(("device, model", "serve with", "GiB", "ms", "nDCG@5", "lost"), tuple(rows), note)


def _cells(advice: Advice, curve: QualityCurve) -> tuple[str, ...]:
    option = advice.chosen
    if option is None:
        return explain_nothing(advice), "", "", "", ""
    assert option.quality is not None
    assert option.quality_least is not None
    least, most = curve.best - option.quality, curve.best - option.quality_least
    return (
        describe_option(option),
        f"{option.device_bytes / GIB:.1f}",
        f"{option.latency_ms:.0f}",
        quality_words(option),
        f"{least:.3f}" if least == most else f"{least:.3f} to {most:.3f}",
    )
