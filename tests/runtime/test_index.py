"""The index against a dictionary that holds the same items, and float64 brute force over it."""

import contextlib
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_catalogue import CATALOGUE
from metaembed.runtime.index_filter import parse_filters
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_writer import IndexWriter
from metaembed.runtime.int8 import dequantize_int8, quantize_int8

R, D = 5, 7
FULL = [Stage(Budget(3, R))]


def unit(rng, *shape):
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def ranked(items, query, k=10):
    """(id, score) by float64 MaxSim over what bf16 keeps of every item; ties by id."""
    scores = {
        id_: (query.astype(np.float64) @ vectors.astype(ml_dtypes.bfloat16).astype(np.float64).T).max(-1).sum()
        for id_, vectors in items.items()
    }
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]


def assert_same(hits, expected):
    assert [hit.id for hit in hits] == [id_ for id_, _ in expected]
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    Index.create(tmp_path / "index", Layout.for_vectors(D, R))
    return tmp_path / "index"


@pytest.fixture
def query():
    return unit(np.random.default_rng(99), 3, D)


def fill(folder, *counts, rng=None, prefix="item"):
    """Add items in one segment per count; returns them as a dictionary."""
    rng = rng or np.random.default_rng(0)
    items = {}
    with Index.open(folder).writer() as writer:
        for count in counts:
            ids = [f"{prefix}{len(items) + i:04}" for i in range(count)]
            vectors = unit(rng, count, R, D)
            writer.add(ids, vectors, [{"number": len(items) + i} for i in range(count)])
            items |= dict(zip(ids, vectors, strict=True))
    return items


def test_search_ranks_as_brute_force(folder, query):
    items = fill(folder, 20, 1, 33)
    with Index.open(folder) as index:
        assert len(index) == 54
        hits = index.search(query, 7, cascade=FULL)
        assert_same(hits, ranked(items, query, 7))
        assert hits[0].payload == {"number": int(hits[0].id[4:])}


def test_groups_nest_as_the_training_nests_them():
    """Counted by hand: (1,1), (2,4), (4,8), (8,16), (16,64); a model with 10 candidate vectors ends its last group there."""
    assert Layout.for_vectors(D, 64).ends == (1, 4, 8, 16, 64)
    assert Layout.for_vectors(D, 10).ends == (1, 4, 8, 10)
    assert Layout.for_vectors(D, 6, ends=(2, 6)).ends == (2, 6)
    assert [Layout.for_vectors(D, 64).groups_of(r) for r in (1, 2, 4, 5, 64)] == [1, 2, 2, 3, 5]


@pytest.mark.parametrize("vectors", [1, 2, 4, 5])
def test_a_budget_reads_the_prefix_of_every_item(folder, query, vectors):
    items = fill(folder, 9, 4)
    with Index.open(folder) as index:
        hits = index.search(query, 5, cascade=[Stage(Budget(2, vectors))])
    assert_same(hits, ranked({id_: item[:vectors] for id_, item in items.items()}, query[:2], 5))


def test_segments_are_safetensors_files_with_contiguous_groups(folder):
    """Read back by the safetensors library."""
    items = fill(folder, 6)
    (path,) = (folder / SEGMENTS).iterdir()
    tensors = safetensors.numpy.load_file(path)
    assert list(tensors) == ["vectors.0-0", "vectors.1-3", "vectors.4-4", "crc32"]
    stored = np.concatenate([tensors[name] for name in list(tensors)[:3]], axis=1)
    np.testing.assert_array_equal(stored, np.stack(list(items.values())).astype(ml_dtypes.bfloat16))


def test_held_vectors_give_the_same_answers_without_their_file(folder, query):
    """The bytes of the first groups are overwritten in place after they were copied into memory."""
    items = fill(folder, 20)
    with Index.open(folder, hold=4) as index:
        (path,) = (folder / SEGMENTS).iterdir()
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        hits = index.search(query, 5, cascade=[Stage(Budget(3, 4))])
    assert_same(hits, ranked({id_: item[:4] for id_, item in items.items()}, query, 5))


