"""Checksums of the catalogue's rows, which every Python has to find alike, and indexes of the formats in which it did not."""

import json
import os
import signal
import sqlite3
import zlib
from contextlib import closing

import numpy as np
import pytest

from metaembed.runtime.errors import BundleError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_catalogue import CATALOGUE, Catalogue
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_schema import STATE, row_crc
from metaembed.runtime.index_writer import IndexWriter

D = 8
QUERY = np.ones((1, D), np.float32)
IDS = ["plain", "caf\u00e9", "shaking \U0001fae8", "d\u0000'\"\\", "gone"]
PAYLOADS = [None, {"t": "\u31f0 \U0001fae0"}, {"t": "x"}, {"t": "\u200b"}, None]


def repr_crc(*fields):
    """The formula of formats 1 and 2, as their code had it."""
    return zlib.crc32(repr(fields).encode())


def escaped_crc(*fields):
    return zlib.crc32(str(fields).encode("ascii", "backslashreplace"))


TABLES = {
    "about": "key, value",
    "segments": "number, name, items, checksum, dead",
    "items": "segment, row, id, payload",
}


def sql(folder, statement, *values):
    with closing(sqlite3.connect(folder / CATALOGUE)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def checksums(folder, formula):
    """Tables with a row whose checksum is another."""
    return {
        table
        for table, fields in TABLES.items()
        for *values, crc in sql(folder, f"SELECT {fields}, crc FROM {table}")
        if crc != formula(*values)
    }


def age(folder, version):
    """Make an index what an earlier version of us, under this Python, would have written."""
    with closing(sqlite3.connect(folder / CATALOGUE)) as connection, connection:
        connection.create_function("old", -1, repr_crc)
        connection.execute("DELETE FROM about WHERE key = ?", (STATE,))
        for table, fields in TABLES.items():
            connection.execute(f"UPDATE {table} SET crc = old({fields})")
        if version == 2:
            tallies = {
                table: connection.execute(f"SELECT count(*), sum(crc) FROM {table}").fetchone()
                for table in ("about", "segments")
            }
            state = json.dumps({**tallies, "last": 2})
            connection.execute("INSERT INTO about VALUES (?, ?, ?)", (STATE, state, repr_crc(STATE, state)))
        connection.execute(f"PRAGMA user_version = {version}")
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two segments, the last item of the second dead."""
    Index.create(tmp_path / "index", Layout(D, (1,)), bundle="/b\u00fcndel/\U0001fae8")
    with IndexWriter(tmp_path / "index") as writer:
        writer.add(["first \U0001fae8"], np.ones((1, 1, D), np.float32))
        writer.add(IDS, np.ones((5, 1, D), np.float32), PAYLOADS)
        writer.delete(["gone"])
    return tmp_path / "index"


def contents(folder):
    with Index.open(folder) as index:
        assert index.verify() == []
        assert index.bundle == "/b\u00fcndel/\U0001fae8"
        return {hit.id: hit.payload for hit in index.search(QUERY, 3000)}


SOUND = {"first \U0001fae8": None, **dict(zip(IDS[:4], PAYLOADS, strict=False))}


def test_a_checksum_is_the_same_whatever_the_interpreter_knows_of_unicode():
    """Expected: gzip's CRC of the text, with escapes, that is in each row. U+1FAE8 and U+1FAE0 are of Unicode 15 and 14."""
    # printf '%s' "(2, 7, '\\u31f0', None)" | gzip -c | tail -c8 | head -c4 | od -An -tu4
    payload = '{"t": "\U0001fae0 caf\u00e9"}'
    assert row_crc(1, 0, "a \U0001fae8.png", payload) == 138188061
    assert row_crc(2, 7, "\u31f0", None) == 3516095010
    assert row_crc(3, "0123.safetensors", 5, 4026531840, b"\x80") == 1137976489
    assert row_crc(3, "0123.safetensors", 5, 4026531840, b"") == 3397968709
    assert len({row_crc(value) for value in (1, "1", b"1", 1.0, None, "", b"", "None", "\ud800")}) == 9


def test_a_new_index_has_these_checksums(folder):
    """Expected: Python's own escapes, of a text rather than of its representation."""
    assert sql(folder, "PRAGMA user_version") == [(3,)]
    assert checksums(folder, escaped_crc) == set()
    assert checksums(folder, repr_crc) == {"about", "items"}  # or nothing here would tell the formats apart


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_index_is_read_and_left_as_it_is(folder, version):
    content = (age(folder, version) / CATALOGUE).read_bytes()
    assert checksums(folder, repr_crc) == set()
    assert contents(folder) == SOUND
    with IndexWriter(folder) as writer:
        assert writer.known(IDS) == set(IDS[:4])
    assert (folder / CATALOGUE).read_bytes() == content


WRITES = {
    "add": lambda writer: writer.add(["n\u00e9w \U0001fae8"], np.ones((1, 1, D), np.float32)),
    "update": lambda writer: writer.add([IDS[2]], np.ones((1, 1, D), np.float32), replace=True),
    "delete": lambda writer: writer.delete([IDS[1]]),
    "compact": lambda writer: writer.compact(),
}
AFTER = {
    "add": {**SOUND, "n\u00e9w \U0001fae8": None},
    "update": {**SOUND, IDS[2]: None},
    "delete": {id_: payload for id_, payload in SOUND.items() if id_ != IDS[1]},
    "compact": SOUND,
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("write", WRITES)
def test_the_first_transaction_that_writes_brings_an_older_index_to_ours(folder, version, write):
    with Index.open(age(folder, version)) as reader:
        assert len(reader.search(QUERY, 20)) == 5
        with IndexWriter(folder) as writer:
            WRITES[write](writer)
            assert sql(folder, "PRAGMA user_version") == [(3,)]
            assert checksums(folder, escaped_crc) == set()
            writer.add(["another"], np.ones((1, 1, D), np.float32))
            writer.delete(["another"])
        assert {hit.id: hit.payload for hit in reader.search(QUERY, 20)} == AFTER[write]  # opened in the other format
    assert contents(folder) == AFTER[write]
    ((state,),) = sql(folder, "SELECT value FROM about WHERE key = ?", STATE)
    for table in ("about", "segments"):
        rest = f"SELECT count(*), sum(crc) FROM {table}" + f" WHERE key <> '{STATE}'" * (table == "about")
        assert sql(folder, rest) == [tuple(json.loads(state)[table])]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE items SET payload = '{}' WHERE id = 'plain'", "'plain'"),
        ("UPDATE items SET crc = crc + 1 WHERE row = 1", "'caf"),
        ("UPDATE segments SET checksum = checksum + 1 WHERE number = 1", "row of"),
        ("UPDATE about SET crc = crc + 1 WHERE key = 'fingerprint'", "row of"),
    ],
)
def test_a_damaged_row_of_an_older_index_is_never_given_a_right_checksum(folder, version, statement, named):
    sql(age(folder, version), statement)
    content, files = (folder / CATALOGUE).read_bytes(), set((folder / SEGMENTS).iterdir())
    for work in WRITES["add"], WRITES["delete"], WRITES["compact"]:
        with pytest.raises(BundleError, match=f"damaged .*{named}"), IndexWriter(folder) as writer:
            work(writer)
    assert (folder / CATALOGUE).read_bytes() == content
    assert set((folder / SEGMENTS).iterdir()) == files


