"""Repairing damaged indexes: what is kept answers rightly, what is lost is named first, and nothing else is touched.

Scores are numpy's in float64, of vectors of whole numbers, which bf16 and int8 hold exactly. What a flipped byte costs is read
from the safetensors header: the row whose vectors it lies in, and nothing where it lies in what is derived.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime import index_repair
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_catalogue import CATALOGUE, Catalogue, SegmentRow
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_repair import repair_index
from metaembed.runtime.index_schema import STATE, UNTALLIED
from metaembed.runtime.index_writer import IndexWriter

R, D, PER_SEGMENT, IDS = 3, 8, 40, 120
FULL = [Stage(Budget(2, R))]
FIRST = [Stage(Budget(2, 1))]  # through the screen, where there is one
LAYOUTS = {"bf16": {"screen": True}, "int8": {"storage": "int8"}}


def whole_numbers(seed, *shape):
    """The largest of every vector is 127, so that int8's scale is 1."""
    values = np.random.default_rng(seed).integers(-126, 127, shape).astype(np.float32)
    values[..., 0] = 127
    return values


QUERY = whole_numbers(1, 2, D)
VECTORS = dict(zip([f"item{i:03}" for i in range(IDS)], whole_numbers(2, IDS, R, D), strict=True))
DEAD = {f"item{i:03}" for i in range(0, IDS, 9)}
ALIVE = VECTORS.keys() - DEAD


def make(folder, layout="bf16"):
    """Three segments of 40 items, every ninth of them deleted."""
    Index.create(folder, Layout(D, (1, R), **LAYOUTS[layout]), fingerprint="f" * 64)
    ids = list(VECTORS)
    with IndexWriter(folder) as writer:
        for start in range(0, IDS, PER_SEGMENT):
            some = ids[start : start + PER_SEGMENT]
            writer.add(some, np.stack([VECTORS[id_] for id_ in some]), [{"name": id_ * 3} for id_ in some])
        writer.delete(sorted(DEAD))
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    top = tmp_path_factory.mktemp("repair")
    return {layout: make(top / layout, layout) for layout in LAYOUTS}


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals["bf16"], tmp_path / "index")


def score(vectors, r_c=R):
    return float((QUERY.astype(np.float64) @ vectors[:r_c].astype(np.float64).T).max(axis=1).sum())


def check(folder, ids, vectors=VECTORS):
    """That an index is sound, and holds these items with their scores and payloads."""
    with Index.open(folder) as index:
        assert index.verify() == []
        for stages, r_c in ((FULL, R), (FIRST, 1)):
            found = {hit.id: hit.score for hit in index.search(QUERY, 1000, cascade=stages)}
            assert found == {id_: score(vectors[id_], r_c) for id_ in ids}
        for hit in index.search(QUERY, 1000, cascade=FULL, where=["name!=nobody"]):
            assert hit.payload == {"name": hit.id * 3}
        assert not set(os.listdir(folder)) - {CATALOGUE, SEGMENTS, "writer.lock"}
        assert len(list((folder / SEGMENTS).iterdir())) == len(index._catalogue.segments())


