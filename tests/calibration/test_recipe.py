"""Recipes: written, read, edited by hand, and refused in a sentence when the edit makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from metaembed.calibration.judge import Verdict
from metaembed.calibration.recipe import GroupRecipe, Recipe
from metaembed.calibration.sensitivity import search
from metaembed.calibration.smoothing import Smoothing
from metaembed.runtime.errors import UsageError
from metaembed.runtime.parity import ParityRecord, Tolerance

RECIPE = Recipe(
    type="int8",
    observer="mse",
    groups=(GroupRecipe("a", 1.5, 0.5), GroupRecipe("b", 0.25, 0.3, cost=0.125), GroupRecipe("c", 4.0, 0.2, False)),
    smoothings=(Smoothing("norm", ("a",), 0.5, (0, -1, 3)),),
    calibration={"items": 36},
)


def test_a_saved_recipe_reads_back_equal(tmp_path):
    RECIPE.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == RECIPE


def test_a_recipe_of_an_earlier_version_keeps_the_token_table_high(tmp_path):
    path = tmp_path / "recipe.json"
    replace(RECIPE, token_table=True).save(path)
    assert Recipe.load(path).token_table
    data = json.loads(path.read_text())
    del data["token_table"]
    path.write_text(json.dumps(data))
    assert not Recipe.load(path).token_table


def test_share_counts_quantised_groups():
    assert RECIPE.share == pytest.approx(0.8)
    assert RECIPE.high == ["c"]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("amax", "wide", "amax of a is 'wide'"),
        ("amax", -1, "amax of a is -1"),
        ("quantised", 1, "quantised of a is 1"),
        ("amax", True, "amax of a is True"),
        ("amax", 1e300, "amax of a is 1e"),
        ("amax", 10**400, "amax of a is 1000"),
        ("share", "x", "share of a is 'x'"),
        ("share", 7, "share of a is 7"),
        ("share", float("nan"), "share of a is nan"),
        ("name", 5, "the name 5 is no text"),
        ("name", "b", "the name 'b' is no text, or two groups have it"),
        ("twice", "no", "twice of a is 'no'"),
        ("size", 3, "size"),
        ("cost", "x", "cost of a is 'x'"),
        ("share", 0.0, "shares do not add up to 1"),
    ],
)
def test_a_nonsensical_edit_is_refused(tmp_path, key, value, sentence):
    path = tmp_path / "recipe.json"
    RECIPE.save(path)
    data = json.loads(path.read_text())
    data["groups"][0][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=sentence):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("observer", 5, "observer is 5"),
        ("token_table", "int8", "token_table is 'int8', not true or false"),
        ("calibration", [1], r"calibration is \[1\]"),
    ],
)
def test_a_nonsensical_edit_of_the_whole_is_refused(tmp_path, key, value, sentence):
    path = tmp_path / "recipe.json"
    RECIPE.quantising_twice(["a"]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=sentence):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "version": 1}'])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.json cannot be used"):
        Recipe.load(path)


def test_a_recipe_of_another_model_is_refused():
    with pytest.raises(UsageError, match="another model: d"):
        RECIPE.check_fits(["a", "b", "c", "d"])


def judge_by_loss(loss: dict[str, float], twice: float = 0.1):
    """A judge for whom each quantised group costs a known amount of cosine, a tenth of it in two steps, and costs add up."""

    def judge(recipe: Recipe) -> Verdict:
        parts = (loss[x.name] * (twice if x.twice else 1) for x in recipe.groups if x.quantised)
        total = sum(parts)
        return Verdict({"query": ParityRecord(1, 0.0, 1 - total, (0, 0), Tolerance(0.98, 0.95))}, {}, total)

    return judge


GROUPS = replace(
    RECIPE, groups=(GroupRecipe("a", 1.5, 0.6), GroupRecipe("b", 0.25, 0.2), GroupRecipe("c", 4.0, 0.2))
)  # one of b and c, and not a, may be quantised in two steps: a quarter more products


def test_everything_is_quantised_once_when_that_has_a_margin_and_nothing_else_is_tried():
    found = search(GROUPS, judge_by_loss({"a": 0.001, "b": 0.001, "c": 0.001}))
    assert (found.recipe.share, found.recipe.extra, found.trials) == (pytest.approx(1.0), 0, 1)


def test_the_costliest_group_for_its_share_is_quantised_in_two_steps():
    """By hand, against a quarter of .02: all lose .012; with b, the dearest per share, in two steps .003."""
    found = search(GROUPS, judge_by_loss({"a": 0.001, "b": 0.01, "c": 0.001}))
    assert found.recipe.twice == ["b"]
    assert found.recipe.extra == pytest.approx(0.2)
    assert found.recipe.share == pytest.approx(1.0)


def test_without_room_for_a_margin_the_tolerance_is_enough():
    found = search(GROUPS, judge_by_loss({"a": 0.01, "b": 0.001, "c": 0.001}, twice=1))
    assert found.recipe.twice == []
    assert found.recipe.share == pytest.approx(1.0)
    assert found.verdict


def test_where_two_steps_do_not_help_enough_the_costliest_are_kept_high():
    """By hand, against a loss of .02 allowed: with b in two steps .331 is lost, with b high .301, with c as well .001."""
    found = search(GROUPS, judge_by_loss({"a": 0.001, "b": 0.3, "c": 0.3}))
    assert found.recipe.high == ["b", "c"]
    assert found.verdict


def test_groups_are_kept_high_for_a_margin_while_enough_stays_quantised():
    """By hand, against a quarter of .02: no two steps help a (.01 alone); with a high .002 is lost, at a share of .4."""
    loss = judge_by_loss({"a": 0.01, "b": 0.001, "c": 0.001})
    found = search(GROUPS, loss, min_share=0.4)
    assert found.recipe.high == ["a"]
    assert search(GROUPS, loss, min_share=0.5).recipe.high == []


def test_where_keeping_groups_high_gives_no_margin_more_are_quantised_in_two_steps():
    """By hand, against a quarter of .02: all lose .015, with b in two steps .0105, with a and b .0024, 0.8 more products."""
    loss = judge_by_loss({"a": 0.009, "b": 0.005, "c": 0.001})
    found = search(GROUPS, loss, min_share=0.9)
    assert (found.recipe.twice, found.recipe.high) == (["a", "b"], [])
    assert found.recipe.extra == pytest.approx(0.8)
    assert search(GROUPS, loss, min_share=0.2).recipe.high == ["a", "b"]


def test_where_no_margin_can_be_had_as_much_is_kept_high_as_the_share_allows():
    """By hand: all lose .015 of .02; with b high .008; a quarter, .005, takes a as well, at a share of .2."""
    loss = judge_by_loss({"a": 0.007, "b": 0.007, "c": 0.001}, twice=1)
    assert search(GROUPS, loss, min_share=0.8).recipe.high == ["b"]
    assert search(GROUPS, loss, min_share=0.2).recipe.high == ["a", "b"]


def test_without_a_margin_everything_in_two_steps_is_taken_when_it_loses_least():
    """By hand: all lose .08 of .02, .0080 in two steps; with b and c high, 0.4 of the work, .06 is lost."""
    loss = judge_by_loss({"a": 0.06, "b": 0.01, "c": 0.01})
    found = search(GROUPS, loss, min_share=0.6)
    assert (found.recipe.twice, found.recipe.high) == (["a", "b", "c"], [])
    assert found.verdict.loss == pytest.approx(0.008)


@pytest.mark.parametrize("min_share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("twice", [0.1, 1])
def test_no_recipe_is_judged_a_second_time(min_share, twice):
    """A judgement encodes all held-out data. Costs are left out: they are what the first ones measure."""
    seen = []
    judge = judge_by_loss({"a": 0.06, "b": 0.01, "c": 0.01}, twice)

    def counted(recipe: Recipe) -> Verdict:
        seen.append([(group.name, group.quantised, group.twice) for group in recipe.groups])
        return judge(recipe)

    found = search(GROUPS, counted, min_share=min_share)
    once = seen[: 1 + len(GROUPS.groups)]  # everything, and each group alone
    others = seen[len(once) :]
    assert all(others.count(attempt) == 1 and attempt != once[0] for attempt in others)
    assert found.trials == len(seen)


def test_costs_are_recorded_in_the_recipe():
    found = search(GROUPS, judge_by_loss({"a": 0.001, "b": 0.5, "c": 0.002}))
    assert [group.cost for group in found.recipe.groups] == pytest.approx([0.001, 0.5, 0.002])
    assert found.recipe.high == ["b"]


def test_when_nothing_can_be_quantised_all_groups_stay_high():
    found = search(GROUPS, judge_by_loss({"a": 0.5, "b": 0.5, "c": 0.5}))
    assert found.recipe.share == 0
