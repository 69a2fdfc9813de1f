"""The catalogue of an index in SQLite: which segments there are, which rows are dead, and every row's id and payload.

One transaction makes an addition visible. The rollback journal, not WAL: WAL needs shared memory (no network disks) and a
writable folder (no read-only media), and pays when commits are frequent; ours come once per batch. SQLite checks its
structure, not its content, so every row carries a CRC-32 of its fields.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, MetaEmbedError, UsageError
from .index_layout import Layout

CATALOGUE = "catalogue.sqlite"
FORMAT = 1
APPLICATION = 0x4D45_4958  # "MEIX", so that `file` and we can tell the catalogue from any other database
BUSY_SECONDS = 30
MOST_VARIABLES = 900  # of one statement; SQLite allowed 999 before 3.32
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, items INTEGER NOT NULL, checksum INTEGER NOT NULL,
    dead BLOB NOT NULL, crc INTEGER NOT NULL
);
CREATE TABLE items (
    segment INTEGER NOT NULL, row INTEGER NOT NULL, id TEXT NOT NULL, payload TEXT, crc INTEGER NOT NULL,
    PRIMARY KEY (segment, row)
) WITHOUT ROWID;
CREATE INDEX items_by_id ON items (id);
"""
Place = tuple[int, int]  # segment number, row


@dataclass(frozen=True)
class SegmentRow:
    """A segment as the catalogue knows it; `dead` holds a bit per row."""

    number: int
    name: str
    items: int
    checksum: int
    dead: bytes

    @property
    def alive(self) -> NDArray[np.bool_]:
        if not self.dead:
            return np.ones(self.items, bool)
        return ~np.unpackbits(np.frombuffer(self.dead, np.uint8), count=self.items).astype(bool)


def pack_dead(alive: NDArray[np.bool_]) -> bytes:
    """The `dead` of a segment row; empty while all are alive."""
    return b"" if alive.all() else np.packbits(~alive).tobytes()


def _crc(*fields: object) -> int:
    return zlib.crc32(repr(fields).encode())