def contents(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def segment_paths(folder):
    """In the order of their numbers: of ids, that is."""
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE)) as connection:
        return [folder / SEGMENTS / name for (name,) in connection.execute("SELECT name FROM segments ORDER BY number")]


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def owner(path, byte):
    """The row of a segment whose vectors or scales a byte belongs to; None where it is derived from the rest."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, tensor in json.loads(content[8:start]).items():
        first, last = tensor["data_offsets"]
        if first <= byte - start < last and name not in ("crc32", "vectors.screen", "scales.screen"):
            return (byte - start - first) * tensor["shape"][0] // (last - first)
    return None


def repair_dropping(folder, lost):
    """Repair, after seeing that so much is refused at first, to the byte."""
    before = contents(folder)
    refused = repair_index(folder)
    assert not refused.done
    assert set(refused.dropped) == lost
    assert contents(folder) == before
    repair = repair_index(folder, drop=True)
    assert repair.done
    assert (repair.dropped, repair.items) == (refused.dropped, refused.items)
    return repair


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_byte_of_a_segment_costs_the_item_that_it_belongs_to_or_nothing(originals, tmp_path, layout):
    rng = np.random.default_rng(len(layout))
    costs = []
    for round_ in range(25):
        folder = shutil.copytree(originals[layout], tmp_path / str(round_))
        lost = set()
        for number in rng.choice(3, 2, replace=False).tolist():
            path = segment_paths(folder)[number]
            byte = int(rng.integers(path.stat().st_size))
            row = owner(path, byte)
            flip(path, byte, rng.integers(8))
            lost |= {f"item{number * PER_SEGMENT + row:03}"} - DEAD if row is not None else set()
        if lost:
            repair_dropping(folder, lost)
        else:
            repair = repair_index(folder)
            assert repair.done
            assert repair.damages
            assert not repair.drops
        check(folder, ALIVE - lost)
        costs.append(len(lost))
    assert {0, 1, 2} == set(costs)


def test_every_part_of_a_segment_that_is_derived_costs_nothing(folder):
    """The length and the text of the header, the screen and its scales, the table of checksums."""
    for path, name in zip(segment_paths(folder), ("vectors.screen", "scales.screen", "crc32"), strict=True):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        flip(path, start + json.loads(content[8:start])[name]["data_offsets"][0] + 5, 3)
    assert len(repair_index(folder).damages) == 3
    check(folder, ALIVE)
    for path, byte in zip(segment_paths(folder), (0, 9, 100), strict=True):
        flip(path, byte, 2)
    assert len(repair_index(folder).damages) == 3
    check(folder, ALIVE)


def test_a_damaged_header_does_not_hide_damaged_vectors(folder):
    """Of the header the layout knows what it was, and the table then tells the rows apart."""
    path = segment_paths(folder)[0]
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + 2 * D * 7, 1)  # group 0 of item 7: a vector of two bytes a number each
    flip(path, 30, 1)
    repair_dropping(folder, {"item007"})
    check(folder, ALIVE - {"item007"})


def test_what_was_dropped_can_be_added_again(folder):
    path = segment_paths(folder)[1]
    path.unlink()
    lost = {f"item{i:03}" for i in range(40, 80)} - DEAD
    repair_dropping(folder, lost)
    with IndexWriter(folder) as writer:
        assert not writer.known(sorted(lost))
        assert writer.known(sorted(ALIVE)) == ALIVE - lost
        some = sorted(lost)
        writer.add(some, np.stack([VECTORS[id_] for id_ in some]), [{"name": id_ * 3} for id_ in some])
    check(folder, ALIVE)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def replaced(path):
    """By another segment of the same form, whose vectors match their own table of checksums."""
    (other,) = (other for other in path.parent.iterdir() if other != path and other == sorted(path.parent.iterdir())[0])
    shutil.copyfile(other, path)


def twice(path):
    """A row of the table and the vectors of another: neither header nor vectors tell what the table was."""
    content = path.read_bytes()
    flip(path, len(content) - 1, 0)
    flip(path, 8 + int.from_bytes(content[:8], "little"), 0)


@pytest.mark.parametrize("harm", [cut_short, empty, Path.unlink, replaced, twice])
def test_a_segment_that_is_not_the_one_that_was_written_costs_its_items(folder, harm):
    paths = segment_paths(folder)
    number = max(range(3), key=lambda i: paths[i].name)  # so that `replaced` finds another
    harm(paths[number])
    lost = {f"item{i:03}" for i in range(number * PER_SEGMENT, (number + 1) * PER_SEGMENT)} - DEAD
    repair = repair_dropping(folder, lost)
    assert list(repair.dropped) == sorted(lost)
    check(folder, ALIVE - lost)


def test_an_index_whose_segments_are_all_gone_is_empty_after_it(folder):
    shutil.rmtree(folder / SEGMENTS)
    repair_dropping(folder, set(ALIVE))
    check(folder, set())


def test_damage_of_deleted_items_costs_nothing(folder):
    with IndexWriter(folder) as writer:
        writer.delete([f"item{i:03}" for i in range(40)])
    first, second, _ = segment_paths(folder)
    first.unlink()
    flip(second, 8 + int.from_bytes(second.read_bytes()[:8], "little") + 5 * 2 * D, 0)  # of item045, which is dead
    assert "item045" in DEAD
    repair = repair_index(folder)
    assert (repair.done, len(repair.damages)) == (True, 2)
    check(folder, {id_ for id_ in ALIVE if id_ >= "item040"})


def index_of_ids(folder):
    """The page of its root, and the size of a page."""
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'items_by_id'").fetchall()
        ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    return root, size


def pages_of(content, root, size):
    """Numbers of the pages of an index's tree, from SQLite's description of its file format."""
    page = content[(root - 1) * size : root * size]
    yield root
    if page[0] == 2:  # inner: 4 bytes of every cell, and of the header, are a child's number
        cells = int.from_bytes(page[3:5], "big")
        starts = [8, *(int.from_bytes(page[12 + 2 * i : 14 + 2 * i], "big") for i in range(cells))]
        for start in starts:
            yield from pages_of(content, int.from_bytes(page[start : start + 4], "big"), size)


def test_damage_of_the_index_of_ids_costs_nothing(folder):
    """Of several pages: 150 ids of 80 signs are added, of which 4,096 bytes hold less than a third."""
    more = dict(zip([f"{i:080}" for i in range(150)], whole_numbers(3, 150, R, D), strict=True))
    with IndexWriter(folder) as writer:
        writer.add(list(more), np.stack([*more.values()]), [{"name": id_ * 3} for id_ in more])
    sound = (folder / CATALOGUE).read_bytes()
    root, size = index_of_ids(folder)
    pages = list(pages_of(sound, root, size))
    assert len(pages) > 3
    rng = np.random.default_rng(3)
    found = 0
    for page in pages:
        for byte in [0, 3, 5, 8, 11, *rng.integers(0, size, 8).tolist()]:
            (folder / CATALOGUE).write_bytes(sound)
            flip(folder / CATALOGUE, (page - 1) * size + byte, rng.integers(8))
            repair = repair_index(folder)
            assert repair.done
            assert not repair.drops
            found += bool(repair.damages)
            check(folder, ALIVE | more.keys(), VECTORS | more)
            with IndexWriter(folder) as writer:
                assert writer.known([*VECTORS, *more]) == ALIVE | more.keys()
    assert found > len(pages) * 8


def test_a_byte_of_the_catalogue_costs_items_that_are_counted_or_is_refused(folder):
    content = (folder / CATALOGUE).read_bytes()
    segments = {path: path.read_bytes() for path in (folder / SEGMENTS).iterdir()}
    rng = np.random.default_rng(5)
    ends = {"refused": 0, "harmless": 0, "mended": 0, "dropped": 0}
    headers = [page + byte for page in range(0, len(content), 4096) for byte in (0, 4, 6)]
    for byte in [*rng.integers(0, len(content), 60).tolist(), *headers]:
        shutil.rmtree(folder / SEGMENTS)
        (folder / SEGMENTS).mkdir()
        for path, vectors in segments.items():
            path.write_bytes(vectors)
        (folder / CATALOGUE).write_bytes(content)
        flip(folder / CATALOGUE, byte, rng.integers(8))
        before = contents(folder)
        try:
            plan = repair_index(folder)
        except MetaEmbedError as error:
            assert len(str(error).splitlines()) == 1
            ends["refused"] += 1
            assert contents(folder) == before
            continue
        assert (plan.dropped, plan.older, plan.items) == ((), (), len(ALIVE) - plan.unnamed)
        if not plan.done:
            assert contents(folder) == before
            assert repair_index(folder, drop=True).done
        with Index.open(folder) as index:
            left = {hit.id for hit in index.search(QUERY, IDS)}
        assert len(left) == plan.items
        check(folder, left)
        ends["dropped" if plan.unnamed else "mended" if plan.damages else "harmless"] += 1
    assert min(ends.values()) > 3, ends


def sql(folder, *statements):
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE items SET crc = crc + 1 WHERE id = 'item050'",
        "UPDATE items SET id = 'item051' WHERE id = 'item050'",
        "UPDATE items SET payload = NULL WHERE id = 'item050'",
        "UPDATE items SET id = CAST(x'ff' AS TEXT) WHERE id = 'item050'",
        "DELETE FROM items WHERE id = 'item050'",
        "UPDATE items SET row = 77 WHERE id = 'item050'",
        "UPDATE items SET segment = 9 WHERE id = 'item050'",
    ],
)
def test_an_item_whose_row_is_damaged_is_dropped_without_a_guess_at_its_id(folder, statement):
    sql(folder, statement)
    repair = repair_dropping(folder, set())
    assert (repair.unnamed, repair.items) == (1, len(ALIVE) - 1)
    check(folder, ALIVE - {"item050"})


def test_of_an_id_that_is_there_twice_the_later_item_stays(folder):
    """A deletion that was lost: item010 was replaced, and its first row is alive again."""
    other = whole_numbers(7, 1, R, D)
    first = segment_paths(folder)[0].name
    with IndexWriter(folder) as writer:
        writer.add(["item010"], other, [{"name": "item010" * 3}], replace=True)
    with contextlib.closing(Catalogue(folder, write=True)) as catalogue, catalogue.writing():
        row = next(row for row in catalogue.segments() if row.name == first)
        alive = row.alive
        alive[10] = True
        packed = np.packbits(~alive).tobytes()
        catalogue.set_dead(SegmentRow(row.number, row.name, row.items, row.checksum, packed))
    repair = repair_dropping(folder, set())
    assert (repair.older, repair.items, repair.unnamed) == (("item010",), len(ALIVE), 0)
    check(folder, ALIVE, {**VECTORS, "item010": other[0]})


def test_neither_of_two_items_of_an_id_stays_where_the_later_is_damaged(folder):
    """The earlier one was replaced: it would pass for what is wanted, and --resume would pass over it."""
    with IndexWriter(folder) as writer:
        writer.add(["item010"], whole_numbers(7, 1, R, D), replace=True)
    with contextlib.closing(Catalogue(folder, write=True)) as catalogue, catalogue.writing():
        row = catalogue.segments()[0]
        catalogue.set_dead(SegmentRow(row.number, row.name, row.items, row.checksum, b""))
    segment_paths(folder)[-1].unlink()
    repair = repair_dropping(folder, {"item010"})
    assert repair.older == ("item010",)
    check(folder, ALIVE - {"item010"} | {id_ for id_ in DEAD if id_ < "item040"})


@pytest.mark.parametrize("harm", ["flip", "unlink"])
def test_a_damaged_graph_is_dropped(folder, harm):
    pytest.importorskip("usearch")
    with IndexWriter(folder) as writer:
        writer.build_ann()
    (graph,) = folder.glob("ann-*")
    flip(graph, 200, 1) if harm == "flip" else graph.unlink()
    repair = repair_index(folder)
    assert (repair.done, repair.graph_dropped, len(repair.damages)) == (True, True, 1)
    check(folder, ALIVE)
    with Index.open(folder) as index:
        assert index.ann.record() is None
        assert segment_paths(folder) == [part.segment.path for part in index.snapshot().parts]


def test_a_sound_graph_outlasts_a_new_catalogue(folder):
    """It knows segments by their numbers, which stay, and none is given again: not the third's either."""
    pytest.importorskip("usearch")
    with IndexWriter(folder) as writer:
        writer.build_ann()
    sql(folder, "DELETE FROM items WHERE id IN ('item003', 'item083')")
    assert repair_index(folder, drop=True).done
    with Index.open(folder) as index:
        assert index.verify() == []
        assert {part.number for part in index.snapshot().parts} == {2, 4, 5}
        assert index.ann.record().segments == (1, 2, 3)