def test_int8_vectors_are_held_with_their_scales_and_so_are_later_ones(tmp_path, query):
    """Held after opening; a second segment comes, both files are overwritten in place. Expected: what int8 keeps, in float64."""
    folder = tmp_path / "index"
    Index.create(folder, Layout.for_vectors(D, R, "int8"))
    items = fill(folder, 20)
    with Index.open(folder) as index:
        index.hold(R)
        items |= fill(folder, 5, rng=np.random.default_rng(1), prefix="later")
        assert len(index) == 25
        for path in (folder / SEGMENTS).iterdir():
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
        hits = index.search(query, 7, cascade=FULL)
    kept = dequantize_int8(quantize_int8(np.stack(list(items.values())))).astype(np.float64)
    scores = np.einsum("rd,nsd->nrs", query.astype(np.float64), kept).max(-1).sum(-1)
    best = np.argsort(-scores)[:7]
    assert_same(hits, [(list(items)[i], scores[i]) for i in best])


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shards_divide_the_items_and_their_best_are_the_best(folder, query, of):
    items = fill(folder, 6, 13, 2)
    with Index.open(folder).writer() as writer:
        writer.delete(["item0002"])
    del items["item0002"]
    hits = []
    sizes = []
    for i in range(of):
        with Index.open(folder, shard=(i, of)) as index:
            sizes.append(len(index))
            hits += index.search(query, 4, cascade=FULL)
    assert sum(sizes) == 20
    assert max(sizes) - min(sizes) <= 2
    best = sorted(hits, key=lambda hit: (-hit.score, hit.id))[:4]
    assert [hit.id for hit in best] == [id_ for id_, _ in ranked(items, query, 4)]
    with pytest.raises(UsageError, match="is not"):
        Index.open(folder, shard=(of, of))


def test_int8_storage_ranks_by_its_codes(tmp_path, query):
    """Brute force over the dequantised codes."""
    Index.create(tmp_path / "index", Layout.for_vectors(D, R, "int8"))
    vectors = unit(np.random.default_rng(1), 30, R, D)
    ids = [f"item{i:02}" for i in range(30)]
    with Index.open(tmp_path / "index") as index:
        with index.writer() as writer:
            writer.add(ids, vectors)
        hits = index.search(query, 6, cascade=FULL)
        assert index.verify() == []
    values = dequantize_int8(quantize_int8(vectors)).astype(np.float64)
    scores = np.einsum("rd,nsd->nrs", query.astype(np.float64), values).max(-1).sum(-1)
    assert [hit.id for hit in hits] == [ids[i] for i in np.argsort(-scores)[:6]]


def test_deleted_and_updated_items_are_gone_and_changed(folder, query):
    items = fill(folder, 12, 8)
    rng = np.random.default_rng(3)
    with Index.open(folder) as index:
        first = index.search(query, 3, cascade=FULL)
        changed = unit(rng, 2, R, D)
        with index.writer() as writer:
            assert writer.delete([first[0].id, "unknown"]) == 1
            writer.add([first[1].id, "new"], changed, [None, {"number": -1}], replace=True)
        del items[first[0].id]
        items |= {first[1].id: changed[0], "new": changed[1]}
        assert len(index) == 20
        assert_same(index.search(query, 20, cascade=FULL), ranked(items, query, 20))
        with index.writer() as writer:
            assert writer.compact() == 3
        assert len(list((folder / SEGMENTS).iterdir())) == 1
        assert_same(index.search(query, 20, cascade=FULL), ranked(items, query, 20))
        assert index.verify() == []


def test_compaction_merges_up_to_the_size_and_leaves_full_segments_alone(folder):
    fill(folder, 4, 4, 4, 9)
    with Index.open(folder) as index, index.writer() as writer:
        assert writer.compact(segment_bytes=8 * index.layout.item_bytes) == 2
        assert sorted(len(part.alive) for part in index.snapshot().parts) == [4, 8, 9]


def test_compaction_of_an_index_whose_items_are_all_deleted_leaves_nothing(folder, query):
    items = fill(folder, 3)
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.delete(list(items))
            writer.compact()
        assert index.search(query, 3) == []
        assert list((folder / SEGMENTS).iterdir()) == []


