"""The report's first question: which budget for so many candidates on which device, and what is lost by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metaembed.runtime.advise import Advice, Needs, advise
from metaembed.runtime.advise_report import describe_option, explain_nothing
from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.devices import find_device
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.plan import make_plan
from metaembed.runtime.plan_device import GIB

from .records import Record, of_kind
from .table import Table

CANDIDATES, LATENCY_MS = 1_000_000, 200.0
DEVICES = ("orin-64gb", "thor", "a100", "h100")
BUDGETS = tuple(Budget(*group) for group in TRAINED_GROUPS)


def read_curve(records: Sequence[Record]) -> dict[str, float]:
    """nDCG@5 by budget or cascade of the data set that was measured last, if it covers all trained budgets."""
    found = of_kind(records, "quality", "dataset", "artefact", "budget", "cascade")
    last = [r for r in found if (r["dataset"], r["artefact"]) == (found[-1]["dataset"], found[-1]["artefact"])]
    curve = {record["cascade"] or record["budget"]: record["ndcg_at_5"] for record in last}
    return curve if all(str(budget) in curve for budget in BUDGETS) else {}


def make_advice(records: Sequence[Record]) -> Table | None:
    """One row a device and model; arithmetic on data sheets at half of their limits, quality by the measured curve."""
    curve = read_curve(records)
    if not curve:
        return None
    rows = []
    for name in DEVICES:
        device = find_device(name)
        for model, known in KNOWN.items():
            plan = make_plan(model, known.geometry, BUDGETS, CANDIDATES)
            advice = advise(plan, device, Needs(latency_ms=LATENCY_MS), curve)
            rows.append((f"{device.title}, {model}", *_cells(advice, curve)))
    best = max(curve.values())
    note = (
        f"{CANDIDATES:,} candidates, at most {LATENCY_MS:g} ms a text query. Arithmetic: weights, vectors and operations against "
        f"{Needs().reached:.0%} of the data sheets' peak rates, memory fetches at assumed rates; not measured on these devices. "
        f"Quality is the curve measured below (best {best:.3f}); a cascade counts as its last stage, the most it can reach. "
        "For your data: metaembed-bench quality, then metaembed-plan --quality-curve."
    )
    return Table(("device, model", "serve with", "GiB", "ms", "nDCG@5", "lost"), tuple(rows), note)


def _cells(advice: Advice, curve: Mapping[str, float]) -> tuple[str, ...]:
    option = advice.chosen
    if option is None:
        return explain_nothing(advice), "", "", "", ""
    assert option.quality is not None
    lost = max(curve.values()) - option.quality
    return (
        describe_option(option),
        f"{option.device_bytes / GIB:.1f}",
        f"{option.latency_ms:.0f}",
        f"{option.quality:.3f}",
        f"{lost:.3f}",
    )
