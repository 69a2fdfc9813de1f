"""What the records say of the targets. Expected: counted by hand."""

from __future__ import annotations

from metaembed.bench.scoring_contestants import NUMKONG, ORT, OURS, TORCH, TORCH_BF16
from metaembed.bench.scoring_targets import MISSED, TARGETS, Target, make_targets, times_best_rival


def _contest(kernels, ours, **others):
    timings = {name: {"median_ms": value} for name, value in ({OURS: ours} | others).items()}
    return {"kind": "scoring_contest", "dim": 3584, "budget": "1,1", "queries": 1, "share_of_limit": 0.8495,
            "share_of_multiply_adds": 0.2, "share_of_sgemm": 0.1, "timings": timings, "machine": {"kernels": kernels}}  # fmt: skip


def test_the_best_rival_is_one_that_the_targets_name():
    record = _contest("AVX2", 10.0, **{NUMKONG: 16.0, ORT: 15.0, TORCH: 30.0, TORCH_BF16: 11.0})
    assert times_best_rival(record) == 1.5


def test_a_miss_is_marked_and_what_is_met_is_not():
    least = Target("a", "kind", {}, lambda r: r["a"], least=0.85, form="{:.0%}")
    most = Target("b", "kind", {}, lambda r: r["a"], most=16, form="{:.1f}")
    assert (least.goal(), most.goal()) == (">= 85%", "<= 16.0")
    assert [least.judge({"a": value}) for value in (0.85, 0.849)] == ["85%", MISSED + "85%"]
    assert [most.judge({"a": value}) for value in (16, 16.04)] == ["16.0", MISSED + "16.0"]
    assert least.judge(None) == ""


def test_each_processor_has_its_column_and_its_latest_record():
    records = [
        _contest("AVX2", 10.0, **{NUMKONG: 11.0}),
        _contest("AVX-512", 10.0, **{NUMKONG: 13.0}),
        _contest("AVX2", 10.0, **{NUMKONG: 20.0}),
    ]
    table = make_targets(records)
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.head[2:] == ("AVX-512", "AVX2")
    assert rows["3584, 1,1: best rival's time over ours"] == (">= 1.40x", MISSED + "1.30x", "2.00x")
    assert rows["3584, 1,1: of the limit"] == (">= 85.0%", MISSED + "85.0%", MISSED + "85.0%")
    assert rows["3584, 2,4: of the limit"][1:] == ("", "")
    assert len(table.rows) == len(TARGETS)


def test_without_records_there_is_no_table():
    assert make_targets([]) is None
