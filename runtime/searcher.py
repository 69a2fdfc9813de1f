"""From queries to results: an index, the encoder of its model, and the stages that every query goes through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .budget import Budget
from .cascade import AnyStage, Stage, check_approximate, check_cascade, check_count
from .command import counted
from .encoder import Encoder, ImageSource
from .errors import UsageError
from .graph_maxsim import Scorer
from .index import Hit, Index
from .index_build import check_model, find_bundle
from .index_filter import parse_filters
from .items import Item
from .memory import GIB
from .readable import encode_readable

BATCH = 64  # queries encoded, then searched, at a time: so many of any number of them are held


@dataclass
class SearchReport:
    """What `Searcher.search_many` did."""

    queries: int = 0
    unreadable: list[str] = field(default_factory=list)
    encode_s: float = 0.0
    search_s: float = 0.0


class Searcher:
    """An index and the bundle of its model, opened for queries that all go through the same stages.

    A context manager: leaving it closes index, encoder and GPU. Everything is checked before anything is encoded.

    Args:
        bundle: where the model's bundle is; by default where it was at indexing.
        cascade, where, approximate: see `Index.search`.
        hold: keep the first so many vectors of every item in memory; see `Index.hold`.
        place: keep them on the GPU of the bundle's scorer; see `Index.place`. The first stage has to scan with as many.

    Raises:
        UsageError: no index, no bundle, another model's, no GPU to place vectors on, or a search that cannot be.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bundle: Path | None = None,
        k: int = 10,
        cascade: Sequence[AnyStage] | None = None,
        where: Sequence[str] = (),
        approximate: bool = False,
        hold: int = 0,
        place: int = 0,
        skip_damaged: bool = False,
    ) -> None:
        self.k, self._where, self._approximate = k, where, approximate
        self._how: list[str] = []
        with ExitStack() as stack:
            self.index = stack.enter_context(Index.open(folder, skip_damaged=skip_damaged))
            self.encoder = stack.enter_context(Encoder.open(find_bundle(self.index, bundle)))
            check_model(self.encoder, self.index.fingerprint, folder)
            self.cascade = self._check(cascade)
            if place:
                self._place(place, stack)
            if hold:
                self.index.hold(hold)
                self._how.append(f"first {hold} vectors held in memory")
            self._stack = stack.pop_all()
        default = "" if cascade else "default "
        stages = f"{counted(len(self.index), 'item')}, {default}cascade {' '.join(map(str, self.cascade))}"
        self.description = ", ".join([stages, *self._how, self.encoder.description])

    def search(self, text: str | None, image: ImageSource | None) -> list[Hit]:
        """The best items for one query: a text, an image, or both."""
        (query,) = self.encoder.encode_queries([text], images=[image], budget=self._vectors)
        return self._search(query)

    def search_many(
        self,
        queries: Sequence[Item],
        take: Callable[[str, list[Hit]], object],
        *,
        track: Callable[[Any], Iterable[Any]] = iter,
    ) -> SearchReport:
        """Give ``take`` the id and the best items of each query, in order; those that cannot be read are named and left out."""
        report = SearchReport()
        for start in track(range(0, len(queries), BATCH)):
            batch = queries[start : start + BATCH]
            began = time.perf_counter()
            places, vectors = encode_readable(
                self.encoder.encode_queries,
                [(query.text, query.image) for query in batch],
                self._vectors,
                names=[f"query {query.id}" for query in batch],
            )
            encoded = time.perf_counter()
            found = [self._search(query) for query in vectors]
            report.encode_s += encoded - began
            report.search_s += time.perf_counter() - encoded
            report.queries += len(places)
            report.unreadable += [query.id for place, query in enumerate(batch) if place not in places]
            for place, hits in zip(places, found, strict=True):
                take(batch[place].id, hits)
        return report

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Searcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _vectors(self) -> int:
        """Of a query, as many as some stage uses."""
        return max(stage.budget.query for stage in self.cascade)

    def _search(self, query: Any) -> list[Hit]:
        return self.index.search(query, self.k, cascade=self.cascade, where=self._where, approximate=self._approximate)

    def _check(self, cascade: Sequence[AnyStage] | None) -> tuple[Stage, ...]:
        check_count(self.k)
        given = [Stage.of(stage) for stage in cascade or ()]
        most = Budget(self.encoder.bundle.manifest.largest.query, self.index.layout.vectors)
        stages = check_cascade(given or None, len(self.index), most.query, most.candidate, self.k)
        parse_filters(self._where)
        if self._approximate:
            check_approximate(self.index, stages)
            self._how.append("approximate first stage")
        return stages

    def _place(self, vectors: int, stack: ExitStack) -> None:
        first = self.cascade[0].budget
        if self._approximate:
            raise UsageError(
                "an approximate first stage scores what the graph finds on the CPU; place nothing on the GPU for it"
            )
        if vectors != first.candidate:
            raise UsageError(
                f"the first {vectors} vectors on the GPU would serve no stage: everything is scanned at {first}; place "
                f"{first.candidate}, or begin the cascade with a stage of {vectors} candidate vectors"
            )
        scorer = stack.enter_context(Scorer.open(self.encoder.bundle))
        stack.callback(self.index.close)  # before the scorer, which frees what the index placed
        taken = self.index.place(scorer, vectors)
        self._how.append(f"first {vectors} vectors on the GPU ({taken / GIB:.3f} GiB, {scorer.description})")
