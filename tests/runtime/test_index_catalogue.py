"""A damaged catalogue, by the bit and by SQL: what is refused and how, what is left out, and what an older format lacks."""

import logging
import multiprocessing
import os
import re
import resource
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime import cli_index
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_catalogue import CATALOGUE, Catalogue
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_schema import FORMAT, STATE, UNTALLIED
from metaembed.runtime.index_writer import IndexWriter

R, D = 2, 8
QUERY = np.random.default_rng(9).standard_normal((R, D)).astype(np.float32)


def vectors(items):
    return np.random.default_rng(items).standard_normal((items, R, D)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Items d0 to d7 in the first segment, e0 to e3 in the second."""
    Index.create(tmp_path / "index", Layout(D, (1, R)))
    with IndexWriter(tmp_path / "index") as writer:
        writer.add([f"d{i}" for i in range(8)], vectors(8), [{"n": i} for i in range(8)])
        writer.add([f"e{i}" for i in range(4)], vectors(4), [{"n": i} for i in range(4)])
    return tmp_path / "index"


def sql(folder, *statements):
    with closing(sqlite3.connect(folder / CATALOGUE)) as connection:
        found = [connection.execute(statement).fetchall() for statement in statements]
        connection.commit()
    return found[-1]


def flip(folder, table, find, offset, bit):
    """Flip a bit so many bytes behind the first place of some bytes in a table's (or an index's) only page."""
    (((root,),), ((size,),)) = (
        sql(folder, f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'"),
        sql(folder, "PRAGMA page_size"),
    )
    content = bytearray((folder / CATALOGUE).read_bytes())
    page = content[(root - 1) * size : root * size]
    content[(root - 1) * size + page.index(find) + offset] ^= 1 << bit
    (folder / CATALOGUE).write_bytes(content)


def names(folder):
    return {path.name for path in (folder / SEGMENTS).iterdir()}


def found(folder, where=(), **options):
    with Index.open(folder, **options) as index:
        return sorted(hit.id for hit in index.search(QUERY, 20, where=where))


@pytest.mark.parametrize("bit", [0, 1])
def test_segments_that_a_bit_hides_are_missed_and_kept(folder, bit, capsys):
    """2 cells in the page's header; of the first 24 bytes, 4 is the lower byte of their number."""
    before = names(folder)
    flip(folder, "segments", b"", 4, bit)
    with pytest.raises(BundleError, match="damaged"):
        Index.open(folder)
    for verb in (["compact"], ["verify"], ["info"], ["delete"]):
        assert cli_index.main([*verb, str(folder), *(["d1"] if verb == ["delete"] else [])]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert names(folder) == before


def test_a_segment_that_left_while_a_writer_was_open_is_missed(folder):
    """By another hand; the next transaction would otherwise take what is left for all that there was."""
    with IndexWriter(folder) as writer:
        sql(folder, "DELETE FROM segments WHERE number = 1")
        for work in (lambda: writer.add(["new"], vectors(1)), lambda: writer.delete(["e1"]), writer.compact):
            with pytest.raises(BundleError, match="rows of its segments are missing"):
                work()
        assert len(names(folder)) == 2  # nothing is removed before all is known to be well
    assert sql(folder, "SELECT count(*) FROM segments") == [(1,)]


def test_an_id_that_leads_to_another_item_deletes_neither(folder, monkeypatch):
    """The index of ids says row 5 for d4: by the bit, of the byte behind the id (segment 1 takes none)."""
    flip(folder, "items_by_id", b"d4", 2, 0)
    with pytest.raises(BundleError, match="items_by_id"):
        IndexWriter(folder)
    with monkeypatch.context() as patch:  # a flip that comes after the writer's opening
        patch.setattr(Catalogue, "find_damage", lambda self: [])
        with IndexWriter(folder) as writer, pytest.raises(BundleError, match="damaged"):
            writer.delete(["d4"])
    assert found(folder) == [*(f"d{i}" for i in range(8)), *(f"e{i}" for i in range(4))]


def test_an_id_that_is_lost_from_the_index_of_ids_is_not_added_twice(folder):
    flip(folder, "items_by_id", b"d4", 1, 6)  # dt
    with pytest.raises(BundleError, match="items_by_id"):
        IndexWriter(folder)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DELETE FROM about WHERE key = 'layout'", "rows of its about are missing"),
        (f"DELETE FROM about WHERE key = '{STATE}'", "tally of its rows is missing"),
        ("DELETE FROM segments WHERE number = 2", "rows of its segments are missing"),
        ("DROP INDEX items_by_id", "tables are not those of an index"),
        ("DROP TABLE items", "tables are not those of an index"),
        (f"PRAGMA user_version = {FORMAT + 1}", f"has format {FORMAT + 1}"),
    ],
)
def test_a_catalogue_that_lacks_something_is_refused(folder, statement, says):
    sql(folder, statement)
    for opening in (Index.open, IndexWriter):
        with pytest.raises(BundleError, match=says):
            opening(folder)
    assert len(names(folder)) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM items WHERE segment = 1 AND row = 3",
        "INSERT INTO items SELECT segment + 5, row, id, payload, crc FROM items WHERE segment = 1",
        "INSERT INTO items SELECT segment, row + 20, id, payload, crc FROM items WHERE segment = 1",
    ],
)
def test_items_without_a_segment_and_segments_without_items_are_refused_in_writing(folder, statement):
    sql(folder, statement)
    with pytest.raises(BundleError, match="its items are not those of its segments"):
        IndexWriter(folder)
    with Index.open(folder) as index:
        assert "its items are not those of its segments" in "".join(index.verify())


