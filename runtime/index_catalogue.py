"""The catalogue of an index in SQLite: which segments there are, which rows are dead, and every row's id and payload.

One transaction makes an addition visible. The rollback journal, not WAL: WAL needs shared memory (no network disks) and a
writable folder (no read-only media), and pays when commits are frequent; ours come once per batch. SQLite checks its
structure, not its content: one flipped bit hides a row or leads the index of ids to another. So every row carries a CRC-32 of
its fields, `about` and `segments` are read whole and compared with a tally of their rows, and a writer, which relies on the
index of ids and removes files, first has SQLite compare everything (1.4 s for a million items).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .index_database import Database
from .index_layout import Layout
from .index_payload import read_payload
from .index_schema import (
    APPLICATION,
    CHECKSUMS,
    FIELDS,
    FORMAT,
    SCHEMA,
    STATE,
    STRUCTURE,
    TALLIES,
    UNTALLIED,
    row_crc,
    structure,
)
from .index_segment import Rows
from .index_sentences import damage, on_one_line, sentences

CATALOGUE = "catalogue.sqlite"
MOST_VARIABLES = 900  # of one statement; SQLite allowed 999 before 3.32
SQLITE_BUSY, SQLITE_LOCKED = 5, 6  # the module names them from Python 3.11 on
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


class Catalogue(Database):
    """An open catalogue. Statements that need one state of it go inside ``with catalogue.reading()`` or ``writing()``."""

    def __init__(self, folder: Path, *, write: bool = False) -> None:
        super().__init__(folder / CATALOGUE, write=write)
        self._crc = row_crc  # that of the format which a transaction finds: others may raise it in between
        try:
            self._check_structure()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: Path, layout: Layout, about: dict[str, str], *, last: int = 0) -> None:
        """Write the catalogue of an empty index, in which segments are numbered from `last` + 1 on."""
        rows = {"layout": json.dumps(layout.to_json()), **about}
        crcs = [row_crc(key, value) for key, value in rows.items()]
        rows[STATE] = json.dumps({"about": [len(crcs), sum(crcs)], "segments": [0, 0], "last": last})
        path = folder / CATALOGUE
        with sentences(path), closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA)
            connection.executemany(
                "INSERT INTO about VALUES (?, ?, ?)", [(k, v, row_crc(k, v)) for k, v in rows.items()]
            )
            connection.commit()

    @property
    def tallied(self) -> bool:
        """Whether it says how many segments there are: format 1 did not."""
        return self._format() != UNTALLIED

    def about(self) -> dict[str, str]:
        with self.reading():
            found: dict[str, str] = {}
            total = 0
            for key, value, crc in self._db.execute("SELECT key, value, crc FROM about"):
                self._expect(crc, key, value)
                found[key] = value
                total += crc if key != STATE else 0
            found.pop(STATE, None)
            self._compare("about", len(found), total)
            return found

    def layout(self) -> Layout:
        try:
            return Layout.from_json(json.loads(self.about()["layout"]))
        except KeyError as error:
            raise self._damage(f"(it does not say {error})") from None

    def segments(self) -> list[SegmentRow]:
        with self.reading():
            rows: list[SegmentRow] = []
            total = 0
            for *fields, crc in self._db.execute("SELECT number, name, items, checksum, dead, crc FROM segments"):
                self._expect(crc, *fields)
                rows.append(row := SegmentRow(*fields))
                total += crc
                if row.name != Path(row.name).name or not row.name.endswith(".safetensors"):
                    raise BundleError(f"{self.path} names a segment {row.name!r}, which is no file name; restore it")
            self._compare("segments", len(rows), total)
            return rows

    def describe(self, places: Iterable[Place]) -> dict[Place, tuple[str, Any]]:
        """Id and payload of rows; those of a segment that is not there (compacted away since) are left out."""
        found: dict[Place, tuple[str, Any]] = {}
        lost: list[Place] = []
        with self.reading():
            for place in places:
                if (item := self._item(*place)) is None:
                    lost.append(place)
                else:
                    found[place] = item[0], read_payload(item[1], f"the payload of {item[0]!r} in {self.path}")
            there = {row.number for row in self.segments()} if lost else set()
        for segment, row in lost:
            if segment in there:
                raise self._damage(f"(row {row} of segment {segment} is missing)")
        return found

    def places(self, ids: Iterable[str]) -> dict[str, list[Place]]:
        """Where ids are stored, dead rows included.

        That an id is not there is what `items_by_id` says, which `find_damage` compares with the rows when a writer opens.
        """
        found: dict[str, list[Place]] = {}
        ids = list(ids)
        with self.reading():
            for start in range(0, len(ids), MOST_VARIABLES):
                some = ids[start : start + MOST_VARIABLES]
                marks = ",".join("?" * len(some))
                statement = f"SELECT id, segment, row, payload, crc FROM items WHERE id IN ({marks})"
                for id_, segment, row, payload, crc in self._db.execute(statement, some):
                    self._expect(crc, segment, row, id_, payload)
                    found.setdefault(id_, []).append((segment, row))
        if not found.keys() <= set(ids):
            raise self._damage("in its index of ids")
        return found

    def rows(self, segment: int, items: int) -> Iterator[tuple[int, str, str | None]]:
        """Row, id and payload (as JSON) of all so many items of a segment, in order.

        Raises:
            BundleError: a row is damaged or missing.
        """
        with self.reading():
            expected = 0
            statement = "SELECT row, id, payload, crc FROM items WHERE segment = ? ORDER BY row"
            for row, id_, payload, crc in self._db.execute(statement, (segment,)):
                self._expect(crc, segment, row, id_, payload)
                if row != expected:
                    break
                yield row, id_, payload
                expected += 1
            if expected != items:
                raise self._damage(f"(row {expected} of segment {segment} is missing)")

    def sound_items(self, segment: int, items: int) -> tuple[dict[int, tuple[str, str | None]], str]:
        """Id and payload (as JSON) of the rows of a segment that can be read, and the first sentence against the others.

        Where there are others, every row is looked up (5 s a million).
        """
        try:
            return {row: (id_, payload) for row, id_, payload in self.rows(segment, items)}, ""
        except BundleError as error:
            scan = str(error)
        found: dict[int, tuple[str, str | None]] = {}
        first = ""
        with self.reading():
            for row in range(items):
                try:
                    if (item := self._item(segment, row)) is None:
                        raise self._damage(f"(row {row} of segment {segment} is missing)")
                    found[row] = item
                except BundleError as error:
                    first = first or str(error)
        return found, first or scan

    def select(self, segment: int, condition: str, values: Sequence[object], rows: Rows | None = None) -> Rows:
        """Rows of a segment that satisfy a condition written by `parse_filters`, never by a user.

        Args:
            rows: where others are damaged, those to look at, one by one.
        """
        with self._sentences():
            if rows is None:
                statement = f"SELECT row FROM items WHERE segment = ? AND ({condition})"
                return np.fromiter((row for (row,) in self._db.execute(statement, (segment, *values))), np.int64)
            statement = f"SELECT row FROM items WHERE segment = ? AND row = ? AND ({condition})"
            found = (row for row in rows.tolist() if self._db.execute(statement, (segment, row, *values)).fetchone())
            return np.fromiter(found, np.int64)

    def add_segment(self, name: str, checksum: int, items: Sequence[tuple[str, str | None]]) -> int:
        """Enter a segment and its rows' (id, payload as JSON). Inside `writing` only."""
        number = self.last_number() + 1
        self.enter(
            SegmentRow(number, name, len(items), checksum, b""), ((row, *item) for row, item in enumerate(items))
        )
        return number

    def enter(self, row: SegmentRow, items: Iterable[tuple[int, str, str | None]]) -> None:
        """Store a segment row, and the (row, id, payload as JSON) of its items. Inside `writing` only."""
        fields = (row.number, row.name, row.items, row.checksum, row.dead)
        self._db.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?)", (*fields, self._crc(*fields)))
        self._db.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
            ((row.number, *item, self._crc(row.number, *item)) for item in items),
        )

    def set_about(self, key: str, value: str) -> None:
        """Store an entry of `about`. Inside `writing` only."""
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?, ?)", (key, value, self._crc(key, value)))

    def set_dead(self, row: SegmentRow) -> None:
        """Store a segment row's `dead`. Inside `writing` only."""
        crc = self._crc(row.number, row.name, row.items, row.checksum, row.dead)
        self._db.execute("UPDATE segments SET dead = ?, crc = ? WHERE number = ?", (row.dead, crc, row.number))

    def drop_segments(self, numbers: Iterable[int]) -> None:
        """Forget segments and their rows. Inside `writing` only."""
        gone = [(number,) for number in numbers]
        self._db.executemany("DELETE FROM items WHERE segment = ?", gone)
        self._db.executemany("DELETE FROM segments WHERE number = ?", gone)

    def last_number(self) -> int:
        """The largest segment number that was ever given."""
        ever = "SELECT max(seq) FROM sqlite_sequence"
        last = self._state()["last"] if self.tallied else self._db.execute(ever).fetchone()[0]
        return max(last or 0, self._db.execute("SELECT max(number) FROM segments").fetchone()[0] or 0)

    def overwrite(self, other: Catalogue) -> None:
        """Put what is in this catalogue in the place of all that is in another, damaged pages included, in one transaction.

        An open reader of the other one sees it as it sees any commit.
        """

        def give_up(status: int, remaining: int, total: int) -> None:
            if status in (SQLITE_BUSY, SQLITE_LOCKED):  # after BUSY_SECONDS; Python would try for ever
                raise sqlite3.OperationalError("database is locked")

        with self._sentences(), other._sentences():
            self._db.backup(other._db, progress=give_up)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One state of the catalogue for all statements inside; within another transaction, that one's."""
        with self._sentences():
            if self._db.in_transaction:
                yield
            else:
                with self._transaction("BEGIN", "ROLLBACK"):  # a COMMIT repeats what a read found malformed
                    self._crc = self._checksum()
                    yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: everything inside becomes visible and durable together, or not at all."""
        with self._sentences(), self._transaction("BEGIN IMMEDIATE", "COMMIT"):
            self._crc = self._checksum()
            for table in TALLIES:  # or what was lost since the opening would be taken for right
                self._compare(table, *self._tally(table))
            yield
            last = self.last_number()
            if self._format() != FORMAT:
                self._raise_format()
            tallies = {table: self._tally(table) for table in TALLIES}
            self.set_about(STATE, json.dumps({**tallies, "last": last}))

    def find_damage(self) -> list[str]:
        """What speaks against the catalogue, payloads and rows' checksums apart; empty when it is sound."""
        try:
            with self.reading():
                found = [on_one_line(row[0]) for row in self._db.execute("PRAGMA integrity_check")]
                if found != ["ok"]:
                    return [str(self._damage(f"({line})")) for line in found]
                self.layout()
                counts = dict(self._db.execute("SELECT segment, count(*) FROM items GROUP BY segment"))
                if counts != {row.number: row.items for row in self.segments()}:
                    return [str(self._damage("(its items are not those of its segments)"))]
        except BundleError as error:
            return [str(error)]
        return []

    def _item(self, segment: int, row: int) -> tuple[str, str | None] | None:
        """Id and payload (as JSON) of a row; None where there is none."""
        with self.reading():
            statement = "SELECT id, payload, crc FROM items WHERE segment = ? AND row = ?"
            for id_, payload, crc in self._db.execute(statement, (segment, row)):
                self._expect(crc, segment, row, id_, payload)
                return id_, payload
        return None

    def _tally(self, table: str) -> tuple[int, int]:
        rows, total = self._db.execute(TALLIES[table]).fetchone()
        return rows, total

    def _compare(self, table: str, rows: int, total: int) -> None:
        """Refuse a table that does not hold the rows that it was left with."""
        if self.tallied and self._state()[table] != [rows, total]:
            raise self._damage(f"(rows of its {table} are missing)")

    def _state(self) -> dict[str, Any]:
        for value, crc in self._db.execute("SELECT value, crc FROM about WHERE key = ?", (STATE,)):
            self._expect(crc, STATE, value)
            state: dict[str, Any] = json.loads(value)
            return state
        raise self._damage("(the tally of its rows is missing)")

    def _format(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _raise_format(self) -> None:
        """Give all rows the checksums of our format, once they were compared with those of their own."""
        for table, fields in FIELDS.items():
            for *values, crc in self._db.execute(f"SELECT {fields}, crc FROM {table}"):
                self._expect(crc, *values)
        self._crc = row_crc
        self._db.create_function("row_crc", -1, row_crc, deterministic=True)
        for table, fields in FIELDS.items():
            self._db.execute(f"UPDATE {table} SET crc = row_crc({fields}) WHERE crc <> row_crc({fields})")
        self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def _damage(self, what: str) -> BundleError:
        return damage(self.path, what)

    def _expect(self, crc: int, *fields: object) -> None:
        if crc != self._crc(*fields):
            older = self._crc is not row_crc and not all(field.isascii() for field in fields if isinstance(field, str))
            or_else = (
                ", or another version of Python wrote it, under which it must be written to once more" if older else ""
            )
            raise self._damage(f"in the row of {fields[:3]}{or_else}")

    def _checksum(self) -> Callable[..., int]:
        if (version := self._format()) not in CHECKSUMS:
            raise BundleError(f"{self.path} has format {version}; this version reads {FORMAT}; update metaembed-export")
        return CHECKSUMS[version]

    def _check_structure(self) -> None:
        with self._sentences():
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            if application != APPLICATION:
                raise BundleError(f"{self.path} is no catalogue of an index, or damaged")
            self._checksum()
            if not structure() <= set(self._db.execute(STRUCTURE)):
                raise self._damage("(its tables are not those of an index)")
