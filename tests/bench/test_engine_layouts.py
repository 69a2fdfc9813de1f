"""What engine layouts cost, from real builds of the demo; no time is asserted."""

from __future__ import annotations

from collections import Counter

import pytest

from metaembed.bench.engine_layouts import Cost, measure_layouts, summarise
from metaembed.bench.report_tables import TABLES, to_markdown
from metaembed.export.profiles import EngineSpec
from metaembed.runtime.budget import Budget
from metaembed.runtime.devices import find_device
from metaembed.runtime.manifest import Bundle


def cost(name: str, size: int) -> Cost:
    return Cost(name, 1, size, 2.0, 1.0, size * 3, None, 1, size + 1, size * 4)


def spec(name: str) -> EngineSpec:
    return EngineSpec(name, "language.onnx", ())


def test_engines_that_were_not_built_count_as_the_mean_of_those_that_were():
    """By hand: vision 100, two language engines of 10 and 30, two more at their mean of 20: 180 bytes."""
    wanted = [spec(name) for name in ("vision", "query-1", "query-2", "candidate-1", "candidate-4")]
    totals = summarise(wanted, [cost("vision", 100), cost("query-1", 10), cost("candidate-4", 30)])
    assert (totals["engines"], totals["engines_built"], totals["bytes"]) == (5, 3, 180)
    assert (totals["seconds"], totals["cpu_seconds"]) == (10.0, 5.0)
    assert (totals["estimated_bytes"], totals["peak_memory_bytes"], totals["estimated_peak_bytes"]) == (185, 300, 400)


@pytest.fixture(scope="module")
def measured(demo_bundle):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'metaembed-export[tensorrt-rtx]'")
    layouts = ("shared", "separate")
    return list(measure_layouts(Bundle.open(demo_bundle), find_device("a100"), layouts, [Budget(8, 16)]))


def test_each_engine_is_built_once_and_each_layout_summed(measured):
    names = Counter(values["name"] for kind, values in measured if kind == "engine_build")
    assert {"vision", "language", "query-8", "candidate-16"} <= set(names)
    assert set(names.values()) == {1}
    shared, separate = (values for kind, values in measured if kind == "engine_layout")
    assert separate["engines"] - separate["engines_built"] == 10 - 2
    assert separate["bytes"] > 3 * shared["bytes"] / 2
    # Independent source: the sizes of fp32 parameters, 2.2 million of them (the demo's card).
    assert 8e6 < shared["weight_bytes"] < shared["bytes"]


def test_the_table_says_which_totals_are_computed(measured):
    records = [{"kind": kind, "machine": {"cpu": "c", "cores": 2}, **values} for kind, values in measured]
    text = to_markdown(TABLES["engine_layouts"].make(records))
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert "computed" in rows[1]
    assert "computed" not in rows[0]


def test_a_layout_is_its_language_engines_whatever_was_built_beside_them():
    """By hand: one of 10 bytes, one of 12, and four of which two were built, of 8 and 10: 36. The scorer came later."""
    common = {"model": "m", "precision": "bf16", "target": "t", "budgets": ["1,1", "8,16"], "builder": "b 1"}

    def layout(name: str, engines: int, built: int) -> dict:
        return {"kind": "engine_layout", "layout": name, "engines": engines, "engines_built": built, **common}

    def build(layout: str, name: str, size: int) -> dict:
        more = {"profiles": 1, "cpu_seconds": 1, "peak_memory_bytes": 1, "estimated_peak_bytes": 1, "weight_bytes": 8}
        return {"kind": "engine_build", "layout": layout, "name": name, "bytes": size * 10**9, **common, **more}

    records = [
        build("shared", "vision", 3),
        build("shared", "language", 10),
        layout("shared", 2, 2),
        build("profile-per-budget", "vision", 3),
        build("profile-per-budget", "language", 12),
        build("profile-per-budget", "scorer", 1),
        layout("profile-per-budget", 3, 3),
        build("separate", "query-1", 8),
        build("separate", "candidate-16", 10),
        layout("separate", 6, 4),
    ]
    table = TABLES["engine_layouts"].make(records)
    assert [(row[1].split(" ")[0], row[3]) for row in table.rows] == [("1", "10.000"), ("1", "12.000"), ("4", "36.000")]
