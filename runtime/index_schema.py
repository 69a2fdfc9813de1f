"""The tables of an index's catalogue, the marks of its file, and how both are recognised."""

from __future__ import annotations

import functools
import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing

FORMAT = 3  # older ones are read as they are, and brought to ours by the first transaction that writes
UNTALLIED = 1  # the format without tallies; of 1 and 2 the checksums are others
APPLICATION = 0x4D45_4958  # "MEIX", so that `file` and we can tell the catalogue from any other database
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
STATE = "state"  # the key in `about` of the tallies, and of the largest segment number that was ever given
# Rows and the sum of their checksums. `about` is counted without its row of tallies.
TALLIES = {
    "about": f"SELECT count(*), coalesce(sum(crc), 0) FROM about WHERE key <> '{STATE}'",
    "segments": "SELECT count(*), coalesce(sum(crc), 0) FROM segments",
}
# What a row's checksum is of, table by table.
FIELDS = {
    "about": "key, value",
    "segments": "number, name, items, checksum, dead",
    "items": "segment, row, id, payload",
}
STRUCTURE = "SELECT type, name, tbl_name, sql FROM sqlite_master"


def row_crc(*fields: object) -> int:
    """The checksum of a row's other fields. `ascii` escapes every other character, so that all interpreters find the same."""
    return zlib.crc32(ascii(fields).encode())


def repr_crc(*fields: object) -> int:
    """The checksum of formats 1 and 2: Python escapes the characters that its version of Unicode does not know."""
    return zlib.crc32(repr(fields).encode())


# Of every format that is read.
CHECKSUMS: dict[int, Callable[..., int]] = {UNTALLIED: repr_crc, 2: repr_crc, FORMAT: row_crc}


@functools.cache
def structure() -> frozenset[tuple[str, ...]]:
    """What `SCHEMA` makes, as SQLite describes it."""
    with closing(sqlite3.connect(":memory:")) as empty:
        empty.executescript(SCHEMA)
        return frozenset(empty.execute(STRUCTURE))