def test_a_place_that_is_outside_its_segment_is_damage(folder, monkeypatch):
    """Checksums that are right, of a segment and of a row that are not there."""
    monkeypatch.setattr(Catalogue, "find_damage", lambda self: [])
    with IndexWriter(folder) as writer:
        for place in ((7, 0), (1, 8), (1, -1)):
            monkeypatch.setattr(Catalogue, "places", lambda self, ids, place=place: {"d4": [place]})
            with pytest.raises(BundleError, match="'d4' where no item is"):
                writer.known(["d4"])


def test_a_missing_row_of_a_segment_that_is_there_is_damage(folder):
    sql(folder, "DELETE FROM items WHERE segment = 1 AND row = 3")
    with Index.open(folder) as index, pytest.raises(BundleError, match="row 3 of segment 1 is missing"):
        index.search(QUERY, 20)


@pytest.mark.parametrize(
    ("statement", "named", "lost"),
    [
        ("DELETE FROM items WHERE segment = 1 AND row = 3", "row 3 of", ["d3"]),
        ("UPDATE items SET payload = '{\"n\": 9}' WHERE id = 'd3'", "'d3'", ["d3"]),
        ("UPDATE items SET payload = '{' WHERE id = 'd3'", "'d3'", ["d3"]),
        ("UPDATE items SET id = CAST(x'ff' AS TEXT) WHERE id = 'd3'", "row 3 of", ["d3"]),
        ("UPDATE items SET crc = 0 WHERE segment = 2", "4 items, row 0, 1, 2, 3 of", [f"e{i}" for i in range(4)]),
    ],
)
def test_items_with_a_damaged_row_are_left_out_and_named(folder, statement, named, lost, caplog):
    """By hand: d3 and e3 are the only ones with n = 3."""
    sql(folder, statement)
    everything = {*(f"d{i}" for i in range(8)), *(f"e{i}" for i in range(4))}
    for where, right in (((), everything), (["n=3"], {"d3", "e3"}), (["n<9"], everything)):
        with pytest.raises(BundleError):
            found(folder, where)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "metaembed"):
            assert found(folder, where, skip_damaged=True) == sorted(right - {*lost})
        (warning,) = caplog.messages
        assert re.search(named, warning)
    with Index.open(folder, skip_damaged=True) as index:
        assert len(index.search(QUERY, 12 - len(lost))) == 12 - len(lost) == len(index)
        assert len(index.snapshot().damaged) == 1