def test_a_sound_index_is_left_as_it_is_apart_from_leftovers(folder):
    before = contents(folder)
    (folder / SEGMENTS / "x.partial").write_bytes(b"x")
    (folder / "rebuilt-x").mkdir()
    (folder / "rebuilt-x" / CATALOGUE).write_bytes(b"x")
    repair = repair_index(folder)
    assert (repair.done, repair.damages, repair.items) == (True, (), len(ALIVE))
    assert contents(folder) == before
    check(folder, ALIVE)


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (["DELETE FROM segments WHERE number = 2"], "rows of its segments are missing"),
        (["UPDATE segments SET items = 39 WHERE number = 2"], "in the row of"),
        (["DELETE FROM about WHERE key = 'layout'"], "rows of its about are missing"),
        ([f"DELETE FROM about WHERE key = '{STATE}'"], "tally of its rows is missing"),
        (
            ["DELETE FROM segments WHERE number = 2", f"DELETE FROM about WHERE key = '{STATE}'",
             f"PRAGMA user_version = {UNTALLIED}"],
            "its items are not those of its segments",
        ),
    ],
)  # fmt: skip
def test_a_catalogue_that_does_not_know_its_segments_is_not_guessed_at(folder, statements, says):
    sql(folder, *statements)
    before = contents(folder)
    for drop in (False, True):
        with pytest.raises(BundleError, match=f"{says}.*restore it, or index again.*cannot tell"):
            repair_index(folder, drop=drop)
    assert contents(folder) == before


