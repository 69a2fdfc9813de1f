"""Advice against arithmetic by hand: 3B, a million candidates, AGX Orin 64 GB (204.8 GB/s)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from metaembed.runtime.advise import Needs, advise
from metaembed.runtime.advise_report import describe_advice
from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.cli_plan import main
from metaembed.runtime.devices import find_device
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.plan import make_plan
from metaembed.runtime.quality_curve import QualityCurve, curve_of, read_curve

BUDGETS = [Budget(*group) for group in TRAINED_GROUPS]
VALUES = {"1,1": 0.55, "2,4": 0.66, "4,8": 0.75, "8,16": 0.82, "16,64": 0.87}
CURVE = QualityCurve(VALUES, 2000)


@pytest.fixture(scope="module")
def plan():
    return make_plan("3b", KNOWN["3b"].geometry, BUDGETS, 1_000_000)


@pytest.fixture(scope="module")
def orin():
    return find_device("orin-64gb")


def test_a_million_pages_on_an_orin_are_served_by_a_cascade_from_disk(plan, orin):
    """By hand: a bf16 first stage of one vector reads 4.096 GB, 20 ms, at half the rate 40; the 1,000 survivors are 64 vectors
    of 4,096 bytes each, 262 MB, 87.4 ms at 3 GB/s, and read again in 1.28 ms, 2.56 at half."""
    advice = advise(plan, orin, Needs(latency_ms=200), CURVE)
    chosen = advice.chosen
    assert (chosen.cascade, chosen.placement, chosen.model_type) == ("1,1:1000 16,64", "disk", "bf16")
    assert chosen.quality == VALUES["16,64"]
    assert chosen.index_bytes == 1_000_000 * 4096
    assert chosen.elsewhere_bytes == 1_000_000 * 64 * 4096
    assert chosen.fetch_ms == pytest.approx(87.4, abs=0.1)
    assert chosen.score_ms == pytest.approx(2 * (20.0 + 1.28), abs=0.1)
    assert chosen.latency_ms == pytest.approx(chosen.encode_ms + chosen.score_ms + chosen.fetch_ms)


def test_everything_chosen_keeps_the_limits(plan):
    for device in ("orin-nano-8gb", "orin-64gb", "thor", "a100", "t4", "h100"):
        for latency, memory in ((5, None), (50, 8), (200, 20), (None, 40)):
            advice = advise(plan, find_device(device), Needs(latency, memory), CURVE)
            for option in [*advice.runners_up, *([advice.chosen] if advice.chosen else [])]:
                assert latency is None or option.latency_ms <= latency
                assert option.device_bytes <= advice.memory_bytes <= (memory or 1000) * 2**30


def test_without_limits_the_best_budget_is_searched_exhaustively():
    """By hand: 1,000 candidates of 64 vectors are 0.26 GB."""
    small = make_plan("3b", KNOWN["3b"].geometry, BUDGETS, 1_000)
    advice = advise(small, find_device("a100"), Needs(), CURVE)
    assert (advice.chosen.cascade, advice.chosen.index_type, advice.chosen.placement) == ("16,64", "bf16", "device")


def test_a_measured_cascade_counts_for_what_it_measured(plan, orin):
    """Where the curve knows that the small first stage loses too much, the next budget is taken."""
    curve = QualityCurve(VALUES | {"1,1:1000 16,64": 0.6, "2,4:1000 16,64": 0.6, "4,8:1000 16,64": 0.6})
    assert advise(plan, orin, Needs(latency_ms=200), curve).chosen.budget == Budget(8, 16)


@pytest.mark.parametrize(("over", "least"), [(2000, 0.55), (1_000_000, 0.86), (0, 0.55)])
def test_a_cascade_promises_no_more_than_its_curve_can_know(plan, orin, over, least):
    """By hand: 1,000 survivors of 2,000 say little of 1,000 of a million; at worst the first stage, 0.55, decides alone."""
    cascades = {"1,1:1000 16,64": 0.86, "2,4:1000 16,64": 0.6, "4,8:1000 16,64": 0.6}
    curve = QualityCurve(VALUES | cascades, over)
    chosen = advise(plan, orin, Needs(latency_ms=200), curve).chosen
    assert (chosen.cascade, chosen.quality, chosen.quality_least) == ("1,1:1000 16,64", 0.86, least)


def test_the_curve_is_of_what_was_measured_last():
    """By hand: a file to which a second bundle's records were added; the two are not mixed."""
    records = [
        {"kind": "quality", "artefact": name, "dataset": "pages", "budget": budget, "cascade": None, "candidates": 7,
         "ndcg_at_5": value}
        for name, budget, value in (("fp32", "1,1", 0.5), ("fp32", "16,64", 0.9), ("int8", "1,1", 0.4))
    ]  # fmt: skip
    assert curve_of(records) == QualityCurve({"1,1": 0.4}, 7, "int8 on pages")
    assert curve_of([]) == QualityCurve({})