def test_a_page_of_items_that_cannot_be_read_leaves_the_others(tmp_path, caplog):
    """200 items of 100 bytes take several pages; the kind of one of them is no kind of page that there is."""
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (1, R)))
    with IndexWriter(folder) as writer:
        writer.add([f"item{i:03}" for i in range(200)], vectors(200), [{"text": "x" * 100, "n": 1}] * 200)
    content = bytearray((folder / CATALOGUE).read_bytes())
    ((size,),) = sql(folder, "PRAGMA page_size")
    pages = [page for page in range(1, len(content) // size) if b"item150" in content[page * size : (page + 1) * size]]
    page = next(page for page in pages if b"xxxx" in content[page * size : (page + 1) * size])
    content[page * size] ^= 1
    (folder / CATALOGUE).write_bytes(content)
    for where in ((), ["n=1"]):
        with pytest.raises(BundleError):
            found(folder, where)
        left = found(folder, where, skip_damaged=True)
        assert left == [] or "item150" not in left
    with Index.open(folder, skip_damaged=True) as index:
        hits = index.search(QUERY, 200)
        assert 100 < len(hits) == len(index) < 200
        assert {hit.payload["n"] for hit in hits} == {1}


def older(folder):
    """The index as it was before tallies."""
    sql(folder, f"DELETE FROM about WHERE key = '{STATE}'", f"PRAGMA user_version = {UNTALLIED}")
    return folder


def test_an_index_of_the_older_format_is_read_and_brought_to_ours_by_the_first_that_writes(folder):
    before = found(older(folder))
    assert sql(folder, "PRAGMA user_version") == [(UNTALLIED,)]
    with Index.open(folder) as reader:
        with IndexWriter(folder) as writer:
            assert sql(folder, "PRAGMA user_version") == [(UNTALLIED,)]
            writer.add(["new"], vectors(1))
        assert len(reader.search(QUERY, 20)) == 13
    assert sql(folder, "PRAGMA user_version") == [(FORMAT,)]
    assert found(folder) == sorted([*before, "new"])
    assert sql(folder, "SELECT max(number) FROM segments") == [(3,)]
    sql(folder, "DELETE FROM segments WHERE number = 2")
    with pytest.raises(BundleError, match="rows of its segments are missing"):
        Index.open(folder)


@pytest.mark.parametrize("age", [older, lambda folder: folder], ids=["older", "ours"])
def test_a_damaged_index_of_either_format_is_not_written_to(folder, age):
    sql(age(folder), "DELETE FROM segments WHERE number = 2")
    with pytest.raises(BundleError, match="damaged"):
        IndexWriter(folder)
    assert len(names(folder)) == 2


def test_numbers_of_segments_are_never_given_twice(folder):
    """Whatever SQLite's own counter says: a graph, and a reader's open segments, are found by number."""
    with IndexWriter(folder) as writer:
        writer.delete([*(f"d{i}" for i in range(8)), *(f"e{i}" for i in range(4))])
        writer.compact()
    sql(folder, "UPDATE sqlite_sequence SET seq = 0")
    with IndexWriter(folder) as writer:
        writer.add(["new"], vectors(1))
    assert sql(folder, "SELECT number FROM segments") == [(3,)]
    assert found(folder) == ["new"]


def test_a_closed_index_says_so(folder):
    index = Index.open(folder)
    index.close()
    with pytest.raises(UsageError, match="is closed"):
        index.search(QUERY)


def test_a_schema_that_is_quoted_does_not_break_a_sentence(folder):
    """Found by flips: SQLite names the word that it cannot read, with the line breaks that are in it."""
    path = folder / CATALOGUE
    content = path.read_bytes()
    assert content.count(b"payload TEXT") == 1
    path.write_bytes(content.replace(b"payload TEXT", b"payload '\n\nT"))
    for opening in (Index.open, IndexWriter):
        with pytest.raises(BundleError, match="damaged") as caught:
            opening(folder)
        assert len(str(caught.value).splitlines()) == 1


def create_limited(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        Index.create(folder, Layout(D, (1, R)))
    except MetaEmbedError as error:
        return str(error)
    return "made"


@pytest.mark.parametrize("size", [0, 4096, 12288])
def test_an_index_that_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path, size):
    """By a limit on the size of files, in another process; an empty catalogue takes 28 KiB or so."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        said = pool.apply(create_limited, (tmp_path / "index", size))
    assert CATALOGUE in said
    assert "ulimit -f" in said
    assert list(tmp_path.iterdir()) == []


def test_a_segment_that_cannot_be_written_is_named(folder, monkeypatch):
    def too_large(descriptor):
        raise OSError(27, "File too large")

    with IndexWriter(folder) as writer:
        monkeypatch.setattr("metaembed.runtime.index_segment.os.fsync", too_large)
        with pytest.raises(OSError, match=r"File too large: .*index/segments/\w+.safetensors"):
            writer.add(["x"], vectors(1))


def killed_in_a_transaction(folder, target):
    """A copy of an index that was made while a transaction had changed its catalogue, as a kill leaves it."""
    with closing(sqlite3.connect(folder / CATALOGUE, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
        connection.execute("BEGIN")
        connection.execute("INSERT INTO items SELECT segment + 9, row, id, zeroblob(50000), crc FROM items")
        shutil.copytree(folder, target)
        connection.execute("ROLLBACK")
    assert (target / f"{CATALOGUE}-journal").stat().st_size
    return target


def read_as_nobody(folder):
    if os.getuid() == 0:  # root may write anywhere
        os.setuid(65534)
    try:
        return found(folder)
    except MetaEmbedError as error:
        return str(error)


def test_an_unfinished_transaction_on_a_read_only_disk_is_explained(folder):
    with tempfile.TemporaryDirectory() as top:
        target = killed_in_a_transaction(folder, Path(top) / "index")
        content = (target / CATALOGUE).read_bytes()
        for path in [Path(top), target, *target.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            said = pool.apply(read_as_nobody, (target,))
        for path in [Path(top), target, *target.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert "a writer was killed in a transaction" in said
        assert f"{CATALOGUE}-journal" in said
        assert "copy its folder to a disk that is" in said
        assert (target / CATALOGUE).read_bytes() == content
        assert found(target) == found(folder)  # where it may be written, what was unfinished is undone