def test_an_index_of_the_older_format_is_repaired_where_its_segments_are_known(folder):
    sql(folder, f"DELETE FROM about WHERE key = '{STATE}'", f"PRAGMA user_version = {UNTALLIED}")
    segment_paths(folder)[2].unlink()
    lost = {f"item{i:03}" for i in range(80, 120)} - DEAD
    repair_dropping(folder, lost)
    check(folder, ALIVE - lost)


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(folder, monkeypatch):
    locked, plain = segment_paths(folder)[1], open

    def guarded(path, *args, **options):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", guarded)
        with pytest.raises(MetaEmbedError, match="may not be read by this user; it may be sound"):
            repair_index(folder, drop=True)
    assert contents(folder) == before


def test_a_repair_is_the_only_writer(folder, monkeypatch):
    segment_paths(folder)[1].unlink()
    cut_short(segment_paths(folder)[0])
    flip(segment_paths(folder)[2], 9, 1)
    with IndexWriter(folder), pytest.raises(UsageError, match="another process is writing"):
        repair_index(folder, drop=True)
    copy_rows, tries = index_repair.copy_rows, []

    def copy(*args):
        with pytest.raises(UsageError, match="another process is writing"):
            IndexWriter(folder)
        tries.append(args)
        return copy_rows(*args)

    monkeypatch.setattr(index_repair, "copy_rows", copy)
    assert repair_index(folder, drop=True).items == len({id_ for id_ in ALIVE if id_ >= "item080"})
    assert len(tries) == 1
    IndexWriter(folder).close()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_repair_gives_up_where_another_program_keeps_the_catalogue_locked(folder, rebuilt, monkeypatch):
    monkeypatch.setattr("metaembed.runtime.index_database.BUSY_SECONDS", 0.1)
    if rebuilt:
        sql(folder, "DELETE FROM items WHERE id = 'item050'")
    else:
        segment_paths(folder)[0].unlink()
    before = contents(folder)
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM about").fetchall()
        with pytest.raises(MetaEmbedError, match="stayed locked by another process"):
            repair_index(folder, drop=True)
    assert contents(folder) == before


