"""The replay of golden vectors: what it compares, and that it fails closed on anything missing or wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import KINDS, Check, check_bundle, replay
from metaembed.runtime.cli_check import main
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import BundleError, ParityError
from metaembed.runtime.golden import SIDES, golden_path, read_golden, write_golden
from metaembed.runtime.parity import TOLERANCES

EXACT = TOLERANCES["fp32"]
Goldens = dict[str, tuple[list, np.ndarray]]


class Replayed:
    """Stands for an encoder and returns the reference itself, so that only the replay is under test."""

    budgets = (Budget(1, 1), Budget(8, 16))
    description = "a recording"

    def __init__(self, goldens: Goldens) -> None:
        self.recorded = {side: reference.copy() for side, (_, reference) in goldens.items()}

    def encode_queries(self, texts: list, *, images: list, budget: int) -> np.ndarray:
        return self.recorded["query"][: len(texts), :budget]

    def encode_candidates(self, texts: list, *, images: list, budget: int) -> np.ndarray:
        return self.recorded["candidate"][: len(texts), :budget]


@pytest.fixture
def goldens(demo_bundle: Path) -> Goldens:
    return {side: read_golden(demo_bundle / golden_path(side)) for side in SIDES}


@pytest.fixture
def recording(goldens: Goldens) -> Replayed:
    return Replayed(goldens)


def test_every_budget_side_and_kind_is_compared(recording: Replayed, goldens: Goldens):
    check = replay(recording, goldens, EXACT, "fp32")
    assert check
    expected = {
        (side, r, kind) for side, sizes in (("query", (1, 8)), ("candidate", (1, 16))) for r in sizes for kind in KINDS
    }
    assert set(check.vectors) == expected
    assert set(check.rankings) == {Budget(1, 1), Budget(8, 16)}
    for (side, r, kind), record in check.vectors.items():
        assert record.vectors == r * sum(item.kind == kind for item in goldens[side][0]) > 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("item", [0, -1])
def test_one_wrong_vector_fails_and_is_named(recording: Replayed, goldens: Goldens, side: str, item: int):
    recording.recorded[side][item, 0] *= -1
    check = replay(recording, goldens, EXACT, "fp32")
    assert not check
    with pytest.raises(ParityError, match=f"{side} r=1, .*vector 0"):
        check.require()
    assert "FAILED" in check.table()
    assert json.loads(json.dumps(check.to_json()))["passed"] is False


def test_a_nan_fails(recording: Replayed, goldens: Goldens):
    recording.recorded["candidate"][3, 2, 1] = np.nan
    assert not replay(recording, goldens, TOLERANCES["int8"], "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_input_without_goldens_fails(recording: Replayed, goldens: Goldens, kind: str):
    for side, (items, reference) in goldens.items():
        kept = [place for place, item in enumerate(items) if item.kind != kind]
        goldens[side] = ([items[place] for place in kept], reference[kept])
        recording.recorded[side] = reference[kept]
    check = replay(recording, goldens, EXACT, "fp32")
    assert not check
    assert any(kind in line and "nothing" in line for line in check.failures())


def test_an_empty_check_fails():
    check = Check("nowhere", "fp32")
    assert not check
    with pytest.raises(ParityError, match="nothing was compared"):
        check.require()


def test_half_a_check_fails(recording: Replayed, goldens: Goldens):
    whole = replay(recording, goldens, EXACT, "fp32")
    assert not Check("here", "fp32", vectors=whole.vectors)
    assert not Check("here", "fp32", rankings=whole.rankings)


def test_what_was_not_replayed_is_said_wherever_the_verdict_is(
    recording: Replayed, goldens: Goldens, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    check = dataclasses.replace(replay(recording, goldens, EXACT, "fp32"), not_replayed=(("candidate", 64),))
    monkeypatch.setattr(Encoder, "open", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr("metaembed.runtime.check.check_bundle", lambda encoder, progress: check)
    assert main(["out"]) == 0
    table, _, verdict = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "candidate   64  not replayed" in table
    assert verdict.endswith("on a recording; not replayed, for lack of a profile: candidate r=64")
    assert main(["out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_replayed"] == [{"side": "candidate", "r": 64}]


def test_goldens_cover_the_sizes_that_the_contract_asks_for(goldens: Goldens):
    """Issue 2, part F: at least 12 sizes, with 28 x 28, strips, tall, wide and the largest (1024 tokens: 896 x 896)."""
    for items, _ in goldens.values():
        sizes = {item.image.size for item in items if item.kind == "image"}
        assert len(sizes) >= 12
        assert {(28, 28), (28, 924), (924, 28), (896, 896)} <= sizes


@pytest.fixture
def opened(bundle: Path) -> Iterator[Callable[[], Encoder]]:
    encoders = []

    def open_bundle() -> Encoder:
        encoders.append(Encoder.open(bundle))
        return encoders[-1]

    yield open_bundle
    for encoder in encoders:
        encoder.close()


@pytest.mark.parametrize("cut", ["items", "vectors", "dims"])
def test_goldens_too_small_to_judge_are_damage(
    replace_file: Callable[[str, bytes], Path],
    opened: Callable[[], Encoder],
    goldens: Goldens,
    tmp_path: Path,
    cut: str,
):
    """A forger's golden file with fewer items, vectors or dims: valid hashes, nothing to compare with."""
    items, reference = goldens["candidate"]
    count, vectors, dims = {"items": (10, 64, 128), "vectors": (12, 63, 128), "dims": (12, 64, 127)}[cut]
    write_golden(tmp_path / "golden.safetensors", items[:count], reference[:count, :vectors, :dims])
    replace_file(golden_path("candidate"), (tmp_path / "golden.safetensors").read_bytes())
    with pytest.raises(BundleError, match="at least"):
        check_bundle(opened())


def test_a_bundle_exported_without_parity_says_so(bundle: Path, edit_manifest, opened: Callable[[], Encoder]):
    edit_manifest(lambda data: (data.update(parity="unverified"), [data["files"].pop(golden_path(s)) for s in SIDES]))
    encoder = opened()
    assert "unverified" in encoder.description
    with pytest.raises(BundleError, match="without parity"):
        check_bundle(encoder)