def test_a_row_that_another_python_may_have_written_is_said_to_be(folder):
    """In an older index, and where it holds what Pythons write differently: as 3.11 wrote U+1FAE8, which 3.12 knows."""
    escapes = "(2, 2, 'shaking \\U0001fae8', '{\"t\": \"x\"}')"
    assert sql(folder, "SELECT segment, row, id, payload FROM items WHERE id = ?", IDS[2])
    other = zlib.crc32(escapes.encode())
    if other == repr_crc(2, 2, IDS[2], '{"t": "x"}'):  # by a Python that does not know it either: as 3.12 wrote it
        other = zlib.crc32(escapes.replace("\\U0001fae8", "\U0001fae8").encode())
    sql(age(folder, 2), "UPDATE items SET crc = ? WHERE id = ?", other, IDS[2])
    says = "or another version of Python wrote it, under which it must be written to once more"
    with Index.open(folder) as index, pytest.raises(BundleError, match=says):
        index.search(QUERY, 20)
    sql(folder, "UPDATE items SET crc = 0 WHERE id = 'plain'")
    with Index.open(folder) as index, pytest.raises(BundleError) as caught:
        index.search(QUERY, 20)
    assert "Python" not in str(caught.value)


def test_a_kill_while_the_format_is_raised_leaves_the_older_one(folder):
    """Killed before the commit, by which time pages with new checksums are in the file: the journal undoes them."""
    many = [f"\U0001fae8 {i}" for i in range(2000)]
    with IndexWriter(folder) as writer:
        writer.add(many, np.ones((2000, 1, D), np.float32))
    content = (age(folder, 2) / CATALOGUE).read_bytes()
    if (child := os.fork()) == 0:
        with IndexWriter(folder) as writer:
            catalogue = writer._catalogue
            catalogue._db.execute("PRAGMA cache_size = 1")  # so that changed pages are written before the end
            catalogue.set_about = lambda key, value: os.kill(os.getpid(), signal.SIGKILL)
            writer.delete(["plain"])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (folder / CATALOGUE).read_bytes() != content
    assert len(contents(folder)) == 2005
    assert (folder / CATALOGUE).read_bytes() == content
    assert sql(folder, "PRAGMA user_version") == [(2,)]


def test_a_newer_format_is_refused_also_by_who_has_the_index_open(folder):
    with Index.open(folder) as index, IndexWriter(folder) as writer:
        sql(folder, "PRAGMA user_version = 4")
        for work in (lambda: index.search(QUERY, 20), lambda: writer.delete(["plain"]), lambda: Catalogue(folder)):
            with pytest.raises(BundleError, match="has format 4; this version reads 3; update"):
                work()
    assert sql(folder, "PRAGMA user_version") == [(4,)]