def break_everything(folder, *, structure=True):
    """Something of every kind: vectors, a missing segment, a header, an item's row, and, as `structure`, the index of ids."""
    first, second, third = segment_paths(folder)
    start = 8 + int.from_bytes(first.read_bytes()[:8], "little")
    flip(first, start + 2 * D * 7, 1)
    second.unlink()
    flip(third, 10, 1)
    sql(folder, "UPDATE items SET crc = crc + 1 WHERE id = 'item085'")
    if structure:
        root, size = index_of_ids(folder)
        flip(folder / CATALOGUE, (root - 1) * size + 5, 3)
    return ALIVE - {"item007", "item085"} - {f"item{i:03}" for i in range(40, 80)}


def test_damage_of_every_kind_at_once(folder):
    left = break_everything(folder)
    with Index.open(folder, skip_damaged=True) as reader:
        repair = repair_dropping(folder, ALIVE - left - {"item085"})
        assert repair.unnamed == 1
        found = {hit.id: hit.score for hit in reader.search(QUERY, IDS, cascade=FULL)}  # an open reader follows
    assert found == {id_: score(VECTORS[id_]) for id_ in left}
    check(folder, left)


def in_a_child(work):
    """The pid of a child process that does some work, and its exit by a signal or with 0."""
    if (child := os.fork()) == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return child


