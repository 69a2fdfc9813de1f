"""Search in stages: a small budget over everything, larger budgets over the survivors. Every stage is exact; on request an
HNSW graph chooses what the first one scores (index_ann.py).

Ties are broken by id, in the order of their characters, so a result never depends on how items lie in segments. (Without the C
kernels BLAS may round equal items apart by where they lie in its tiles: then they do not tie.)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .budget import Budget, is_whole
from .contenders import Compacted, Scored, describe
from .errors import MetaEmbedError, UsageError
from .index import Hit, Index, Snapshot
from .index_filter import parse_filters
from .index_scan import scan
from .index_segment import Rows
from .maxsim import Floats, prepare

ATTEMPTS = 5  # a search starts again when `compact` removed its survivors' rows; compactions are minutes apart


@dataclass(frozen=True)
class Stage:
    """One stage: the vectors it uses, and how many items it leaves (the last stage: as many as are asked for)."""

    budget: Budget
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"stage {self} leaves nothing; keep at least 1")

    def __str__(self) -> str:
        return str(self.budget) if self.keep is None else f"{self.budget}:{self.keep}"

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read ``R_Q,R_C:KEEP`` or ``R_Q,R_C``."""
        match = re.fullmatch(r"([^:]+)(?::([0-9]{1,9}))?", text.strip())
        if not match:
            raise UsageError(f"stage {text!r} is not of the form R_Q,R_C:KEEP (for example 1,1:1000)")
        return cls(Budget.parse(match[1]), int(match[2]) if match[2] else None)

    @classmethod
    def of(cls, value: object) -> Stage:
        """A stage from ``(r_q, r_c, keep)``, ``(r_q, r_c)``, or what `parse` reads; a stage as it is."""
        if isinstance(value, Stage):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(map(is_whole, value)):
            query, candidate, *keep = map(int, value)
            return cls(Budget(query, candidate), *keep)
        raise UsageError(f'{value!r} is no stage of a cascade; write (1, 1, 1000), "1,1:1000", or a Stage')


AnyStage = Stage | str | tuple[int, int] | tuple[int, int, int]


