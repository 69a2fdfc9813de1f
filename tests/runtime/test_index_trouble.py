"""Indexes in trouble: changed by others in the middle of a search, damaged in part, filled with odd ids, lied to by a catalogue."""

import enum
import json
import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from operator import eq, ge, gt, le, lt, ne

import numpy as np
import pytest

from metaembed.runtime import cli_index, index_verify
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_filter import parse_filters
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_schema import row_crc
from metaembed.runtime.index_writer import IndexWriter
from metaembed.runtime.int8 import quantize_int8
from metaembed.runtime.screen import may_be_best

D = 8
ONE = [Stage(Budget(1, 1))]


def unit(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def filled(folder, segments=4, items=5, **layout):
    """Items ``0-0``, ``0-1`` ..., in so many segments, each with the payload {"n": 1}."""
    Index.create(folder, Layout(D, (1, 2), **layout))
    with Index.open(folder).writer() as writer:
        for i in range(segments):
            ids = [f"{i}-{j}" for j in range(items)]
            writer.add(ids, unit(i, items, 2, D), [{"n": 1}] * items)
    return folder


def flip(folder, item):
    """Change the lowest bit of an item's first vector in the only segment."""
    (path,) = (folder / "segments").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + item * D * 2] ^= 1
    path.write_bytes(content)


def once(change, then):
    """A function that first, but only the first time, makes a change, and then does what it did."""
    done = []

    def both(*args, **options):
        if not done:
            done.append(True)
            change()
        return then(*args, **options)

    return both


def compact(folder):
    with Index.open(folder).writer() as writer:
        writer.compact()


@pytest.mark.parametrize("warm", [False, True])
def test_a_filtered_search_during_a_compaction_finds_what_it_would_have_found(tmp_path, monkeypatch, warm):
    folder, query = filled(tmp_path / "index"), unit(9, 2, D)
    with Index.open(folder) as plain:
        wanted = [hit.id for hit in plain.search(query, 3, where=["n=1"])]
    with Index.open(folder) as index:
        if warm:  # rows that were read before are not counted again
            index.search(query, 3, where=["n=1"])
        monkeypatch.setattr(index, "select", once(lambda: compact(folder), index.select))
        assert [hit.id for hit in index.search(query, 3, where=["n=1"])] == wanted


def test_verifying_during_a_compaction_finds_no_damage(tmp_path, monkeypatch):
    folder = filled(tmp_path / "index")
    monkeypatch.setattr(index_verify, "_segment_damage", once(lambda: compact(folder), index_verify._segment_damage))
    with Index.open(folder) as index:
        assert index.verify() == []


def test_a_damaged_item_does_not_take_sound_ones_with_it_through_the_screen(tmp_path):
    """The damaged item is the best by far: its screen, which is sound, would set what the others have to reach."""
    query = unit(9, 1, D)
    for screen in (False, True):
        folder = filled(tmp_path / str(screen), segments=1, items=100, screen=screen)
        with Index.open(folder) as index:
            best, *rest = index.search(query, 4, cascade=ONE)
        flip(folder, int(best.id.split("-")[1]))
        with Index.open(folder, skip_damaged=True) as index:
            assert [hit.id for hit in index.search(query, 3, cascade=ONE)] == [hit.id for hit in rest]


def test_holding_vectors_in_memory_skips_damaged_items_alone(tmp_path):
    folder = filled(tmp_path / "index", segments=1, items=100)
    flip(folder, 3)
    with Index.open(folder, skip_damaged=True, hold=1) as index:
        hits = index.search(unit(9, 2, D), 100)
    assert {hit.id for hit in hits} == {f"0-{j}" for j in range(100)} - {"0-3"}
    with pytest.raises(BundleError, match="row 3"):
        Index.open(folder, hold=1)


def test_a_segment_that_is_left_out_is_named_with_what_it_held(tmp_path, caplog):
    folder = filled(tmp_path / "index")
    path = sorted((folder / "segments").iterdir())[0]
    path.unlink()
    with caplog.at_level(logging.WARNING, "metaembed"), Index.open(folder, skip_damaged=True) as index:
        assert len(index) == 15
    assert f"with its 5 items: {path} is missing" in caplog.text


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_compaction_while_an_index_is_opened_is_no_damage(tmp_path, monkeypatch, caplog, skip_damaged):
    """Between the reading of the catalogue and of the files; "is missing; restore it" was logged of a segment merged since."""
    folder = filled(tmp_path / "index")
    monkeypatch.setattr(Index, "_open_segment", once(lambda: compact(folder), Index._open_segment))
    with caplog.at_level(logging.WARNING, "metaembed"), Index.open(folder, skip_damaged=skip_damaged) as index:
        assert (len(index), len(index.snapshot().parts), index.snapshot().damaged) == (20, 1, ())
    assert caplog.messages == []


