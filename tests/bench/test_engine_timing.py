"""The engine benchmark's mechanics, with ONNX Runtime behind the session protocol; no time is asserted."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from metaembed.bench.cli_engine import measure_engines, measure_scorer
from metaembed.export.profiles import scorer_engine
from metaembed.runtime.devices import find_device
from metaembed.runtime.graph_maxsim import Scorer
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle, Limits
from metaembed.runtime.open_sessions import open_ort_sessions
from metaembed.runtime.session_trt import SharedStream, TrtSession

FAKE = Path(__file__).parents[1] / "runtime" / "fake_tensorrt.py"


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


def test_times_are_held_against_the_devices_limit(demo_bundle):
    """By hand, from the demo's geometry and NVIDIA's data sheet of the A100: its 16-token image and its largest candidate."""
    bundle = Bundle.open(demo_bundle, verify=False)
    small = Bundle(bundle.folder, replace(bundle.manifest, limits=Limits(16, 64)))
    sessions, a100 = open_ort_sessions(small, (VISION, LANGUAGE)), find_device("a100")
    vision, *language = list(measure_engines(small, *sessions, device=a100, batch=2, runs=1))
    geometry = bundle.manifest.geometry
    seen = geometry.vision
    linears = 2 * 2 * 64 * seen.depth * (4 * seen.hidden**2 + 3 * seen.hidden * seen.intermediate)
    assert linears / 19.5e12 * 1e3 < vision["limit_ms"] < 2 * linears / 19.5e12 * 1e3, "fp32: 19.5 TFLOPS, two images"
    (largest,) = [record for record in language if (record["side"], record["vectors"]) == ("candidate", 64)]
    text = geometry.text
    layer = 2 * text.hidden * (text.hidden + text.kv_heads * text.head_dim) + 3 * text.hidden * text.intermediate
    most, least = (2 * 2 * largest["positions"] * layers * layer for layers in (text.layers, text.layers - 1))
    assert least / 19.5e12 * 1e3 < largest["limit_ms"] < 1.3 * most / 19.5e12 * 1e3
    assert {record["limit_of"] for record in (vision, *language)} == {"a100-80gb"}


def test_scoring_is_measured_for_every_budget_and_place_and_leaves_nothing_on_the_gpu(demo_bundle):
    """On the stand-in GPU. By hand: 1 MiB of float32 vectors of 128 dims is 2,048 vectors."""
    spec = importlib.util.spec_from_file_location("fake_tensorrt", FAKE)
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    bundle, gpu = Bundle.open(demo_bundle, verify=False), fake.FakeGpu()
    profiles = scorer_engine(128, 16, queries=32, chunks={1: 900, 64: 500}).profiles
    engine = fake.FakeEngine(gpu, bundle.path(SCORER), profiles)
    with Scorer(TrtSession([engine], gpu=gpu, stream=SharedStream(gpu), label="fake")) as scorer:
        records = list(measure_scorer(bundle, scorer, device=find_device("a100"), candidate_bytes=1 << 20, runs=1))
    assert [(r["budget"], r["items"], r["queries"], r["candidates"]) for r in records] == [
        (budget, items, queries, place)
        for budget, items in (("1,1", 2048), ("2,4", 512), ("4,8", 256), ("8,16", 128), ("16,64", 32))
        for queries, place in ((1, "device"), (1, "host"), (1, "cpu"), (32, "device"))
    ]
    assert all(record["gb_s"] > 0 for record in records)
    # At (1,1), 1 MiB at 2,039 GB/s; its 524,288 operations at 19.5 TFLOPS take less.
    assert records[0]["limit_ms"] == pytest.approx(1e3 * 2**20 / 2039e9, abs=1e-4)
    assert ["limit_ms" in record for record in records] == [record["candidates"] == "device" for record in records]
    assert gpu.memory == {}


def test_on_a_machine_without_a_gpu_the_command_says_what_it_would_need(demo_bundle, capsys, monkeypatch):
    from metaembed.bench import cli_engine
    from metaembed.bench.cli import main

    monkeypatch.setattr(
        cli_engine,
        "open_sessions",
        lambda bundle, graphs, **options: open_ort_sessions(bundle, graphs, available=[], **options),
    )
    assert main(["engine", str(demo_bundle)]) == 1
    assert "nothing runs on a GPU here (ONNX Runtime" in capsys.readouterr().err
    assert main(["engine", str(demo_bundle), "--runs", "0"]) == 2


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (
            "engine",
            {"graph": "language.onnx", "side": "query", "vectors": 8, "positions": 40, "p50_ms": 2.0, "p99_ms": 3.0}
            | {"limit_ms": 0.5, "limit_of": "h200"},
            "query, 8 vectors, 40 positions 2.000 ms p99 3.000 25% of h200's limit",
        ),
        (
            "engine",
            {"graph": VISION, "image_tokens": 64, "p50_ms": 2.0, "p99_ms": 3.0},
            "image of 64 tokens 2.000 ms p99 3.000",
        ),
        (
            "scoring_gpu",
            {
                "budget": "1,1",
                "queries": 32,
                "items": 2048,
                "candidates": "host",
                "p50_ms": 2.0,
                "p95_ms": 3.0,
                "gb_s": 9.5,
            },
            "score 1,1, 32 queries, 2,048 candidates: host 2.000 ms p95 3.000 9.5 GB/s",
        ),
    ],
)
def test_a_measurement_is_a_line_for_people(kind, values, line):
    from metaembed.bench.cli_engine import describe

    assert " ".join(describe(kind, values).split()) == line
