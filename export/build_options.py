"""What is asked of a build: which budgets, sides, batches and layout; and the engines that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from metaembed.runtime.budget import Budget
from metaembed.runtime.graph_maxsim import MEMORY_BYTES, QUERIES, chunk_size
from metaembed.runtime.manifest import SCORER, Manifest

from .profiles import EngineSpec, Sizes, plan_engines, scorer_engine

QUERY_BATCH, CANDIDATE_BATCH = 8, 4


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to cut engines to, and how. ``flavour`` insists on a route; ``side`` keeps one side's profiles only."""

    budgets: tuple[Budget, ...]
    layout: str = "shared"
    side: str | None = None
    profile_per_budget: bool = False
    max_batch: int | None = None
    flavour: str | None = None

    def words(self) -> str:
        """These options as metaembed-build's arguments, for a kit's command."""
        words = [f"--layout {self.layout}"] if self.layout != "shared" else []
        words += [f"--side {self.side}"] if self.side else []
        words += ["--profile-per-budget"] if self.profile_per_budget else []
        words += [f"--max-batch {self.max_batch}"] if self.max_batch else []
        return " ".join(words)


def chosen_engines(manifest: Manifest, options: BuildOptions) -> tuple[EngineSpec, ...]:
    """The engines that these options ask for.

    The scorer's is not cut to the budgets asked for but has all of the bundle's: a cascade scores prefixes before them, an index
    may hold what another machine encoded at others, and metaembed-check replays every one. It has no weights; a plan is 1 MB.
    """
    engines = plan_engines(
        Sizes.of(manifest),
        options.budgets,
        layout=options.layout,
        side=options.side,
        profile_per_budget=options.profile_per_budget,
        query_batch=options.max_batch if options.max_batch is not None else QUERY_BATCH,
        candidate_batch=options.max_batch if options.max_batch is not None else CANDIDATE_BATCH,
    )
    if SCORER not in manifest.files:
        return engines
    dim, query = manifest.geometry.dim, manifest.largest.query
    sizes = {budget.candidate for budget in manifest.budgets}
    chunks = {size: chunk_size(MEMORY_BYTES, QUERIES, query, size, dim) for size in sizes}
    return (*engines, scorer_engine(dim, query, QUERIES, chunks, narrow=manifest.precision != "fp32"))
