"""The engine benchmark's mechanics, with ONNX Runtime behind the session protocol; no time is asserted."""

from dataclasses import replace

from metaembed.bench.cli_engine import measure_engines, time_runs
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle, Limits
from metaembed.runtime.open_sessions import open_ort_sessions


def test_each_side_and_size_is_measured_once(demo_bundle):
    bundle = Bundle.open(demo_bundle, verify=False)
    small = Bundle(bundle.folder, replace(bundle.manifest, limits=Limits(16, 64)))
    records = list(measure_engines(small, *open_ort_sessions(small, (VISION, LANGUAGE)), runs=1))
    assert records[0]["graph"] == VISION
    assert records[0]["image_tokens"] == 16
    sizes = [(record["side"], record["vectors"], record["positions"]) for record in records[1:]]
    # By hand: a query is 32 + r, a candidate 16 image tokens + 32 + 16 + r.
    assert sizes == [
        *[("candidate", r, 64 + r) for r in (1, 4, 8, 16, 64)],
        *[("query", r, 32 + r) for r in (1, 2, 4, 8, 16)],
    ]
    assert all(0 < record["p50_ms"] <= record["p99_ms"] for record in records)


def test_percentiles_come_from_runs_after_the_warm_up():
    calls = []
    times = time_runs(lambda: calls.append(None), runs=7)
    assert len(calls) == 5 + 7
    assert set(times) == {"p50_ms", "p90_ms", "p99_ms"}