def test_a_missing_segment_of_which_nothing_is_alive_stops_nothing(tmp_path):
    """So that indexing its items again mends an index, as the sentence about a missing segment says."""
    folder = filled(tmp_path / "index")
    with Index.open(folder) as index:
        (number,) = {part.number for part in index.snapshot().parts if part.start == 0}
        path = index.snapshot().parts[0].segment.path
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        Index.open(folder)
    from metaembed.runtime.index_writer import IndexWriter

    with IndexWriter(folder) as writer:
        writer.add([f"0-{j}" for j in range(5)], unit(0, 5, 2, D), replace=True)
        with Index.open(folder) as index:
            assert len(index) == 20
        writer.compact()
    with Index.open(folder) as index:
        assert len(index.search(unit(9, 2, D), 50)) == 20
        assert number not in {part.number for part in index.snapshot().parts}
        assert index.verify() == []


def test_info_counts_what_is_deleted_until_it_is_compacted(tmp_path, capsys):
    """By hand: two segments of one item, one of them deleted whole."""
    folder = filled(tmp_path / "index", segments=2, items=1)
    assert cli_index.main(["delete", str(folder), "0-0", "--quiet"]) == 0
    for deleted in (1, 0):
        capsys.readouterr()
        assert cli_index.main(["info", str(folder)]) == 0
        assert f"1 item in 1 segment, {deleted} deleted" in capsys.readouterr().out
        compact(folder)


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize("ids", [list(np.array(["x", "y"])), [Colour.RED, "y"]], ids=["numpy", "enum"])
def test_any_kind_of_text_is_an_id(tmp_path, ids):
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (1, 2)))
    with Index.open(folder).writer() as writer:
        writer.add(ids, unit(0, 2, 2, D))
        assert writer.known(ids) == {str.__str__(id_) for id_ in ids}
    with Index.open(folder) as index:
        assert {hit.id for hit in index.search(unit(9, 2, D), 2)} == {ids[0].encode().decode(), "y"}
        assert index.verify() == []


def test_ids_that_are_one_text_or_half_a_character_are_refused(tmp_path):
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (1, 2)))
    with Index.open(folder).writer() as writer:
        writer.add(["x", "y"], unit(0, 2, 2, D))
        for call in (writer.delete, writer.known, lambda ids: writer.add(ids, unit(0, 2, 2, D))):
            with pytest.raises(UsageError, match="list of texts"):
                call("xy")
            with pytest.raises(UsageError, match="half a character"):
                call(["\ud800", "z"])
    with Index.open(folder) as index:
        assert len(index) == 2


def test_a_catalogue_cannot_name_a_file_elsewhere(tmp_path):
    """The attack: a copied checksum and a path out of the folder, so that compacting would remove another index's segment."""
    victim, evil = (filled(tmp_path / name, segments=1) for name in ("victim", "evil"))
    (target,) = (victim / "segments").iterdir()
    connection = sqlite3.connect(evil / "catalogue.sqlite")
    number, _, items, _, dead, _ = connection.execute("SELECT * FROM segments").fetchone()
    ((checksum,),) = sqlite3.connect(victim / "catalogue.sqlite").execute("SELECT checksum FROM segments").fetchall()
    name = f"../../victim/segments/{target.name}"
    crc = row_crc(number, name, items, checksum, dead)
    connection.execute("UPDATE segments SET name = ?, checksum = ?, crc = ?", (name, checksum, crc))
    connection.commit()
    from metaembed.runtime.index_writer import IndexWriter

    for opening in (Index.open, IndexWriter):
        with pytest.raises(BundleError, match="no file name"):
            opening(evil)
    assert target.is_file()


