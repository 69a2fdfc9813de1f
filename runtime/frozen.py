"""Graphs frozen at one side and budget: their names, and a session that takes the feeds of the graph that serves all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .budget import Budget
from .errors import UsageError
from .geometry import Geometry
from .layout import Ints, candidate_meta_tokens, query_meta_tokens
from .manifest import Manifest
from .session import Arrays, Session

_NAME = re.compile(r"language\.(query|candidate)-(\d+)\.onnx")


def frozen_graphs(sides: Iterable[str], budgets: Collection[Budget]) -> dict[str, tuple[str, int]]:
    """The graphs to freeze, one for each of these sides' sizes: ``language.query-8.onnx`` -> (side, vectors)."""
    wanted = ((side, vectors) for side in sides for vectors in sorted({getattr(budget, side) for budget in budgets}))
    return {f"language.{side}-{vectors}.onnx": (side, vectors) for side, vectors in wanted}


def find_frozen(manifest: Manifest) -> dict[str, tuple[str, int]]:
    """The bundle's frozen graphs: name -> (side, vectors)."""
    matches = ((name, _NAME.fullmatch(name)) for name in sorted(manifest.files))
    return {name: (match[1], int(match[2])) for name, match in matches if match}


def frozen_meta_tokens(geometry: Geometry, side: str, vectors: int) -> Ints:
    """Ids of the Meta Tokens that a frozen graph appends itself; the last ``vectors`` of them are the answer."""
    if side == "query":
        return query_meta_tokens(geometry.text.vocab, vectors)
    return candidate_meta_tokens(geometry.text.vocab, geometry.query_tokens, vectors)


class FrozenSession:
    """A frozen graph behind the interface of ``language.onnx``: takes away what the graph holds as constants."""

    def __init__(self, session: Session, meta_tokens: Ints, vectors: int) -> None:
        self._session, self._meta_tokens, self._vectors = session, meta_tokens, vectors

    @property
    def description(self) -> str:
        return self._session.description

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return {**self._session.inputs, "rows": np.dtype(np.int64)}

    @property
    def max_items(self) -> int | None:
        return self._session.max_items

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Raises UsageError when the feeds are of another side or budget than the graph's."""
        count = len(self._meta_tokens)
        appended = feeds["token_ids"][:, -count:]
        if len(feeds["rows"]) != self._vectors or (appended != self._meta_tokens).any():
            raise UsageError(f"this graph is frozen at {self._vectors} vectors of one side and serves nothing else")
        kept = {name: values for name, values in feeds.items() if name != "rows"}
        return self._session.run(kept | {name: feeds[name][:, :-count] for name in ("token_ids", "image_rows")})

    def close(self) -> None:
        self._session.close()
