"""Search in stages: a small budget over everything, larger budgets over the survivors. Every stage is exact; on request an
HNSW graph chooses what the first one scores (index_ann.py).

Ties are broken by id, in the order of their characters, so a result never depends on how items lie in segments. (Without the C
kernels BLAS may round equal items apart by where they lie in its tiles: then they do not tie.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .budget import Budget, is_whole
from .errors import BundleError, MetaEmbedError, UsageError
from .index import Hit, Index, Part, Snapshot
from .index_device import DeviceGroups
from .index_filter import parse_filters
from .index_segment import Rows
from .maxsim import Floats, not_finite, prepare, score_parts
from .screen import may_be_best

log = logging.getLogger(__name__)
ATTEMPTS = 5  # a search starts again when `compact` removed its survivors' rows; compactions are minutes apart
# Up to this share of the items, picking them row by row takes 0.4 to 0.95 of the time of scanning all, whatever the budget.
WORTH_PICKING = 0.3


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


@dataclass(frozen=True)
class _Scored:
    """Positions in a snapshot, rising, and their scores."""

    positions: Rows
    scores: Floats


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
        hits = _search(index, snapshot, queries, k, stages, where, approximate)
        if hits is not None:
            return hits
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
) -> list[Hit] | None:
    pool = index.select(snapshot, *parse_filters(where)) if where else None
    if where and pool is None:
        return None
    if approximate and not where:
        pool = index.ann.pool(snapshot, queries[0, 0], stages[0].keep if len(stages) > 1 and stages[0].keep else k)
    scored: _Scored | None = None
    for stage in stages:
        keep = k if stage is stages[-1] else stage.keep or k
        chosen = pool if scored is None else scored.positions
        pieces = _score(index, snapshot, queries[:, : stage.budget.query], stage.budget.candidate, chosen, keep)
        scored = None if pieces is None else _best(index, snapshot, pieces, keep)
        if scored is None:
            return None
    return [] if scored is None else _hits(index, snapshot, scored)


def _score(
    index: Index, snapshot: Snapshot, queries: Floats, vectors: int, pool: Rows | None, keep: int
) -> list[_Scored] | None:
    """Score the living items of a pool (None: all), and keep what may be among the best, from every part.

    None when an item that a sentence is to name was compacted away meanwhile. UsageError: a similarity is NaN or infinite.
    """
    queries = np.ascontiguousarray(queries)
    work = list(_choose(index, snapshot, queries, vectors, pool, keep))
    device = _device(index, vectors)
    near = [
        (part.segment.groups(vectors), None if whole else rows) for part, rows, whole in work if not (device and whole)
    ]
    found = iter(score_parts(queries, near))
    scored = [device.scores(queries, part.segment) if device and whole else next(found) for part, _, whole in work]
    pieces: list[_Scored] = []
    for (part, rows, whole), scores in zip(work, scored, strict=True):
        living = scores[0][rows] if whole else scores[0]
        finite = np.isfinite(living)
        if not finite.all():
            name = _name(index, snapshot, part, rows[np.argmin(finite)])
            if name is None:
                return None
            raise not_finite(name)
        pieces.append(_contenders(part, rows, living, keep))
    return pieces


def _device(index: Index, vectors: int) -> DeviceGroups | None:
    """What scans so many vectors of every item on a GPU, where the index has that."""
    return index.device if index.device and index.device.vectors == vectors else None


def _choose(
    index: Index, snapshot: Snapshot, queries: Floats, vectors: int, pool: Rows | None, keep: int
) -> Iterator[tuple[Part, Rows, bool]]:
    """The rows to score of every part, and whether it is to be scanned as a whole."""
    if pool is not None and len(pool) <= WORTH_PICKING * sum(part.segment.items for part in snapshot.parts):
        pool = np.sort(pool)
        for part, mask in snapshot.split(pool):
            rows = pool[mask] - part.start
            yield part, _sound(index, part, vectors, rows[part.alive[rows]]), False
        return
    for part in snapshot.parts:
        alive = part.alive
        if pool is not None:
            alive = alive & np.isin(np.arange(part.start, part.end), pool)
        likely = _screened(index, part, queries, vectors, alive, keep)
        if likely is not None:
            yield part, _sound(index, part, vectors, likely), False
        else:
            damaged = _damaged(index, part, vectors, None)
            yield part, _without(damaged, np.flatnonzero(alive)), not len(damaged)


def _screened(
    index: Index, part: Part, queries: Floats, vectors: int, alive: NDArray[np.bool_], keep: int
) -> Rows | None:
    """Rows of a part that may be among its best `keep`, by the screen; None where there is none for so many vectors."""
    screen = part.segment.screen() if vectors == index.layout.ends[0] else None
    if screen is None or keep >= alive.sum() or _device(index, vectors):
        return None
    if len(damaged := part.segment.check_screen()):
        log.warning("scored without the screen: %s", part.segment.damage(damaged))
        return None
    rows = may_be_best(queries[0], screen, np.flatnonzero(alive), keep)
    if len(_damaged(index, part, vectors, rows)):
        return None  # what was passed over for a damaged item may be among the best without it
    return rows if len(rows) <= WORTH_PICKING * part.segment.items else None


def _sound(index: Index, part: Part, vectors: int, rows: Rows) -> Rows:
    return _without(_damaged(index, part, vectors, rows), rows)


def _without(damaged: Rows, rows: Rows) -> Rows:
    return np.setdiff1d(rows, damaged) if len(damaged) else rows


def _damaged(index: Index, part: Part, vectors: int, rows: Rows | None) -> Rows:
    damaged = part.segment.check(vectors, rows)
    if len(damaged):
        if not index.skip_damaged:
            raise part.segment.damage(damaged)
        log.warning("left out: %s", part.segment.damage(damaged))
    return damaged


def _name(index: Index, snapshot: Snapshot, part: Part, row: int) -> str | None:
    """An item in a sentence: by its id, or by its row where the catalogue is damaged there; None as of `Index.describe`."""
    try:
        described = index.describe(snapshot, np.array([part.start + row]))
    except BundleError:
        return f"row {row} of {part.segment.path}"
    return f"item {described[0][0]!r}" if described else None


def _contenders(part: Part, rows: Rows, scores: Floats, keep: int) -> _Scored:
    """Those that no `keep` others of the part surpass: more than `keep` only where scores tie."""
    if len(scores) > keep:
        among = scores >= np.partition(scores, -keep)[-keep]
        rows, scores = rows[among], scores[among]
    return _Scored(rows + part.start, scores)


def _best(index: Index, snapshot: Snapshot, pieces: Sequence[_Scored], keep: int) -> _Scored | None:
    """The best `keep`; ties at the edge go by id. None when a tied row was compacted away meanwhile."""
    positions = np.concatenate([np.empty(0, np.int64), *(piece.positions for piece in pieces)])
    scores = np.concatenate([np.empty(0, np.float32), *(piece.scores for piece in pieces)])
    if len(scores) > keep:
        edge = np.partition(scores, -keep)[-keep]
        chosen, tied = scores > edge, np.flatnonzero(scores == edge)
        places = keep - int(chosen.sum())
        if len(tied) > places:
            described = index.describe(snapshot, positions[tied])
            if described is None:
                return None
            tied = tied[np.argsort(np.array([id_ for id_, _ in described], object), kind="stable")]
        chosen[tied[:places]] = True
        positions, scores = positions[chosen], scores[chosen]
    order = np.argsort(positions)
    return _Scored(positions[order], scores[order])


def _hits(index: Index, snapshot: Snapshot, scored: _Scored) -> list[Hit] | None:
    described = index.describe(snapshot, scored.positions)
    if described is None:
        return None
    rows = sorted(zip(scored.scores.tolist(), described, strict=True), key=lambda row: (-row[0], row[1][0]))
    return [Hit(rank, id_, score, payload) for rank, (score, (id_, payload)) in enumerate(rows, start=1)]