def test_more_results_than_the_default_cascade_keeps_are_given(tmp_path):
    """20,001 items: a tenth are 2,000 survivors, fewer than were asked for without naming a stage."""
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (8, 16)))
    with Index.open(folder).writer() as writer:
        writer.add([str(i) for i in range(20_001)], unit(0, 20_001, 16, D))
    with Index.open(folder) as index:
        assert len(index.search(unit(9, 4, D), 3000)) == 3000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=NaN", "NaN"),
        ("n=-Infinity", "-Infinity"),
        (f"n={'[' * 100_000}", "[" * 100_000),
        ("n=9223372036854775807", 2**63 - 1),
    ],
    ids=["nan", "infinity", "deep", "largest"],
)
def test_odd_values_in_a_filter(tmp_path, text, value):
    assert parse_filters([text])[1][-1] == value
    with Index.open(filled(tmp_path / "index", segments=1)) as index:
        assert index.search(unit(9, 2, D), 3, where=[text]) == []


@pytest.mark.parametrize("text", ['n="\ud800"', "n=\udcff", "n=\\ud800\ud800"])
def test_filters_that_are_not_unicode_are_refused(text):
    with pytest.raises(UsageError, match="not valid Unicode"):
        parse_filters([text])


def test_a_text_with_a_nul_is_not_what_stands_before_it(tmp_path):
    """Expected by Python's own comparison of texts."""
    texts = ["a", "a\0b", "a\\u0000b", "a\\\0", "b", "\0", ""]
    Index.create(tmp_path / "i", Layout(D, (1, 2)))
    with IndexWriter(tmp_path / "i") as writer:
        writer.add(list("0123456"), unit(0, 7, 2, D), [{"t": text} for text in texts])
    with Index.open(tmp_path / "i") as index:
        for value in ("a", "a\\", "\x01"):
            for sign, holds in (("=", eq), ("!=", ne), ("<", lt), ("<=", le), (">", gt), (">=", ge)):
                hits = index.search(unit(9, 2, D), 9, where=[f"t{sign}{json.dumps(value)}"])
                expected = [str(i) for i, text in enumerate(texts) if holds(text, value)]
                assert sorted(hit.id for hit in hits) == expected, (value, sign)


def test_more_conditions_than_sqlite_nests_are_refused():
    with pytest.raises(UsageError, match="1500 conditions"):
        parse_filters(["n=1"] * 1500)