def test_a_search_that_began_before_a_compaction_ends_on_its_own_state(folder, query):
    items = fill(folder, 5, 5)
    with Index.open(folder) as index:
        before = index.snapshot()
        with Index.open(folder).writer() as writer:
            writer.delete(["item0000"])
            writer.compact()
        assert len(before) == 10
        assert before.parts[0].segment.groups(R)[0].shape == (5, 1, D)
        assert index.describe(before, np.array([0])) is None
        del items["item0000"]
        assert_same(index.search(query, 9, cascade=FULL), ranked(items, query, 9))


def test_threads_share_an_index_that_changes(folder):
    """As a web server does: eight threads search one object while another writes. Expected: what one thread finds alone."""
    fill(folder, 20, 20)
    rng = np.random.default_rng(11)
    queries = [unit(rng, 3, D) for _ in range(8)]
    stages = [Stage(Budget(1, 1), 39), Stage(Budget(3, R))]
    with Index.open(folder) as index, index.writer() as writer, ThreadPoolExecutor(8) as pool:
        wanted = [index.search(query, 5, cascade=stages, where=["number>=2"]) for query in queries]
        found = [pool.submit(index.search, queries[k % 8], 5, cascade=stages, where=["number>=2"]) for k in range(80)]
        for _ in range(4):  # one fewer than the compactions that a search outlasts
            writer.add(["passing"], unit(rng, 1, R, D))
            writer.delete(["passing"])
            writer.compact()
        for k, future in enumerate(found):
            assert future.result() == wanted[k % 8]


def test_a_closed_index_says_so(folder, query):
    """Found in use: it was called damaged, and to be restored."""
    index = Index.open(folder)
    index.close()
    index.close()
    with pytest.raises(UsageError, match="is closed"):
        index.search(query, 1)


def test_ties_go_by_id_wherever_they_lie(folder, query):
    same = unit(np.random.default_rng(5), 1, R, D)
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.add(["d", "b", "e"], same.repeat(3, 0))
            writer.add(["a", "f", "c"], same.repeat(3, 0))
        assert [hit.id for hit in index.search(query, 4, cascade=FULL)] == ["a", "b", "c", "d"]
        stages = [Stage(Budget(1, 1), 3), Stage(Budget(3, R))]
        assert [hit.id for hit in index.search(query, 2, cascade=stages)] == ["a", "b"]


@pytest.mark.parametrize("text", ["v<>1", "v=>1", "v=<1", "v!==1", "v===1"])
def test_operators_of_other_languages_are_refused(text):
    """Found in review: ``v<>1`` was read as less than the text ``>1``, and found nothing without a word."""
    with pytest.raises(UsageError, match="has no operator of"):
        parse_filters([text])
    assert parse_filters(['v="=1"'])[1][-1] == "=1"


def test_filters_tell_true_from_one(tmp_path):
    ids = ["true", "one", "text"]
    Index.create(tmp_path / "i", Layout.for_vectors(8, 1))
    with IndexWriter(tmp_path / "i") as writer:
        writer.add(ids, np.ones((3, 1, 8), np.float32), [{"v": True}, {"v": 1}, {"v": "true"}])
    with Index.open(tmp_path / "i") as index:
        for condition, expected in (("v=true", ["true"]), ("v=1", ["one"]), ('v="true"', ["text"]), ("v<2", ["one"])):
            assert [hit.id for hit in index.search(np.ones((1, 8), np.float32), where=[condition])] == expected


def test_filters_name_fields_as_data_sets_do(folder, query):
    """By hand: metadata of others has names with spaces, accents and dollars; none of them is read as a path or as SQL."""
    payload = {"page number": 3, "año": {"mes del $": 4}, "it's": 5, "[0]": 6}
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.add(["a"], unit(np.random.default_rng(7), 1, R, D), [payload])
        for where, count in [
            ("page number=3", 1),
            (" page number  >= 4", 0),
            ("año.mes del $=4", 1),
            ("it's=5", 1),
            ("[0]=6", 1),
        ]:
            assert len(index.search(query, 9, cascade=FULL, where=[where])) == count, where
        for where in ('a"b=1', "a\\b=1", "a..b=1", ".a=1", "=1"):
            with pytest.raises(UsageError, match="is not of the form"):
                index.search(query, 9, cascade=FULL, where=[where])