def test_a_curve_that_falls_makes_the_smaller_budget_win(plan):
    curve = QualityCurve(VALUES | {"4,8": 0.99})
    assert advise(plan, find_device("h100"), Needs(), curve).chosen.budget == Budget(4, 8)


def test_nothing_fits_and_the_sentence_says_what_lacks(plan, orin):
    slow = advise(plan, orin, Needs(latency_ms=1), CURVE)
    assert slow.chosen is None
    assert "ms too long" in describe_advice(plan, slow, CURVE)
    tight = advise(plan, orin, Needs(memory_gib=1), CURVE)
    assert tight.chosen is None
    assert "GiB too much" in describe_advice(plan, tight, CURVE)


def test_a_curve_needs_every_budget_of_the_plan(plan, orin):
    with pytest.raises(UsageError, match="16,64"):
        advise(plan, orin, Needs(), QualityCurve({key: value for key, value in VALUES.items() if key != "16,64"}))


@pytest.mark.parametrize(
    "needs", [{"latency_ms": 0}, {"memory_gib": -1}, {"reached": 0}, {"reached": 1.5}, {"survivors": 0}]
)
def test_senseless_needs_are_usage_errors(needs):
    with pytest.raises(UsageError):
        Needs(**needs)


def test_the_command_reads_the_curve_and_shows_its_arithmetic(tmp_path, capsys):
    path = tmp_path / "quality.jsonl"
    lines = [
        {"kind": "quality", "budget": budget, "cascade": None, "ndcg_at_5": value} for budget, value in VALUES.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(path).values == VALUES
    command = ["--model", "3b", "--candidates", "1e6", "--device", "orin-64gb", "--latency-ms", "200"]
    assert main([*command, "--quality-curve", str(path)]) == 0
    said = capsys.readouterr().out
    assert "use cascade 1,1:1000 16,64" in said
    assert "nDCG@5 0.550 to 0.870" in said
    assert main(["--model", "3b", "--latency-ms", "200"]) == 2
    assert main([*command[:6], "--survivors", "10"]) == 2
    assert "belong to advice" in capsys.readouterr().err


def test_advice_as_json_says_what_lacks_where_nothing_fits(capsys):
    """By hand: one vector of a million candidates in int8 is 2.056 GB with its scales, 20 ms at half of 204.8 GB/s."""
    command = ["--model", "3b", "--candidates", "1e6", "--device", "orin-64gb", "--json", "--latency-ms"]
    assert main([*command, "500"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "agx-orin-64gb"
    assert found["chosen"]["latency_ms"] <= 500
    assert all(option["latency_ms"] <= 500 for option in found["runners_up"])
    assert main([*command, "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["chosen"], found["runners_up"]) == (None, [])
    assert found["fastest"]["budget"] == "1,1"
    assert found["fastest"]["score_ms"] == pytest.approx(20.0, rel=0.05)
    assert found["smallest"]["device_bytes"] <= found["fastest"]["device_bytes"]


def test_a_damaged_curve_is_named(tmp_path):
    with pytest.raises(UsageError, match="is a folder, not a file"):
        read_curve(tmp_path)
    path = tmp_path / "quality.jsonl"
    path.write_text('{"kind": "quality"}\n')
    with pytest.raises(BundleError, match="line 1"):
        read_curve(path)
    for value in ("NaN", "Infinity", "true", "97", "-0.1", "null", "[" * 100_000):
        path.write_text(f'{{"kind": "quality", "budget": "1,1", "cascade": null, "ndcg_at_5": {value}}}\n')
        with pytest.raises(BundleError, match="line 1"):
            read_curve(path)
    path.write_text('{"kind": "scoring"}\n')
    with pytest.raises(UsageError, match="no quality records"):
        read_curve(path)


def test_a_first_stage_takes_no_more_query_vectors_than_the_model_has(orin):
    """Of a model with two query vectors every advised cascade can be run: by hand, none may start with 4,8."""
    geometry = replace(KNOWN["3b"].geometry, query_tokens=2)
    budgets = [Budget(1, 1), Budget(2, 4), Budget(2, 64)]
    curve = {str(budget): 0.5 + budget.candidate / 1000 for budget in budgets}
    small = make_plan("3b", geometry, budgets, 1_000_000)
    advice = advise(small, orin, Needs(latency_ms=10_000), QualityCurve(curve))
    assert advice.chosen.quality == curve["2,64"]
    assert all(int(stage.split(",")[0]) <= 2 for stage in advice.chosen.cascade.split())
    assert "4,8" not in describe_advice(small, advice, QualityCurve(curve))
