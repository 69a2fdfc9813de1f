"""The contestants of the encoder race do the same work, and one that cannot run is named, not dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metaembed.bench.cli import main
from metaembed.bench.contestants import build_bundle
from metaembed.bench.contestants_torch import build_hf
from metaembed.bench.encoder import Case, Contestant, race

CASES = (
    Case("text", "query", words=6, image_tokens=0, vectors=3),
    Case("texts", "query", words=4, image_tokens=0, vectors=16, batch=2),
    Case("image", "candidate", words=0, image_tokens=16, vectors=5),
)


@pytest.fixture(scope="module")
def ours(demo_bundle):
    return build_bundle(demo_bundle, threads=1)


@pytest.mark.parametrize("options", [{}, {"all_rows": True}], ids=["rows that count", "all 80 rows"])
def test_contestants_agree_on_every_kind_of_input(ours, demo_bundle, demo_folder, options):
    """Expected: Hugging Face's model. With all 80 rows, as released, and with those that count, alike."""
    theirs = build_hf(demo_folder, demo_bundle, 1, **options)
    for case in CASES:
        found, wanted = ours(case)(), theirs(case)()
        assert found.shape == (case.batch, case.vectors, 128)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_contestant_that_cannot_start_is_recorded_with_the_reason(demo_bundle, tmp_path):
    contestants = [
        Contestant("bundle", build_bundle, {"folder": demo_bundle, "threads": 1}),
        Contestant("nothing", build_bundle, {"folder": tmp_path, "threads": 1}),
    ]
    [(failed, ran)] = race(contestants, CASES[:1], rounds=2, warmup=0, note=lambda text: None)
    assert (failed["contestant"], ran["contestant"]) == ("nothing", "bundle")
    assert "holds no bundle" in failed["error"]
    assert (ran["count"], ran["max_abs_difference"]) == (2, 0.0)
    assert ran["peak_rss_mib"] > 30
    assert 0 < ran["min_ms"] <= ran["median_ms"] <= ran["p95_ms"]


def test_a_race_that_nobody_could_run_fails(demo_bundle, capsys):
    """There is no GPU here, or the names are unknown: neither passes for a measurement."""
    assert main(["encoder", str(demo_bundle), "--skip", "nosuch"]) == 2
    assert "no contestant is called 'nosuch'; there are bundle fp32, HF eager" in capsys.readouterr().err
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    skipped = [f"--skip={name}" for name in ("bundle fp32, CUDA graphs", "HF SDPA, 80 rows", "torch.compile")]
    command = ["encoder", str(demo_bundle), "--gpu", "--only", "short text query", "--rounds", "1", *skipped]
    assert main(command) == 1
    found = capsys.readouterr()
    assert "no contestant could run" in found.err
    assert "MetaEmbedError" not in found.out
