"""Reading a whole index and naming everything that is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from .errors import BundleError, MetaEmbedError
from .index_ann import map_graph, read_record
from .index_catalogue import Catalogue, Place, SegmentRow
from .index_layout import SEGMENTS, Layout
from .index_segment import NO_ROWS, Rows, Segment, UnreadableError


class Kind(Enum):
    """What is damaged."""

    CATALOGUE = "the catalogue's structure"
    ITEMS = "rows of the catalogue: ids and payloads"
    TWICE = "an id that is alive twice; the rows are those of the older item"
    SEGMENT = "a segment's file: missing, cut short, or its header or table of checksums"
    VECTORS = "vectors"
    SCREEN = "the screen, which is derived from the vectors"
    GRAPH = "the HNSW graph, which is derived too"
    UNREADABLE = "nothing, perhaps: something could not be read"


@dataclass(frozen=True, eq=False)
class Damage:
    """One thing that is damaged: which rows of which segment, where it concerns some, and the sentence about it."""

    kind: Kind
    sentence: str
    segment: int = 0
    rows: Rows = field(default_factory=lambda: NO_ROWS)


def find_damage(folder: Path, layout: Layout, catalogue: Catalogue) -> list[Damage]:
    """All damage in the catalogue's structure and rows, in segment files, and between the two."""
    # Nothing that a catalogue of unsound structure says can be relied upon.
    return find_catalogue_damage(catalogue) or find_content_damage(folder, layout, catalogue)


def find_catalogue_damage(catalogue: Catalogue) -> list[Damage]:
    return [Damage(Kind.CATALOGUE, sentence) for sentence in catalogue.find_damage()]


def find_content_damage(folder: Path, layout: Layout, catalogue: Catalogue) -> list[Damage]:
    """What is damaged apart from the catalogue's structure."""
    found: list[Damage] = []
    living: dict[str, Place] = {}
    rows = catalogue.segments()
    names = {row.number: row.name for row in rows}
    for row in rows:
        found += _segment_damage(folder, layout, row)
        found += _items_damage(catalogue, row, living, names)
    found += _ann_damage(folder, catalogue)
    return found


def _of(error: Exception, kind: Kind, segment: int = 0, rows: Rows = NO_ROWS) -> Damage:
    """The damage that an error tells of, if it does: a lock or a permission says nothing about what is on the disk."""
    told = isinstance(error, (BundleError, FileNotFoundError)) and not isinstance(error, UnreadableError)
    return Damage(kind if told else Kind.UNREADABLE, str(error), segment, rows)


def _ann_damage(folder: Path, catalogue: Catalogue) -> Iterator[Damage]:
    try:
        if record := read_record(folder, catalogue):
            map_graph(folder, record)
    except (MetaEmbedError, OSError) as error:
        yield _of(error, Kind.GRAPH)


def _segment_damage(folder: Path, layout: Layout, row: SegmentRow) -> Iterator[Damage]:
    try:
        segment = Segment(folder / SEGMENTS / row.name, layout, row.items, row.checksum)
        for kind, damaged in ((Kind.VECTORS, segment.check(layout.vectors)), (Kind.SCREEN, segment.check_screen())):
            if len(damaged):
                yield Damage(kind, str(segment.damage(damaged)), row.number, damaged)
    except (MetaEmbedError, OSError) as error:
        yield _of(error, Kind.SEGMENT, row.number, np.arange(row.items))


def _items_damage(
    catalogue: Catalogue, segment: SegmentRow, living: dict[str, Place], names: dict[int, str]
) -> Iterator[Damage]:
    """Rows of the catalogue: one per item, with sound checksums, and no id alive twice."""
    alive = segment.alive

    def meet(row: int, id_: str) -> Iterator[Damage]:
        place = segment.number, row
        if alive[row] and (other := living.setdefault(id_, place)) < place:
            living[id_] = place
            both = " and ".join(f"{names[number]} row {row}" for number, row in (other, place))
            yield Damage(Kind.TWICE, f"{id_!r} is in the index twice: {both}", other[0], np.array([other[1]]))

    try:
        for row, id_, _ in catalogue.rows(segment.number, segment.items):
            yield from meet(row, id_)
    except BundleError as error:
        sound, _ = catalogue.sound_items(segment.number, segment.items)
        for row, (id_, _) in sound.items():
            yield from meet(row, id_)
        yield _of(error, Kind.ITEMS, segment.number, np.setdiff1d(np.arange(segment.items), list(sound)))
    except MetaEmbedError as error:
        yield _of(error, Kind.UNREADABLE)
