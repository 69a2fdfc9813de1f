"""Making a damaged index sound again. What loses nothing is simply done; items are dropped only when that is asked for.

Segments are immutable: the sound rows of a damaged one are copied to a new one, and one transaction puts it in the other's
place. So the screen, which is computed in copying, and a header or table of checksums, which follows from the rest, cost no
item. Where the catalogue's structure is damaged, which includes its index of ids, everything that can be read goes into a
new catalogue, and SQLite copies that over the old one in one transaction: no damaged page is used again, as REINDEX would.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import BundleError, MetaEmbedError
from .index_ann import KEY
from .index_catalogue import Catalogue, SegmentRow
from .index_files import REBUILT, WriterLock, copy_rows, remove_leftovers
from .index_layout import SEGMENTS, Layout
from .index_segment import NO_ROWS, MendedSegment, Rows, UnreadableError
from .index_verify import Damage, Kind, find_catalogue_damage, find_content_damage


@dataclass(frozen=True)
class Repair:
    """What `repair_index` found and did, or would do.

    Attributes:
        done: the index is sound. False: items would be dropped, and nothing was changed.
        damages: a sentence each, as `Index.verify` gives them.
        dropped: ids that are no longer in the index: index these items again.
        unnamed: items that are dropped as well, whose ids cannot be read.
        older: ids that were there twice; the item that was added first is dropped.
        items: that are left.
        graph_dropped: the HNSW graph was damaged; `IndexWriter.build_ann` builds one.
    """

    done: bool
    damages: tuple[str, ...]
    dropped: tuple[str, ...]
    unnamed: int
    older: tuple[str, ...]
    items: int
    graph_dropped: bool

    @property
    def drops(self) -> bool:
        return bool(self.dropped or self.unnamed or self.older)


@dataclass(frozen=True)
class _Mending:
    """A damaged segment: the rows that a new one takes over, if any, and the older ones of ids that are alive twice."""

    row: SegmentRow
    source: MendedSegment | None
    items: dict[int, tuple[str, str | None]]  # those that can be read
    keep: Rows
    older: Rows

    @property
    def lost(self) -> list[int]:
        lost: list[int] = np.setdiff1d(np.flatnonzero(self.row.alive), np.concatenate([self.keep, self.older])).tolist()
        return lost


def repair_index(folder: str | Path, *, drop: bool = False) -> Repair:
    """Read a whole index as `Index.verify` does, and mend what is damaged; all of it, or nothing.

    A process that is killed leaves the index as it was or as it is to be.

    Args:
        drop: damaged items may be dropped. Without, an index that would lose some is left as it is.

    Raises:
        UsageError: there is no index, or another process writes to it.
        BundleError: the catalogue does not say which segments there are, so that nothing can be told from what is left.
        MetaEmbedError: something cannot be read, though it may be sound; or there is no room. Nothing is changed.
    """
    folder = Path(os.path.abspath(folder))
    with closing(WriterLock(folder)), closing(Catalogue(folder, write=True)) as catalogue:
        layout, rows = _known_segments(catalogue)
        damages = find_catalogue_damage(catalogue)
        if damages and not catalogue.tallied:
            raise _refusal(damages[0].sentence)
        damages += find_content_damage(folder, layout, catalogue)
        for damage in damages:
            if damage.kind is Kind.UNREADABLE:
                raise MetaEmbedError(f"{damage.sentence}; it may be sound, so nothing was changed")
        mendings = [
            _judge(folder, layout, catalogue, row, mine)
            for row in rows
            if (mine := [damage for damage in damages if damage.segment == row.number])
        ]
        repair = _report(rows, damages, mendings)
        if repair.drops and not drop:
            return repair
        if damages:
            _mend(folder, layout, catalogue, mendings, {damage.kind for damage in damages})
        remove_leftovers(folder, catalogue)
        return replace(repair, done=True)


def _known_segments(catalogue: Catalogue) -> tuple[Layout, list[SegmentRow]]:
    try:
        return catalogue.layout(), catalogue.segments()
    except BundleError as error:
        raise _refusal(str(error)) from error


def _refusal(sentence: str) -> BundleError:
    return BundleError(f"{sentence}; repair cannot tell which items there were, and changed nothing")


def _judge(folder: Path, layout: Layout, catalogue: Catalogue, row: SegmentRow, damages: Sequence[Damage]) -> _Mending:
    """Which rows of a damaged segment are sound."""
    older = _rows_of(damages, Kind.TWICE)
    unsound = np.concatenate([older, _rows_of(damages, Kind.ITEMS, Kind.VECTORS)])
    source = None
    try:
        source = MendedSegment(folder / SEGMENTS / row.name, layout, row.items, row.checksum)
        if len(_rows_of(damages, Kind.SEGMENT)):  # nothing was said of its vectors yet
            unsound = np.concatenate([unsound, source.check(layout.vectors)])
    except UnreadableError:
        raise
    except BundleError:
        unsound = np.arange(row.items)
    keep = np.setdiff1d(np.flatnonzero(row.alive), unsound)
    items, _ = catalogue.sound_items(row.number, row.items)
    return _Mending(row, source, items, keep, older)


def _rows_of(damages: Iterable[Damage], *kinds: Kind) -> Rows:
    return np.concatenate([NO_ROWS, *(damage.rows for damage in damages if damage.kind in kinds)])


def _report(rows: Sequence[SegmentRow], damages: Sequence[Damage], mendings: Sequence[_Mending]) -> Repair:
    lost = [(mending, row) for mending in mendings for row in mending.lost]
    dropped = tuple(mending.items[row][0] for mending, row in lost if row in mending.items)
    older = tuple(mending.items[row][0] for mending in mendings for row in mending.older.tolist())
    living = sum(int(row.alive.sum()) for row in rows)
    return Repair(
        done=False,
        damages=tuple(damage.sentence for damage in damages),
        dropped=dropped,
        unnamed=len(lost) - len(dropped),
        older=older,
        items=living - len(lost) - len(older),
        graph_dropped=any(damage.kind is Kind.GRAPH for damage in damages),
    )


def _mend(folder: Path, layout: Layout, catalogue: Catalogue, mendings: Sequence[_Mending], kinds: set[Kind]) -> None:
    (folder / SEGMENTS).mkdir(exist_ok=True)
    try:
        written = [
            (*copy_rows(folder, layout, [(mending.source, mending.keep)]), mending)
            for mending in mendings
            if mending.source and len(mending.keep)
        ]
        if Kind.CATALOGUE not in kinds:
            _enter(catalogue, mendings, written, drop_graph=Kind.GRAPH in kinds)
            return
        with tempfile.TemporaryDirectory(prefix=REBUILT, dir=folder) as place:
            Catalogue.create(Path(place), layout, catalogue.about(), last=catalogue.last_number())
            with closing(Catalogue(Path(place), write=True)) as rebuilt:
                _fill(rebuilt, catalogue, {mending.row.number for mending in mendings})
                _enter(rebuilt, mendings, written, drop_graph=Kind.GRAPH in kinds)
                if found := rebuilt.find_damage():
                    raise BundleError(found[0])
                rebuilt.overwrite(catalogue)
    except BaseException:
        # By the catalogue's word, not by the exception: an interrupt may arrive just after the commit.
        with suppress(MetaEmbedError, OSError):
            remove_leftovers(folder, catalogue)
        raise


def _fill(rebuilt: Catalogue, catalogue: Catalogue, damaged: set[int]) -> None:
    """Take over the segments that are sound, under their numbers, by which graphs and open readers know them."""
    with rebuilt.writing():
        for row in catalogue.segments():
            if row.number not in damaged:
                rebuilt.enter(row, catalogue.rows(row.number, row.items))


def _enter(
    catalogue: Catalogue,
    mendings: Sequence[_Mending],
    written: Sequence[tuple[str, int, _Mending]],
    *,
    drop_graph: bool,
) -> None:
    with catalogue.writing():
        catalogue.drop_segments(mending.row.number for mending in mendings)
        for name, checksum, mending in written:
            catalogue.add_segment(name, checksum, [mending.items[row] for row in mending.keep.tolist()])
        if drop_graph:
            catalogue.set_about(KEY, "")