def test_filters_choose_by_payload_fields(folder, query):
    rng = np.random.default_rng(7)
    payloads = [{"year": 2000 + i, "lang": "en" if i % 2 else "de", "author": {"name": "O'Hara; --"}} for i in range(8)]
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.add([str(i) for i in range(9)], unit(rng, 9, R, D), [*payloads, None])

        def found(*where):
            return sorted(int(hit.id) for hit in index.search(query, 9, cascade=FULL, where=where))

        assert found() == list(range(9))
        assert found("year>=2003", "lang=en") == [3, 5, 7]
        assert found("year!=2003", "year<2005") == [0, 1, 2, 4]
        assert found("author.name=O'Hara; --") == list(range(8))
        assert found('year="2003"') == []
        assert found("missing=1") == []
        assert found("year==2003") == [3]
        assert found("lang=en' OR 1=1 --") == []
        with pytest.raises(UsageError, match="is not of the form FIELD=VALUE"):
            found("year")


@pytest.mark.parametrize("limit", [0.0, 1.1])
def test_filtered_search_is_the_same_by_rows_and_by_scan(folder, query, limit, monkeypatch):
    monkeypatch.setattr("metaembed.runtime.index_scan.WORTH_PICKING", limit)
    items = fill(folder, 10, 10)
    with Index.open(folder) as index:
        hits = index.search(query, 4, cascade=FULL, where=["number>=7"])
    assert_same(hits, ranked({id_: item for id_, item in items.items() if int(id_[4:]) >= 7}, query, 4))


