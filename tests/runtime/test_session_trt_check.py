"""The check on engines that were cut to less than their bundle: what it replays, and what it names.

On the stand-in GPU (fake_tensorrt.py); the references are Hugging Face's.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import KINDS, replay
from metaembed.runtime.golden import SIDES, golden_path, read_golden
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.parity import TOLERANCES

spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def two_budgets(bundle):
    return Bundle(bundle.folder, replace(bundle.manifest, budgets=(Budget(1, 1), Budget(8, 16))))


@pytest.fixture(scope="module")
def goldens(bundle):
    """Four of each kind of input, the smallest images; Hugging Face's embeddings."""

    def area(item):
        return item.image.width * item.image.height if item.image else 0

    chosen = {}
    for side in SIDES:
        items, embeddings = read_golden(bundle.path(golden_path(side)))
        places = [
            place
            for kind in KINDS
            for place in sorted((p for p, item in enumerate(items) if item.kind == kind), key=lambda p: area(items[p]))[
                :4
            ]
        ]
        chosen[side] = ([items[place] for place in places], embeddings[places])
    return chosen


@pytest.mark.parametrize(
    ("budgets", "options", "left_out"),
    [
        (None, {}, []),
        ([Budget(8, 16)], {}, [("candidate", 1), ("query", 1)]),
        # A candidate at r = 1 fits a query's profile, which spans 1 to 8 rows; a query at r = 1 fits a candidate's engine.
        (None, {"side": "query"}, [("candidate", 16)]),
        (None, {"side": "candidate", "layout": "separate"}, [("query", 8)]),
    ],
    ids=str,
)
def test_the_check_replays_what_the_engines_were_cut_to_and_names_the_rest(
    two_budgets, goldens, budgets, options, left_out
):
    rig = fake.Rig(two_budgets, budgets, **options)
    check = replay(rig.encoder(two_budgets), goldens, TOLERANCES["fp32"], "fp32")
    assert check, check.failures()
    assert list(check.not_replayed) == left_out
    everything = {("query", 1), ("query", 8), ("candidate", 1), ("candidate", 16)}
    assert {(side, r) for side, r, _ in check.vectors} == everything - set(left_out)
    assert set(check.rankings) == ({Budget(8, 16)} if budgets else set(two_budgets.manifest.budgets))


def test_engines_that_cover_no_budget_fail_the_check(two_budgets, goldens):
    rig = fake.Rig(two_budgets, [Budget(2, 4)])
    check = replay(rig.encoder(two_budgets), goldens, TOLERANCES["fp32"], "fp32")
    assert not check
    assert check.failures() == ["nothing was compared"]


def test_a_wrong_answer_of_the_side_that_is_there_still_fails(two_budgets, goldens):
    items, embeddings = goldens["query"]
    one_budget = Bundle(two_budgets.folder, replace(two_budgets.manifest, budgets=(Budget(1, 1),)))
    rig = fake.Rig(one_budget, side="query")
    wrong = {**goldens, "query": (items, -embeddings)}
    assert not replay(rig.encoder(one_budget), wrong, TOLERANCES["fp32"], "fp32")
