"""Which groups need care: quantise one at a time, rank by what each costs, and treat the costliest better until all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .judge import Verdict
from .recipe import Recipe

# The part of the cosine's tolerance that held-out data may use: other inputs lose up to four times as much.
MARGIN = 0.25
EXTRA = 0.25  # products that quantising in two steps may add: where more is needed, keeping groups high is cheaper
Try = Callable[[Recipe], Verdict]
Check = Callable[[Recipe], Any]  # what it gives is true where the recipe passes
Progress = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class Found:
    """A recipe and its verdict. ``trials``: how many were judged until then."""

    recipe: Recipe
    verdict: Any
    trials: int


def search(recipe: Recipe, judge: Try, *, min_share: float = 1.0, progress: Progress = iter) -> Found:
    """Quantise as much as the tolerance allows, with a margin if one can be had: the final check sees other inputs.

    Everything is tried first; only when that leaves no margin is each group measured alone. Then, in the order of their cost
    per share of the work, groups are quantised in two steps, as few as give the margin, up to EXTRA more
    products. Where that gives none, groups are kept high, as few as give it while ``min_share`` of the work stays quantised;
    where none are enough, more in two steps. Where that is not enough either, what loses least of these within the
    tolerance; where none is, as few groups are kept high as hold it. Numbers of groups are found by bisection: exact where
    more care never hurts, which is verified for the answer itself.
    """
    names = [group.name for group in recipe.groups]
    everything = recipe.quantising(names).quantising_twice(())
    verdict = judge(everything)
    if _with_margin(verdict):
        return Found(everything, verdict, 1)
    everything = measure_costs(everything, judge, progress)
    order = by_cost(everything)
    ladder = Ladder(judge, trials=1 + len(names), known=[(everything, verdict)])
    steps = [everything.quantising_twice(order[:count]) for count in range(len(order) + 1)]
    affordable = [step for step in steps if step.extra <= EXTRA]
    found = ladder.first(affordable, _with_margin) or ladder.judged(affordable[-1])
    if _with_margin(found.verdict):
        return found
    kept_high = [everything.quantising(order[count:]) for count in range(len(order) + 1)]
    allowed = [step for step in kept_high if step.share >= min_share]
    safe = ladder.first(allowed, _with_margin) or ladder.first(steps[len(affordable) - 1 :], _with_margin)
    if safe:
        return safe
    holding = [careful for careful in (found, ladder.judged(allowed[-1]), ladder.judged(steps[-1])) if careful.verdict]
    if holding:
        return min(holding, key=lambda careful: careful.verdict.loss)
    return ladder.first(kept_high, bool) or ladder.judged(kept_high[-1])


def measure_costs(recipe: Recipe, judge: Try, progress: Progress = iter) -> Recipe:
    """The recipe with what each group costs when it alone is quantised, in one step."""
    names = [group.name for group in recipe.groups]
    return recipe.with_costs(
        {name: judge(recipe.quantising([name]).quantising_twice(())).loss for name in progress(names)}
    )


def _with_margin(verdict: Verdict) -> bool:
    return verdict.has_margin(MARGIN)


class Ladder:
    """Recipes of growing care, each judged once, and as few as possible. ``trials``: how many were judged."""

    def __init__(self, judge: Check, trials: int, known: Iterable[tuple[Recipe, Any]] = ()) -> None:
        self._judge = judge
        self._known = list(known)
        self.trials = trials

    def judged(self, recipe: Recipe) -> Found:
        verdict = next((verdict for known, verdict in self._known if known == recipe), None)
        if verdict is None:
            verdict = self._judge(recipe)
            self._known.append((recipe, verdict))
            self.trials += 1
        return Found(recipe, verdict, self.trials)

    def first(self, steps: Sequence[Recipe], accept: Callable[[Any], bool]) -> Found | None:
        """The first acceptable step after step 0, which is known not to be; None where the last is not either."""
        low, high = 0, len(steps) - 1
        found = self.judged(steps[high]) if high else None
        if found is None or not accept(found.verdict):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            attempt = self.judged(steps[middle])
            if accept(attempt.verdict):
                high, found = middle, attempt
            else:
                low = middle
        return replace(found, trials=self.trials)


def by_cost(recipe: Recipe) -> Sequence[str]:
    """Names of the groups, the one that loses most parity for its share of the work first."""
    ranked = sorted(recipe.groups, key=lambda group: (group.cost or 0.0) / max(group.share, 1e-12), reverse=True)
    return [group.name for group in ranked]