def test_the_screen_keeps_the_best_of_large_vectors_that_all_but_tie():
    """Found in review: an absolute allowance for float32's sums is too small for long vectors. Two items whose exact scores are
    equal, as float64 says; whichever the exact pass would take, both must reach it."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        query = np.zeros((1, 130), np.float32)
        query[0, 2:] = np.repeat((1 + rng.random(64)).astype(np.float32) * 1000, 2)
        a = np.full(130, 1.5, np.float32)
        a[:2] = 127, 0
        b = a.copy()
        b[2::2], b[3::2] = 0.5, 2.5
        others = np.zeros((40, 130), np.float32)
        others[:, 0] = 127
        vectors = np.concatenate([a[None], b[None], others])[:, None]
        exact = vectors[:, 0].astype(np.float64) @ query[0].astype(np.float64)
        assert exact[0] == exact[1] > exact[2]
        assert {0, 1} <= set(may_be_best(query, quantize_int8(vectors), np.arange(42), 1).tolist())


def test_threads_that_share_a_writer_take_turns(tmp_path):
    """Found in review: both read that an id was there once, and both replaced it; compaction lost what was being added."""
    folder = filled(tmp_path / "i", segments=1)

    def replace(seed):
        for i in range(15):
            writer.add([f"same-{i}"], unit(seed, 1, 2, D), replace=True)
            writer.add([f"{seed}-{i}"], unit(seed, 1, 2, D), replace=True)
            if i % 5 == 4:
                writer.compact()

    with IndexWriter(folder) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(replace, range(10, 14)))
    with Index.open(folder) as index:
        assert index.verify() == []
        found = [hit.id for hit in index.search(unit(0, 2, D), k=1000)]
        assert sorted(found) == sorted(
            [f"0-{j}" for j in range(5)]
            + [f"same-{i}" for i in range(15)]
            + [f"{s}-{i}" for s in range(10, 14) for i in range(15)]
        )


def test_an_open_index_stays_where_it_is_when_the_process_moves(tmp_path, monkeypatch):
    filled(tmp_path / "i")
    monkeypatch.chdir(tmp_path)
    with Index.open("i") as index, IndexWriter("i") as writer:
        monkeypatch.chdir("/")
        writer.add(["new"], unit(9, 1, 2, D))
        assert index.search(unit(9, 1, 2, D)[0], k=1)[0].id == "new"


def test_ids_may_come_from_a_generator(tmp_path):
    with IndexWriter(filled(tmp_path / "i", segments=1)) as writer:
        assert writer.known(id_ for id_ in ("0-0", "none")) == {"0-0"}
        assert writer.delete(id_ for id_ in ("0-0", "0-1")) == 2


def test_a_closed_writer_lets_go_although_the_process_has_forked(tmp_path):
    writer = IndexWriter(filled(tmp_path / "i", segments=1))
    reader, end = os.pipe()
    if (child := os.fork()) == 0:
        os.close(end)
        os.read(reader, 1)  # until the test is done
        os._exit(0)
    try:
        writer.close()
        IndexWriter(tmp_path / "i").close()
    finally:
        os.close(end)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"k": 2.5}, "whole number"),
        ({"k": "3"}, "whole number"),
        ({"k": None}, "whole number"),
        ({"cascade": "1,1 2,2"}, "R_Q,R_C"),
        ({"cascade": ["1"]}, "R_Q,R_C"),
        ({"cascade": 1}, "1 is no stage"),
        ({"cascade": [1, 1]}, "1 is no stage"),
        ({"cascade": [Budget(1, 1)]}, "is no stage"),
        ({"cascade": [(1, 1, 1.5)]}, "is no stage"),
        ({"cascade": [(True, 1)]}, "is no stage"),
        ({"cascade": [(0, 1)]}, "at least one vector"),
        ({"cascade": [(1, 1, 0), (2, 2)]}, "leaves nothing"),
        ({"where": "n=1"}, "list of texts"),
        ({"where": [1]}, "list of texts"),
        ({"where": None}, "list of texts"),
        ({"where": 5}, "list of texts"),
    ],
)
def test_arguments_of_other_kinds_are_one_sentence(tmp_path, how, says):
    with Index.open(filled(tmp_path / "i", segments=1)) as index:
        assert len(index.search(unit(0, 2, D), k=np.int64(2), cascade=ONE[0])) == 2
        with pytest.raises(UsageError, match=says):
            index.search(unit(0, 2, D), **how)


def test_conditions_may_come_from_a_generator(tmp_path):
    """Found in review: looking at their types used them up, and everything satisfied what was left."""
    with Index.open(filled(tmp_path / "i", segments=1)) as index:
        for value, count in ((1, 5), (2, 0)):
            assert len(index.search(unit(0, 2, D), where=(text for text in [f"n={value}"]))) == count


@pytest.mark.parametrize("shard", ["ab", (0.5, 2), (0, 2.0), (False, True), (0,), (0, 1, 2), 1, None])
def test_a_shard_that_is_not_two_whole_numbers_is_refused(tmp_path, shard):
    with pytest.raises(UsageError, match=r"is not \(i, of\)"):
        Index.open(filled(tmp_path / "i", segments=1), shard=shard)
    with Index.open(tmp_path / "i", shard=(np.int64(1), 2)) as index:
        assert len(index) == 3  # by hand: the second half of five rows


@pytest.mark.parametrize("ids", [None, 5])
def test_ids_of_other_kinds_are_refused(tmp_path, ids):
    with IndexWriter(filled(tmp_path / "i", segments=1)) as writer:
        for call in (writer.delete, writer.known, lambda ids: writer.add(ids, unit(0, 2, 2, D))):
            with pytest.raises(UsageError, match="list of texts"):
                call(ids)


def test_a_number_with_more_digits_than_python_reads_is_refused(tmp_path):
    """4,300 digits by default; a payload that could be written and not read again would be lost."""
    with IndexWriter(filled(tmp_path / "i", segments=1)) as writer:
        with pytest.raises(UsageError, match="a payload is a JSON object.*4300 digits"):
            writer.add(["x"], unit(0, 1, 2, D), [{"n": 10**5000}])
        assert writer.known(["x"]) == set()


def test_a_segment_that_may_not_be_read_is_damage_of_its_own(tmp_path, monkeypatch):
    folder = filled(tmp_path / "i", segments=2)
    locked = sorted((folder / "segments").glob("*.safetensors"))[0]
    plain = open

    def guarded(path, *args, **options):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr("builtins.open", guarded)
    with pytest.raises(BundleError, match="may not be read by this user"):
        Index.open(folder)
    with Index.open(folder, skip_damaged=True) as index:
        assert len(index.search(unit(0, 2, D), k=100)) == 5
        assert "may not be read" in "".join(index.verify())
