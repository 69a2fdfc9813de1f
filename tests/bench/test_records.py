"""Records on disk: what is written comes back, and damage is named."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from metaembed.bench.cli import main
from metaembed.bench.records import ORIGIN, append_records, by_kernels, latest, make_record, read_records
from metaembed.bench.report import write_report
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.manifest import Bundle

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_records_come_back_with_their_origin(tmp_path):
    record = make_record("scoring", {"median_ms": 1.5})
    append_records(tmp_path / "new" / "a.jsonl", [record])
    append_records(tmp_path / "new" / "a.jsonl", [record])
    assert read_records([tmp_path / "new"]) == [record, record]
    assert record.keys() >= {"kind", "median_ms", *ORIGIN}
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["numpy"]


def test_a_bundle_is_identified_by_its_fingerprint(demo_bundle):
    record = make_record("quality", {}, demo_bundle)
    assert record["sha256"] == Bundle.open(demo_bundle).manifest.fingerprint
    assert record["artefact"] == "demo bundle, fp32"


def test_of_measurements_taken_twice_the_last_counts():
    records = [{"kind": "x", "a": 1, "v": 1}, {"kind": "x", "a": 2, "v": 2}, {"kind": "x", "a": 1, "v": 3}]
    assert [record["v"] for record in latest(records, "kind", "a")] == [3, 2]


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": 3}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "x"}\n' + line + "\n")
    with pytest.raises(BundleError, match="line 2"):
        read_records([path])


def test_a_folder_without_records_is_a_usage_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(UsageError):
            read_records([path])


def test_another_sort_of_processor_replaces_no_record():
    def taken(kernels, ms):
        return {"kind": "scoring", "budget": "1,1", "ms": ms, "machine": {"kernels": kernels}}

    records = [taken("NEON", 3), taken("AVX2", 2), taken("NEON", 1)]
    found = [(record["kernels"], record["ms"]) for record in by_kernels(records, "scoring", "budget")]
    assert found == [("AVX2", 2), ("NEON", 1)]


def test_a_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        append_records(tmp_path / "a.jsonl", [{"kind": "x", "v": float("nan")}])


def test_a_record_without_a_kind_has_the_name_of_its_file(tmp_path):
    (tmp_path / "training.jsonl").write_text('{"step": 1}\n')
    assert read_records([tmp_path]) == [{"kind": "training", "step": 1}]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("/home/ann/out", "out"),
        ("--work=/mnt/big/x.y", "--work=x.y"),
        ("mmr=/a/b/final", "mmr=final"),
        ("bench/results/a.jsonl", "bench/results/a.jsonl"),
        ("1,1:100", "1,1:100"),
        ("/", "/"),
    ],
)
def test_a_record_names_no_folder_of_the_machine(monkeypatch, typed, kept):
    monkeypatch.setattr("sys.argv", ["/usr/bin/metaembed-bench", "quality", typed])
    assert make_record("x", {})["command"] == f"metaembed-bench quality {kept}"


def test_a_record_holds_a_command_that_a_shell_takes(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/site/metaembed/bench/cli.py", "encoder", "--skip", "HF eager, 80 rows"]
    )  # python -m
    found = shlex.split(make_record("x", {})["command"])
    assert found == ["metaembed-bench", "encoder", "--skip", "HF eager, 80 rows"]


@pytest.mark.parametrize(
    "kind",
    "calibration cascade claim_point encoder encoder_cost encoder_gpu engine engine_layout export parity quality scoring "
    "scoring_contest scoring_cost scoring_gpu scoring_scaling sensitivity verdict".split(),
)
def test_a_record_that_lacks_fields_is_named(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text(json.dumps({"kind": kind}) + "\n")
    with pytest.raises(BundleError, match=f"of kind '{kind}' lacks '"):
        write_report(read_records([tmp_path]), tmp_path / "report")


@pytest.mark.parametrize(
    "fault", [{"ndcg_at_5": "0.5"}, {"ndcg_at_5": None}, {"machine": None, "index_kib_per_item": "a"}]
)
def test_a_record_of_strange_values_is_one_sentence(tmp_path, fault, capsys):
    shutil.copy(RESULTS / "quality.jsonl", tmp_path / "quality.jsonl")
    lines = (tmp_path / "quality.jsonl").read_text().splitlines()
    (tmp_path / "quality.jsonl").write_text("\n".join(json.dumps({**json.loads(line), **fault}) for line in lines))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report")]) == 1
    assert "no measurement writes" in capsys.readouterr().err