def lines_of(folder, end=0):
    """Kill this process at so many lines of our own that a repair runs; without, how many, and which are of its transaction."""
    count, entering = 0, []

    def local(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if frame.f_code.co_name == "_enter":
                entering.append(count)
            if count == end:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    sys.settrace(lambda frame, event, argument: local if "runtime/index_" in frame.f_code.co_filename else None)
    try:
        repair_index(folder, drop=True)
    finally:
        sys.settrace(None)
    return count, entering


def as_before_or_after(folder, before, left):
    """Which of the two; with leftovers of the killed one that the next repair removes."""
    kept = {name: digest for name, digest in contents(folder).items() if name in before}
    journal = (folder / f"{CATALOGUE}-journal").exists()
    with contextlib.closing(Catalogue(folder)):  # undoes what was unfinished, as any opening does
        pass
    with Index.open(folder, skip_damaged=True) as index:
        unharmed = not index.verify()
    if unharmed:
        with Index.open(folder) as index:
            assert {hit.id for hit in index.search(QUERY, IDS)} == left
        return "after"
    assert journal or kept == before
    assert {name: digest for name, digest in contents(folder).items() if name in before} == before
    return "before"


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_repair_that_is_killed_at_any_line_changes_all_or_nothing(originals, tmp_path, rebuilt):
    """Any: ten at random, all of the transaction, and some of the last, where files that were replaced are removed."""
    folder = shutil.copytree(originals["bf16"], tmp_path / "harmed")
    left = break_everything(folder, structure=rebuilt)
    before = contents(folder)
    lines, entering = lines_of(shutil.copytree(folder, tmp_path / "whole"))
    ends = []
    for end in [*np.random.default_rng(0).integers(1, lines, 10).tolist(), *entering, *range(lines - 32, lines, 8)]:
        killed = shutil.copytree(folder, tmp_path / "killed")
        _, status = os.waitpid(in_a_child(lambda: lines_of(killed, end)), 0)  # noqa: B023 (forked at once)
        assert os.WTERMSIG(status) == signal.SIGKILL
        ends.append(as_before_or_after(killed, before, left))
        assert repair_index(killed, drop=True).done
        check(killed, left)
        shutil.rmtree(killed)
    assert set(ends) == {"before", "after"}
    assert len(entering) >= 5


def ended(child):
    """Whether a child process has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_repair_that_is_killed_at_any_moment_changes_all_or_nothing(originals, tmp_path):
    """Also within SQLite: the catalogue has 5,000 items more, so that its copying takes a while."""
    folder = shutil.copytree(originals["bf16"], tmp_path / "harmed")
    with IndexWriter(folder) as writer:
        more = [f"more{i}" for i in range(5000)]
        writer.add(more, np.broadcast_to(VECTORS["item000"], (len(more), R, D)), [{"name": id_ * 3} for id_ in more])
    first = segment_paths(folder)[0]
    flip(first, 8 + int.from_bytes(first.read_bytes()[:8], "little") + 2 * D * 7, 1)
    sql(folder, "DELETE FROM items WHERE id = 'item050'")
    before = contents(folder)
    begin = time.monotonic()
    os.waitpid(in_a_child(lambda: repair_index(shutil.copytree(folder, tmp_path / "whole"), drop=True)), 0)
    whole = time.monotonic() - begin
    ends, unfinished = [], 0
    for i, share in enumerate([*np.random.default_rng(0).random(10), *[None] * 6, 3]):
        killed = shutil.copytree(folder, tmp_path / f"killed{i}")
        child = in_a_child(lambda: repair_index(killed, drop=True))  # noqa: B023 (forked at once)
        if share is None:  # while SQLite writes: its journal is there
            while not (killed / f"{CATALOGUE}-journal").exists() and not ended(child):
                pass
            time.sleep(0.001 * (i - 10))
        else:
            time.sleep(share * whole)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += (killed / f"{CATALOGUE}-journal").exists()
        with contextlib.closing(Catalogue(killed)):
            pass
        with Index.open(killed, skip_damaged=True) as index:
            ends.append("before" if index.verify() else "after")
        if ends[-1] == "before":
            assert {name: digest for name, digest in contents(killed).items() if name in before} == before
        repair = repair_index(killed, drop=True)
        assert (repair.done, repair.items) == (True, len(ALIVE) - 2 + len(more))
        with Index.open(killed) as index:
            assert index.verify() == []
            assert len(index) == repair.items
        shutil.rmtree(killed)
    assert set(ends) == {"before", "after"}
    assert unfinished


def limited(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        return repair_index(folder, drop=True).done
    except (MetaEmbedError, OSError) as error:
        return str(error)


@pytest.mark.parametrize("size", [0, 1024, 4096, 20_000])
@pytest.mark.parametrize("catalogue", [False, True])
def test_a_repair_without_room_is_one_sentence_and_changes_nothing(folder, size, catalogue):
    """By a limit on the size of files: none, less than a segment, less than the catalogue."""
    first = segment_paths(folder)[0]
    if catalogue:
        sql(folder, "UPDATE items SET row = 77 WHERE id = 'item050'")
    else:
        flip(first, 8 + int.from_bytes(first.read_bytes()[:8], "little") + 2 * D * 7, 1)
    before = contents(folder)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        said = pool.apply(limited, (folder, size))
    assert len(said.splitlines()) == 1
    assert "File too large" in said or "ulimit -f" in said
    assert contents(folder) == before
    assert repair_index(folder, drop=True).items == len(ALIVE) - 1


def repair_as_nobody(folder):
    if os.getuid() == 0:  # root may write anywhere
        os.setuid(65534)
    try:
        return repair_index(folder, drop=True).done
    except (MetaEmbedError, OSError) as error:
        return str(error)


@pytest.mark.parametrize("shut", ["everything", "catalogue"])
def test_a_repair_of_what_may_not_be_written_is_one_sentence_and_changes_nothing(folder, shut):
    with tempfile.TemporaryDirectory() as top:
        target = shutil.copytree(folder, Path(top) / "index")
        break_everything(target)
        before = contents(target)
        for path in [Path(top), target, *target.rglob("*")]:
            writable = shut == "catalogue" and path.name != CATALOGUE
            path.chmod((0o777 if writable else 0o555) if path.is_dir() else (0o666 if writable else 0o444))
        with multiprocessing.get_context("fork").Pool(1) as pool:
            said = pool.apply(repair_as_nobody, (target,))
        for path in [Path(top), target, *target.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert "Permission denied" in said if shut == "everything" else "read-only" in said
        assert contents(target) == before
