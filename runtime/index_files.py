"""The files of an index beside its catalogue: who may write them, segments made of others' rows, and what nothing refers to."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import UsageError
from .index_ann import KEY, SUFFIX
from .index_catalogue import CATALOGUE, Catalogue
from .index_layout import SEGMENTS, Layout
from .index_segment import Rows, Segment, Source, write_segment
from .maxsim import Vectors

LOCK = "writer.lock"
REBUILT = "rebuilt-"  # a folder in which `repair_index` prepares a catalogue
PIECE_BYTES = 1 << 22  # copied at a time when merging


class WriterLock:
    """Held by the one process that writes to an index, until `close`.

    Raises:
        UsageError: there is no index, or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CATALOGUE).is_file():
            raise UsageError(f"{folder} is no index: it has no {CATALOGUE}; metaembed-index makes one")
        self._pid = os.getpid()
        self._file = open(folder / LOCK, "a")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"another process is writing to {folder}; wait for it to finish") from None
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        if not self._file.closed:
            if self._pid == os.getpid():  # a child would let go of its parent's
                fcntl.flock(self._file, fcntl.LOCK_UN)  # or a child that was forked meanwhile would go on holding it
            self._file.close()


def write_new_segment(folder: Path, layout: Layout, items: int, source: Source) -> tuple[str, int]:
    """Write a segment of an index under a name of its own; the name and the checksum."""
    name = f"{uuid.uuid4().hex}.safetensors"  # never used twice: a reader may still map an older file
    return name, write_segment(folder / SEGMENTS / name, layout, items, source)


def copy_rows(folder: Path, layout: Layout, parts: Sequence[tuple[Segment, Rows]]) -> tuple[str, int]:
    """Write a new segment of some rows of others, which the caller has checked."""

    def source(group: int) -> Iterator[Vectors]:
        step = max(1, PIECE_BYTES // layout.item_bytes)
        for segment, rows in parts:
            for start in range(0, len(rows), step):
                yield segment.piece(group, rows[start : start + step])

    return write_new_segment(folder, layout, sum(len(rows) for _, rows in parts), source)


def remove_leftovers(folder: Path, catalogue: Catalogue) -> None:
    """Remove what killed writers left: files of which the catalogue, all of whose segments are known, knows nothing."""
    known = {row.name for row in catalogue.segments()}
    for path in (folder / SEGMENTS).iterdir():
        if path.name not in known and path.suffix in (".safetensors", ".partial"):
            path.unlink()
    graph = catalogue.about().get(KEY, "")
    for path in folder.glob("ann-*"):
        if path.suffix in (SUFFIX, ".partial") and path.name not in graph:
            path.unlink()
    for path in folder.glob(f"{REBUILT}*"):
        shutil.rmtree(path)