class Catalogue:
    """An open catalogue. Statements that need one state of it go inside ``with catalogue.reading()`` or ``writing()``.

    Threads take turns: a connection has one transaction at a time.
    """

    def __init__(self, folder: Path, *, write: bool = False) -> None:
        self.path = folder / CATALOGUE
        self._turn = threading.RLock()
        with self._sentences():
            # mode=rw also for readers: after a writer was killed, the first to open the file rolls its journal back.
            # SQLite itself falls back to reading where the file may not be written.
            self._db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, check_same_thread=False,
                isolation_level=None,
            )  # fmt: skip
            self._db.execute(f"PRAGMA query_only = {int(not write)}")
            self._db.execute(
                "PRAGMA synchronous = EXTRA"
            )  # the journal's removal is the commit: it must be durable too
            self._check_format()

    @classmethod
    def create(cls, folder: Path, layout: Layout, about: dict[str, str]) -> None:
        """Write the catalogue of an empty index."""
        connection = sqlite3.connect(folder / CATALOGUE)
        try:
            connection.executescript(SCHEMA)
            rows = {"layout": json.dumps(layout.to_json()), **about}
            connection.executemany("INSERT INTO about VALUES (?, ?, ?)", [(k, v, _crc(k, v)) for k, v in rows.items()])
            connection.commit()
        finally:
            connection.close()

    def close(self) -> None:
        with self._turn:
            self._db.close()

    def version(self) -> int:
        """Changes whenever another connection has committed."""
        with self._sentences():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def about(self) -> dict[str, str]:
        with self._sentences():
            found = {}
            for key, value, crc in self._db.execute("SELECT key, value, crc FROM about"):
                self._expect(crc, key, value)
                found[key] = value
            return found

    def segments(self) -> list[SegmentRow]:
        with self._sentences():
            rows = []
            for *fields, crc in self._db.execute("SELECT number, name, items, checksum, dead, crc FROM segments"):
                self._expect(crc, *fields)
                rows.append(row := SegmentRow(*fields))
                if row.name != Path(row.name).name or not row.name.endswith(".safetensors"):
                    raise BundleError(f"{self.path} names a segment {row.name!r}, which is no file name; restore it")
            return rows

    def describe(self, places: Sequence[Place]) -> dict[Place, tuple[str, Any]]:
        """Id and payload of rows; a row that is not there (compacted away since) is left out."""
        found: dict[Place, tuple[str, Any]] = {}
        with self._sentences():
            for segment, row in places:
                statement = "SELECT id, payload, crc FROM items WHERE segment = ? AND row = ?"
                for id_, payload, crc in self._db.execute(statement, (segment, row)):
                    self._expect(crc, segment, row, id_, payload)
                    found[segment, row] = id_, None if payload is None else json.loads(payload)
        return found

    def places(self, ids: Iterable[str]) -> dict[str, list[Place]]:
        """Where ids are stored, dead rows included."""
        found: dict[str, list[Place]] = {}
        ids = list(ids)
        with self._sentences():
            for start in range(0, len(ids), MOST_VARIABLES):
                some = ids[start : start + MOST_VARIABLES]
                marks = ",".join("?" * len(some))
                statement = f"SELECT id, segment, row FROM items WHERE id IN ({marks})"
                for id_, segment, row in self._db.execute(statement, some):
                    found.setdefault(id_, []).append((segment, row))
        return found

    def rows(self, segment: int) -> Iterator[tuple[int, str, str | None]]:
        """Row, id and payload (as JSON) of a segment's items, in order of rows."""
        with self._sentences():
            statement = "SELECT row, id, payload, crc FROM items WHERE segment = ? ORDER BY row"
            for row, id_, payload, crc in self._db.execute(statement, (segment,)):
                self._expect(crc, segment, row, id_, payload)
                yield row, id_, payload

    def check_rows(self, segment: int, items: int) -> None:
        """Read all rows of a segment; a BundleError when one is damaged or missing."""
        count = sum(1 for _ in self.rows(segment))
        if count != items:
            raise BundleError(
                f"{self.path} is damaged: {count} of {items} rows are left of segment {segment}; restore it"
            )

    def select(self, segment: int, condition: str, values: Sequence[object]) -> list[int]:
        """Rows of a segment that satisfy a condition written by `parse_filters`, never by a user."""
        with self._sentences():
            statement = f"SELECT row FROM items WHERE segment = ? AND ({condition})"
            return [row for (row,) in self._db.execute(statement, (segment, *values))]

    def add_segment(self, name: str, checksum: int, items: Sequence[tuple[str, str | None]]) -> int:
        """Enter a segment and its rows' (id, payload as JSON). Inside `writing` only."""
        cursor = self._db.execute(
            "INSERT INTO segments (name, items, checksum, dead, crc) VALUES (?, ?, ?, x'', 0)",
            (name, len(items), checksum),
        )
        number = int(cursor.lastrowid or 0)
        self.set_dead(SegmentRow(number, name, len(items), checksum, b""))
        self._db.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
            [(number, row, id_, text, _crc(number, row, id_, text)) for row, (id_, text) in enumerate(items)],
        )
        return number

    def set_about(self, key: str, value: str) -> None:
        """Store an entry of `about`. Inside `writing` only."""
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?, ?)", (key, value, _crc(key, value)))

    def set_dead(self, row: SegmentRow) -> None:
        """Store a segment row's `dead`. Inside `writing` only."""
        crc = _crc(row.number, row.name, row.items, row.checksum, row.dead)
        self._db.execute("UPDATE segments SET dead = ?, crc = ? WHERE number = ?", (row.dead, crc, row.number))

    def drop_segments(self, numbers: Iterable[int]) -> None:
        """Forget segments and their rows. Inside `writing` only."""
        gone = [(number,) for number in numbers]
        self._db.executemany("DELETE FROM items WHERE segment = ?", gone)
        self._db.executemany("DELETE FROM segments WHERE number = ?", gone)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One state of the catalogue for all statements inside."""
        with self._sentences(), self._transaction("BEGIN"):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: everything inside becomes visible and durable together, or not at all."""
        with self._sentences(), self._transaction("BEGIN IMMEDIATE"):
            yield

    def find_damage(self) -> list[str]:
        """What SQLite says against the file's structure; empty when it is sound."""
        try:
            with self._turn:
                found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:
            found = [str(error)]
        return [f"{self.path}: {line}" for line in found if line != "ok"]

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._db.execute(begin)
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn what SQLite reports into one sentence; one thread at a time."""
        try:
            with self._turn:
                yield
        except sqlite3.ProgrammingError as error:
            raise UsageError(f"the index {self.path.parent} is closed") from error
        except sqlite3.OperationalError as error:
            raise MetaEmbedError(self._sentence(str(error))) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{self.path} is damaged ({error}); restore it, or index again") from error

    def _sentence(self, reason: str) -> str:
        if "unable to open" in reason:
            return f"{self.path} cannot be opened; is {self.path.parent} an index, and readable?"
        if "disk is full" in reason:
            return "the disk is full; nothing of this batch was kept; free some space and run again"
        if "readonly" in reason:
            return f"{self.path} cannot be written: the file or its disk is read-only"
        if "locked" in reason:
            return f"{self.path} stayed locked by another process for {BUSY_SECONDS} s; try again"
        return f"{self.path} cannot be used ({reason}); restore it, or index again"

    def _expect(self, crc: int, *fields: object) -> None:
        if crc != _crc(*fields):
            raise BundleError(f"{self.path} is damaged in the row of {fields[:3]}; restore it, or index again")

    def _check_format(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise BundleError(f"{self.path} is no catalogue of an index, or damaged")
        if version != FORMAT:
            raise BundleError(f"{self.path} has format {version}; this version reads {FORMAT}; update metaembed-export")
