"""Budgets as users write them."""

import numpy as np
import pytest

from metaembed.runtime.budget import TRAINED_GROUPS, Budget, parse_budgets
from metaembed.runtime.errors import UsageError


@pytest.mark.parametrize("text", ["8,16", " 8 , 16 ", "08,16"])
def test_a_budget_is_two_numbers(text: str):
    assert Budget.parse(text) == Budget(query=8, candidate=16)
    assert str(Budget.parse(text)) == "8,16"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "8,",
        ",16",
        "8,16,32",
        "8;16",
        "8.0,16",
        "-1,4",
        "+1,4",
        "a,b",
        "1e1,4",
        "all,1",
        "9" * 99 + ",1",
        "٨,١٦",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str):
    with pytest.raises(UsageError, match="8,16"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0,4", "4,0", "0,0"])
def test_each_side_needs_a_vector(text: str):
    with pytest.raises(UsageError, match="at least one vector"):
        Budget.parse(text)


@pytest.mark.parametrize("side", [1.5, 2.0, "1", True, None, np.float32(1), [1]])
def test_sides_are_whole_numbers(side: object):
    for sides in ((side, 1), (1, side)):
        with pytest.raises(UsageError, match=r"not two whole numbers, for example Budget\(8, 16\)"):
            Budget(*sides)  # type: ignore[arg-type]
    assert Budget(np.int64(2), np.uint8(3)) == Budget(2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "side", "has"), [("17,64", "query", 16), ("16,65", "candidate", 64)])
def test_more_than_the_model_has_is_refused(text: str, side: str, has: int):
    with pytest.raises(UsageError, match=f"{side} Meta Tokens; this model has {has}"):
        parse_budgets([text], 16, 64)


def test_all_stands_for_the_trained_groups():
    """arXiv 2509.18095: (1,1), (2,4), (4,8), (8,16), (16,64)."""
    assert [str(budget) for budget in parse_budgets(["all"], 16, 64)] == ["1,1", "2,4", "4,8", "8,16", "16,64"]
    assert TRAINED_GROUPS[-1] == (16, 64)


def test_all_includes_the_largest_of_a_smaller_model():
    assert [str(budget) for budget in parse_budgets([" All"], 4, 9)] == ["1,1", "2,4", "4,8", "4,9"]


def test_budgets_are_sorted_and_distinct():
    assert [str(budget) for budget in parse_budgets(["8,16", "2,4", "8,16", "all"], 8, 16)] == [
        "1,1",
        "2,4",
        "4,8",
        "8,16",
    ]


def test_no_budget_is_refused():
    with pytest.raises(UsageError, match="no budget"):
        parse_budgets([], 16, 64)
