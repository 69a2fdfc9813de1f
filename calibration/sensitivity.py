"""Which groups must stay high: quantise one at a time, rank by what each costs, keep the costliest until all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .judge import Verdict
from .recipe import Recipe

Try = Callable[[Recipe], Verdict]
Progress = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class Found:
    """The recipe that quantises most and holds the tolerance, and its verdict. ``trials``: how many were judged."""

    recipe: Recipe
    verdict: Verdict
    trials: int


def search(recipe: Recipe, judge: Try, *, progress: Progress = iter) -> Found:
    """Keep as few groups high as the tolerance allows.

    Everything is tried first; only when that fails is each group measured alone. Groups are then kept high in the order
    of their cost per share of the work, and the number of them is found by bisection: exact where quantising less never
    hurts, which is verified for the answer itself.
    """
    names = [group.name for group in recipe.groups]
    verdict = judge(recipe.quantising(names))
    if verdict:
        return Found(recipe.quantising(names), verdict, 1)
    costs = {name: 1 - judge(recipe.quantising([name])).worst_cosine for name in progress(names)}
    recipe = recipe.with_costs(costs)
    order = by_cost(recipe)
    low, high = 0, len(order)  # keeping `low` groups high fails; keeping all of them high is the source itself
    passing: tuple[Recipe, Verdict] | None = None
    trials = 1 + len(names)
    while high - low > 1:
        middle = (low + high) // 2
        attempt = recipe.quantising(order[middle:])
        verdict = judge(attempt)
        trials += 1
        if verdict:
            high, passing = middle, (attempt, verdict)
        else:
            low = middle
    if passing is None:
        attempt = recipe.quantising([])
        passing = attempt, judge(attempt)
    return Found(*passing, trials)


def by_cost(recipe: Recipe) -> Sequence[str]:
    """Names of the groups, the one that loses most parity for its share of the work first."""
    ranked = sorted(recipe.groups, key=lambda group: (group.cost or 0.0) / max(group.share, 1e-12), reverse=True)
    return [group.name for group in ranked]