def default_cascade(items: int, largest: Budget, k: int = 10) -> tuple[Stage, ...]:
    """Stages that keep the ranking of `largest` in practice: everything up to 10,000 items, then (4,8) for a tenth, and for
    at least ten times the `k` results.

    Safe rather than fast: what (1,1) loses depends on the model, so a cascade that starts there is for those who have
    measured it (`metaembed-bench scoring`).
    """
    first = Budget(min(4, largest.query), min(8, largest.candidate))
    if items <= 10_000 or first == largest:
        return (Stage(largest),)
    return (Stage(first, max(1000, items // 10, 10 * k)), Stage(largest))


def search_index(
    index: Index,
    query: NDArray[Any],
    k: int,
    *,
    cascade: Sequence[AnyStage] | None,
    where: Sequence[str] = (),
    approximate: bool = False,
) -> list[Hit]:
    """See `Index.search`."""
    check_count(k)
    where = _conditions(where)
    given = None if cascade is None else _stages(cascade)
    queries, _ = prepare(query, np.zeros((0, 1, index.layout.dims), np.float32), None)
    if len(queries) != 1:
        raise UsageError(f"a search takes one query; {len(queries)} were given")
    if not np.isfinite(queries).all():
        raise UsageError("the query holds a NaN or infinite value")
    for _ in range(ATTEMPTS):
        snapshot = index.snapshot()
        stages = check_cascade(given, len(snapshot), queries.shape[1], index.layout.vectors, k)
        if approximate:
            check_approximate(index, stages)
        with contextlib.suppress(Compacted):
            return _search(index, snapshot, queries, k, stages, where, approximate)
    raise MetaEmbedError(f"{index.folder} was compacted {ATTEMPTS} times during one search; try again")


def _stages(cascade: object) -> list[Stage]:
    """The stages of a list of them, or the only one."""
    if isinstance(cascade, Iterable) and not isinstance(cascade, str):
        return [Stage.of(stage) for stage in cascade]
    return [Stage.of(cascade)]


def _conditions(where: object) -> list[str]:
    conditions: list[Any] = list(where) if isinstance(where, Iterable) and not isinstance(where, str) else [None]
    if not all(isinstance(condition, str) for condition in conditions):
        raise UsageError(f'conditions are a list of texts, ["year>=2020"], not {where!r}')
    return conditions


def check_count(k: Any) -> None:
    """A UsageError unless k is a number of results."""
    if not is_whole(k) or k < 1:
        raise UsageError(f"the best {k!r} were asked for; k is a whole number from 1 on")


def check_cascade(
    cascade: Sequence[Stage] | None, items: int, query_vectors: int, candidate_vectors: int, k: int
) -> tuple[Stage, ...]:
    """The stages to run; a UsageError where one asks for more vectors than there are, leaves fewer than k, or is no use."""
    if cascade is not None and not cascade:
        raise UsageError("a cascade has at least one stage")
    stages = tuple(cascade or default_cascade(items, Budget(query_vectors, candidate_vectors), k))
    check_order(stages)
    for stage in stages:
        stage.budget.check_within(query_vectors, candidate_vectors, owner="this search has")
        if stage.keep is not None and stage.keep < k:
            raise UsageError(f"stage {stage} leaves fewer items than the best {k} that were asked for")
    return stages


def check_order(stages: Sequence[Stage]) -> None:
    """A UsageError where a stage but the last keeps all, or one leaves more or sees no more than the one before it."""
    for before, stage in pairwise(stages):
        if before.keep is None:
            raise UsageError(f"stage {before} does not say how many items it leaves; write {before}:1000")
        if stage.keep is not None and stage.keep > before.keep:
            raise UsageError(f"stage {stage} cannot leave more items than the {before.keep} that stage {before} leaves")
        if stage.budget.query <= before.budget.query and stage.budget.candidate <= before.budget.candidate:
            raise UsageError(f"stage {stage} uses no more vectors than stage {before}; the budgets of a cascade rise")


def check_approximate(index: Index, stages: Sequence[Stage]) -> None:
    """A UsageError where no graph could serve the first stage; whether there is one, the search finds."""
    if stages[0].budget != Budget(1, 1):
        raise UsageError(
            f"an approximate first stage is 1,1, not {stages[0]}: the HNSW graph holds first vectors only; "
            "name a cascade that begins there, as 1,1:1000 16,64 does"
        )
    if index.shard != (0, 1):
        raise UsageError("the HNSW graph is of the whole index, not of a shard; search a shard without approximate")


def _search(
    index: Index,
    snapshot: Snapshot,
    queries: Floats,
    k: int,
    stages: Sequence[Stage],
    where: Sequence[str],
    approximate: bool,
) -> list[Hit]:
    keeps = [*(stage.keep or k for stage in stages[:-1]), k]
    pool = _pool(index, snapshot, queries[0, 0], keeps[0], where, approximate)
    for stage, keep in zip(stages, keeps, strict=True):
        scored = scan(index, snapshot, queries[:, : stage.budget.query], stage.budget.candidate, pool, keep)
        pool = scored.positions
    return _hits(index, snapshot, scored)


def _pool(
    index: Index, snapshot: Snapshot, first: Floats, keep: int, where: Sequence[str], approximate: bool
) -> Rows | None:
    """Positions, rising, that the first stage is to score, which keeps so many; None: all. `first` is the query's first vector."""
    if where:
        pool = index.select(snapshot, *parse_filters(where))
        if pool is None:
            raise Compacted
    elif approximate:
        pool = index.ann.pool(snapshot, first, keep)
    else:
        return None
    return None if pool is None else np.sort(pool)


def _hits(index: Index, snapshot: Snapshot, scored: Scored) -> list[Hit]:
    described = describe(index, snapshot, scored.positions)
    rows = sorted(zip(scored.scores.tolist(), described, strict=True), key=lambda row: (-row[0], row[1][0]))
    return [Hit(rank, id_, score, payload) for rank, (score, (id_, payload)) in enumerate(rows, start=1)]
