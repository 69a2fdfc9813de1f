"""Reading a whole index and naming everything that is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import MetaEmbedError
from .index_ann import map_graph, read_record
from .index_catalogue import Catalogue, SegmentRow
from .index_layout import Layout
from .index_segment import Segment


def find_damage(folder: Path, layout: Layout, catalogue: Catalogue) -> list[str]:
    """One sentence per damage: in the catalogue's structure and rows, in segment files, and between the two."""
    found = catalogue.find_damage()
    if found:
        return found  # nothing that such a file says can be relied upon
    living: dict[str, str] = {}
    for row in catalogue.segments():
        found += _segment_damage(folder, layout, row)
        found += _rows_damage(catalogue, row, living)
    found += _ann_damage(folder, catalogue)
    return found


def _ann_damage(folder: Path, catalogue: Catalogue) -> Iterator[str]:
    try:
        if record := read_record(folder, catalogue):
            map_graph(folder, record)
    except (MetaEmbedError, OSError) as error:
        yield str(error)


def _segment_damage(folder: Path, layout: Layout, row: SegmentRow) -> Iterator[str]:
    try:
        segment = Segment(folder / "segments" / row.name, layout, row.items, row.checksum)
        for damaged in (segment.check(layout.vectors), segment.check_screen()):
            if len(damaged):
                yield str(segment.damage(damaged))
    except (MetaEmbedError, OSError) as error:
        yield str(error)


def _rows_damage(catalogue: Catalogue, segment: SegmentRow, living: dict[str, str]) -> Iterator[str]:
    """Rows of the catalogue: one per item, with sound checksums, and no id alive twice."""
    alive = segment.alive
    try:
        for row, id_, _ in catalogue.rows(segment.number, segment.items):
            if alive[row] and living.setdefault(id_, place := f"{segment.name} row {row}") != place:
                yield f"{id_!r} is in the index twice: {living[id_]} and {place}"
    except MetaEmbedError as error:
        yield str(error)