@pytest.mark.parametrize(
    ("ids", "change", "sentence"),
    [
        (["a", "a", "b"], None, "ids are distinct"),
        (["a", "b", ""], None, "ids are distinct"),
        (["a", "b"], None, "do not pair up"),
        (["a", "b", "c"], (0, 1, 2, np.nan), "item 0 holds a NaN"),
        (["a", "b", "c"], (2, 4, 6, -np.inf), "item 2 holds a NaN"),
        (["a", "b", "c"], (1, 0, 0, 3.4e38), "item 1 holds a NaN or a value beyond bf16"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(folder, ids, change, sentence):
    vectors = unit(np.random.default_rng(0), 3, R, D)
    if change:
        vectors[change[:3]] = change[3]
    with Index.open(folder) as index:
        with index.writer() as writer, pytest.raises(UsageError, match=sentence):
            writer.add(ids, vectors)
        assert len(index) == 0
    assert list((folder / SEGMENTS).iterdir()) == []


def test_wrong_shapes_known_ids_and_odd_payloads_are_refused(folder):
    fill(folder, 2)
    with Index.open(folder).writer() as writer:
        with pytest.raises(UsageError, match=r"embeddings are \(1, 5, 8\); this index takes \(items, 5, 7\)"):
            writer.add(["x"], np.zeros((1, R, D + 1), np.float32))
        with pytest.raises(UsageError, match="'item0001' is in the index already"):
            writer.add(["x", "item0001"], np.ones((2, R, D), np.float32))
        with pytest.raises(UsageError, match="a payload is a JSON object"):
            writer.add(["x"], np.ones((1, R, D), np.float32), [{"price": float("nan")}])
        assert writer.known(["item0000", "x"]) == {"item0000"}


def test_searches_that_ask_too_much_get_one_sentence(folder, query):
    fill(folder, 3)
    with Index.open(folder) as index:
        for cascade, k, sentence in [
            ([Stage(Budget(4, 5))], 1, "asks for 4 query Meta Tokens"),
            ([Stage(Budget(1, 6))], 1, "asks for 6 candidate Meta Tokens"),
            ([Stage(Budget(1, 1)), Stage(Budget(3, 5))], 1, "does not say how many items it leaves"),
            ([Stage(Budget(1, 1), 2), Stage(Budget(3, 5))], 3, "leaves fewer items than the best 3"),
            (
                [Stage(Budget(1, 1), 2), Stage(Budget(2, 4), 3), Stage(Budget(3, 5))],
                1,
                "cannot leave more items than the 2",
            ),
            ([Stage(Budget(3, 5), 2), Stage(Budget(1, 5))], 1, "uses no more vectors than stage 3,5:2"),
            ([], 1, "at least one stage"),
            (None, 0, "from 1 on"),
        ]:
            with pytest.raises(UsageError, match=sentence):
                index.search(query, k, cascade=cascade)
        with pytest.raises(UsageError, match="NaN"):
            index.search(query * np.nan)
        with pytest.raises(UsageError, match="dims"):
            index.search(query[:, :3])


def test_an_empty_index_finds_nothing(folder, query):
    with Index.open(folder) as index:
        assert index.search(query) == []
        assert index.verify() == []


def test_a_second_writer_gets_a_sentence_until_the_first_is_done(folder):
    with Index.open(folder).writer(), pytest.raises(UsageError, match="another process is writing"):
        Index.open(folder).writer()
    Index.open(folder).writer().close()


def test_no_index_and_an_occupied_folder_get_a_sentence(tmp_path, folder):
    with pytest.raises(UsageError, match="is no index"):
        Index.open(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        Index.create(folder, Layout.for_vectors(D, R))
    (tmp_path / CATALOGUE).write_bytes(b"no database at all, but long enough to look at" * 40)
    with pytest.raises(MetaEmbedError, match=r"damaged|no catalogue"):
        Index.open(tmp_path)


def test_reading_a_small_budget_reads_only_its_group(folder, query):
    """Damage in another group is not noticed by a search that does not use it, and is by one that does."""
    fill(folder, 8)
    (path,) = (folder / SEGMENTS).iterdir()
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    start = json.loads(content[8:header])["vectors.4-4"]["data_offsets"][0]
    content[header + start + 3] ^= 0x10
    path.write_bytes(content)
    with Index.open(folder) as index:
        assert len(index.search(query, 3, cascade=[Stage(Budget(3, 4))])) == 3
        with pytest.raises(BundleError, match="is damaged in row 0"):
            index.search(query, 3, cascade=FULL)
        assert "row 0" in index.verify()[0]
    with Index.open(folder, skip_damaged=True) as index:
        assert "item0000" not in {hit.id for hit in index.search(query, 8, cascade=FULL)}


def answers(folder, query):
    with Index.open(folder) as index:
        return [(hit.id, hit.score, hit.payload) for hit in index.search(query, 30, cascade=FULL)]


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_byte_anywhere_is_found_or_harmless(folder, query, seed, tmp_path):
    """Of a segment or of the catalogue: a search refuses with a sentence or answers as before, and verify names it."""
    fill(folder, 20, 10)
    with Index.open(folder).writer() as writer:
        writer.delete(["item0003"])
    expected = answers(folder, query)
    rng = np.random.default_rng(seed)
    paths = [folder / CATALOGUE, *sorted((folder / SEGMENTS).iterdir())]
    path = paths[seed % len(paths)]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    with contextlib.suppress(MetaEmbedError):
        assert answers(folder, query) == expected
    if path.suffix == ".safetensors":
        with Index.open(folder, skip_damaged=True) as index:
            assert any(path.name in line for line in index.verify())


@pytest.mark.parametrize("size", [0, 5, 700])
def test_a_truncated_or_missing_segment_is_named_and_the_rest_can_be_served(folder, query, size):
    fill(folder, 20, prefix="kept")
    kept = {path.name for path in (folder / SEGMENTS).iterdir()}
    fill(folder, 20, rng=np.random.default_rng(8))
    (path,) = (path for path in (folder / SEGMENTS).iterdir() if path.name not in kept)
    path.write_bytes(path.read_bytes()[:size]) if size else path.unlink()
    with pytest.raises(BundleError, match=path.name):
        Index.open(folder)
    with Index.open(folder, skip_damaged=True) as index:
        assert path.name in index.snapshot().damaged[0]
        assert {hit.id[:4] for hit in index.search(query, 40, cascade=FULL)} == {"kept"}
        assert any(path.name in line for line in index.verify())


def search_as_nobody(folder, query):
    with contextlib.suppress(PermissionError):
        os.setuid(65534)  # root may write anywhere
    with Index.open(folder) as index:
        hits = index.search(query, 5, cascade=FULL)
        with pytest.raises((MetaEmbedError, OSError)):
            index.writer()
    return [(hit.id, hit.score) for hit in hits]


def test_a_read_only_index_is_served(query):
    """By another user, in another process, from files and folders without write permission."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "index"
        Index.create(folder, Layout.for_vectors(D, R))
        expected = ranked(fill(folder, 5), query, 5)
        for path in [Path(top), folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            hits = pool.apply(search_as_nobody, (folder, query))
        for path in [Path(top), folder, folder / SEGMENTS]:
            path.chmod(0o755)
    assert [id_ for id_, _ in hits] == [id_ for id_, _ in expected]


def test_a_full_disk_keeps_what_was_there(folder, query, monkeypatch):
    """The write fails half-way with ENOSPC, as a full disk does; the index answers as before and holds no remains."""
    items = fill(folder, 5)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with Index.open(folder) as index:
        with index.writer() as writer, monkeypatch.context() as patch:
            patch.setattr("metaembed.runtime.index_segment.os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                writer.add(["x"], unit(np.random.default_rng(0), 1, R, D))
        assert_same(index.search(query, 9, cascade=FULL), ranked(items, query, 9))
        assert len(list((folder / SEGMENTS).iterdir())) == 1


ADDER = """
import sys, numpy as np
from metaembed.runtime.index import Index
rng = np.random.default_rng(int(sys.argv[2]))
with Index.open(sys.argv[1]) as index, index.writer() as writer:
    while len(index) < 2000:
        ids = [f"item{len(index) + i}" for i in range(rng.integers(1, 60))]
        writer.add(ids, rng.standard_normal((len(ids), 5, 7)).astype(np.float32))
        print(*ids, flush=True)
        if rng.random() < 0.1:
            writer.compact(200_000)
"""


def test_items_acknowledged_before_a_kill_are_there_once_and_sound(folder, tmp_path):
    """SIGKILL at random moments; what the process printed after `add` returned is the independent record."""
    rng = np.random.default_rng(11)
    acknowledged = set()
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ADDER, str(folder), str(attempt)], stdout=subprocess.PIPE, text=True
        )
        acknowledged |= set(process.stdout.readline().split())  # it is at work
        try:
            process.wait(float(rng.uniform(0, 0.15)))
        except subprocess.TimeoutExpired:
            process.kill()
        acknowledged |= set(process.stdout.read().split())
        process.wait()
        process.stdout.close()
    with Index.open(folder) as index:
        index.writer().close()  # removes what the last kill left
        assert index.verify() == []
        with index.writer() as writer:
            assert writer.known(sorted(acknowledged)) == acknowledged
        names = {part.segment.path.name for part in index.snapshot().parts}
        assert {path.name for path in (folder / SEGMENTS).iterdir()} == names
        assert len(index) >= len(acknowledged)


def test_searches_while_another_process_writes_are_never_wrong(folder, query):
    """Items of the writer score below those known beforehand, so the best ten never change."""
    strong = np.repeat(query[:1][None], 10, axis=0).repeat(R, axis=1) * np.linspace(2, 1, 10)[:, None, None]
    with Index.open(folder) as index, index.writer() as writer:
        writer.add([f"strong{i}" for i in range(10)], strong.astype(np.float32))
    query = query[:1].repeat(3, axis=0)
    script = ADDER.replace("rng.standard_normal((len(ids), 5, 7))", "rng.uniform(-.01, .01, (len(ids), 5, 7))")
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), "0"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    sizes = set()
    with Index.open(folder) as index:
        for _ in range(150):
            hits = index.search(query, 10, cascade=FULL)
            assert [hit.id for hit in hits] == [f"strong{i}" for i in range(10)]
            sizes.add(len(index.snapshot()))
        process.kill()
        process.stdout.read()
        process.wait()
        process.stdout.close()
    assert len(sizes) > 1


def test_an_index_can_be_copied_as_a_folder(folder, query, tmp_path):
    items = fill(folder, 5)
    shutil.copytree(folder, tmp_path / "copy")
    with Index.open(Path(tmp_path / "copy")) as index:
        assert_same(index.search(query, 5, cascade=FULL), ranked(items, query, 5))
