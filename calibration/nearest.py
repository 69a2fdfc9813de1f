"""The nearest recipe that would pass, where a bundle failed its own check: the search never sees the golden vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from metaembed.runtime.check import Check, replay
from metaembed.runtime.golden import SIDES, golden_path, read_golden
from metaembed.runtime.parity import TOLERANCES

from .recipe import Recipe
from .sensitivity import Ladder, Try, by_cost, measure_costs
from .workshop import Workshop

Progress = Callable[[Any], Iterable[Any]]


def find_passing(workshop: Workshop, recipe: Recipe, judge: Try | None, progress: Progress) -> Recipe | None:
    """The failed recipe with as few groups kept high as make the golden vectors pass, the costliest for their work first.

    Args:
        judge: of held-out data, which tells what a group costs where the recipe does not say; None where there is none.

    Returns:
        None where costs are not to be had, or where even all groups kept high do not pass.
    """
    if any(group.cost is None for group in recipe.groups):
        if judge is None:
            return None
        recipe = measure_costs(recipe, judge, progress)
    quantised = [name for name in by_cost(recipe) if name not in recipe.high]
    steps = [recipe.quantising(quantised[count:]) for count in range(len(quantised) + 1)]
    found = Ladder(lambda attempt: check_recipe(workshop, attempt), trials=0).first(steps, bool)
    return None if found is None else found.recipe


def check_recipe(workshop: Workshop, recipe: Recipe) -> Check:
    """The golden vectors against an exact simulation of the recipe, within its type's tolerance."""
    goldens = {side: read_golden(workshop.bundle.path(golden_path(side))) for side in SIDES}
    return replay(workshop.encoder(recipe), goldens, TOLERANCES[recipe.type], recipe.type)
