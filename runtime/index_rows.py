"""Which rows of the catalogue can be read, for an index that leaves damaged items out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import BundleError
from .index_catalogue import Catalogue
from .index_segment import NO_ROWS, Rows

if TYPE_CHECKING:
    from .index import Part

log = logging.getLogger(__name__)
MOST_NAMED = 20  # rows in one warning


class SoundRows:
    """What is known of the catalogue's rows. All of a segment are read at once, the first time that one is found damaged, or
    that all are searched by a condition.

    Attributes:
        changes: how often rows were found that are to be left out.
    """

    def __init__(self, catalogue: Catalogue, *, skip_damaged: bool) -> None:
        self.changes = 0
        self._catalogue, self._skip_damaged = catalogue, skip_damaged
        self._of: dict[int, Rows | None] = {}

    def of(self, segment: int) -> Rows | None:
        """The sound rows of a segment some of whose others are damaged; None where all are sound, as far as is known."""
        return self._of.get(segment)

    def lack(self, parts: Sequence[Part]) -> bool:
        """Read all rows of parts that were not read yet; whether some of their living ones are damaged, and to be left out.

        Raises:
            BundleError: some are damaged, and not to be left out.
        """
        there = {row.number for row in self._catalogue.segments()}
        for part in parts:
            if part.number in there and part.number not in self._of:
                self._read(part)
        return any(len(self._damaged(part)) for part in parts)

    def _read(self, part: Part) -> None:
        try:
            for _ in self._catalogue.rows(part.number, part.segment.items):
                pass
            self._of[part.number] = None
        except BundleError:
            if not self._skip_damaged:
                raise
            sound, sentence = self._catalogue.sound_items(part.number, part.segment.items)
            self._of[part.number] = np.array(list(sound), np.int64)
            self.changes += 1
            if len(lost := self._damaged(part)):
                named = ", ".join(map(str, lost[:MOST_NAMED])) + (", ..." if len(lost) > MOST_NAMED else "")
                log.warning("left out: %d items, row %s of %s: %s", len(lost), named, part.segment.path.name, sentence)

    def _damaged(self, part: Part) -> Rows:
        """Living rows that are known to be damaged."""
        sound = self._of.get(part.number)
        return NO_ROWS if sound is None else np.setdiff1d(np.flatnonzero(part.alive), sound)
