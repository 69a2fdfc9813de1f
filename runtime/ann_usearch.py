"""HNSW graphs by usearch, over vectors in bf16 by inner product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index as UsearchIndex

from .errors import MetaEmbedError
from .fork import Turn
from .index_ann import LEAST_WALK
from .maxsim import Floats

Keys = NDArray[np.uint64]


def write_graph(
    path: Path, dims: int, pieces: Iterable[tuple[Keys, Floats]], *, connectivity: int, expansion_add: int
) -> int:
    """Build a graph of keys and vectors (n, d) with all cores, write it to `path`, and return its number of vectors.

    The whole graph is held in memory meanwhile: 2 d bytes of a vector in bf16, and about 10 bytes times the connectivity.

    Raises:
        MetaEmbedError: it cannot be built or written.
    """
    graph = _empty(dims, connectivity=connectivity, expansion_add=expansion_add)
    with _sentences(f"{path} cannot be written"):
        for keys, vectors in pieces:
            graph.add(keys, vectors)
        graph.save(path)
    if path.stat().st_size != graph.serialized_length:
        raise MetaEmbedError(f"{path} was not written whole; is the disk full?")
    return len(graph)


class Graph:
    """A graph in a mapped file, which is read as walks need it. Threads take turns: usearch has one searcher a graph.

    The file's content must be known to be good: usearch trusts it.
    """

    def __init__(self, mapped: mmap, dims: int) -> None:
        self._turn = Turn(awaited=True)
        # Without key lookups: a table of all keys in memory, of which nothing here makes use.
        self._graph = _empty(dims, expansion_search=LEAST_WALK, enable_key_lookups=False)
        self._mapped = mapped  # usearch points into it, so it goes last
        with _sentences("usearch refuses the HNSW graph"):
            self._graph.view(memoryview(mapped))

    def is_cut_short(self) -> bool:
        """Whether the file has lost its end since it was mapped; a walk that reads there would end the process (SIGBUS)."""
        return self._mapped.size() < len(self._mapped)

    def search(self, query: Floats, count: int) -> Keys:
        """Keys of about the best `count` for a query (d,); fewer where the graph does not lead to so many."""
        with self._turn, _sentences("the HNSW graph could not be searched"):
            return np.asarray(self._graph.search(query, count, threads=1).keys, np.uint64)


def _empty(dims: int, **settings: Any) -> UsearchIndex:
    return UsearchIndex(ndim=dims, metric="ip", dtype="bf16", **settings)


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "terminated" in str(error):  # usearch's word for Ctrl-C
            raise KeyboardInterrupt from error
        raise MetaEmbedError(f"{what} ({error})") from error
