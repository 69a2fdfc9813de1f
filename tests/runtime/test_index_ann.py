"""The approximate first stage against float64 brute force over the items as bf16 keeps them."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime import ann_usearch, cli_index, index_ann
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout

N, R, D, K = 3000, 2, 24, 10
ONE = [Stage(Budget(1, 1))]
TWO = [Stage(Budget(1, 1), 30), Stage(Budget(2, R))]


def clustered(seed, count, r=R):
    """Unit vectors (n, r, d) about 40 centres, which are the same for every seed."""
    centres = np.random.default_rng(7).standard_normal((40, D))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 40, count)][:, None] + rng.standard_normal((count, r, D))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def ranked(items, query, r, k=K):
    """(id, score) of the k best by float64 MaxSim of the first r vectors of both sides."""
    vectors = np.stack(list(items.values())).astype(ml_dtypes.bfloat16).astype(np.float64)[:, :r]
    scores = (query[:r].astype(np.float64) @ vectors.swapaxes(1, 2)).max(-1).sum(-1)
    ids = list(items)
    return [(ids[i], scores[i]) for i in np.argsort(-scores, kind="stable")[:k]]


def ids_of(found):
    return [hit.id if hasattr(hit, "id") else hit[0] for hit in found]


def by_hand(items, query, cascade):
    """`ranked`, stage after stage."""
    for stage in cascade:
        found = ranked(items, query, stage.budget.candidate, stage.keep or K)
        items = {id_: items[id_] for id_, _ in found}
    return found


def recall(index, items, queries, cascade=ONE):
    """Of what brute force finds, the share that is found; every score that is given must be the exact one."""
    shares = []
    for query in queries:
        hits = index.search(query, K, cascade=cascade, approximate=True)
        exact = dict(ranked(items, query, cascade[-1].budget.candidate, k=len(items)))
        np.testing.assert_allclose([hit.score for hit in hits], [exact[hit.id] for hit in hits], atol=1e-5)
        assert len(hits) == K
        shares.append(len(set(ids_of(hits)) & set(ids_of(by_hand(items, query, cascade)))) / K)
    return np.mean(shares)


def scored(index):
    """How many items' first vectors were read: their checksums are checked when that happens."""
    return sum(int(part.segment._checked[:, 0].sum()) for part in index.snapshot().parts)


def build(folder, **settings):
    with Index.open(folder).writer() as writer:
        return writer.build_ann(**settings)


def graphs(folder):
    return sorted(folder.glob("ann-*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "index"
    Index.create(folder, Layout.for_vectors(D, R))
    items = dict(zip([f"{i:04}" for i in range(N)], clustered(0, N), strict=True))
    with Index.open(folder).writer() as writer:
        for start in range(0, N, N // 3):
            ids = list(items)[start : start + N // 3]
            writer.add(ids, np.stack([items[id_] for id_ in ids]), [{"n": int(id_)} for id_ in ids])
        assert writer.build_ann() == N
    return folder, items


@pytest.fixture
def filled(made, tmp_path):
    """An index of three segments with a graph, and what is in it."""
    shutil.copytree(made[0], tmp_path / "index")
    return tmp_path / "index", dict(made[1])


@pytest.fixture(autouse=True)
def _small_graphs_are_walked(monkeypatch):
    """By the defaults no graph of so few items would be walked."""
    monkeypatch.setattr(index_ann, "WORTH_WALKING", 0.01)
    monkeypatch.setattr(index_ann, "LEAST_WALK", 1)


@pytest.fixture
def query():
    return clustered(1, 1)[0]


@pytest.mark.parametrize("cascade", [ONE, TWO], ids=["alone", "cascade"])
def test_it_finds_nearly_what_brute_force_finds_and_scores_it_exactly(filled, cascade):
    folder, items = filled
    with Index.open(folder) as index:
        assert recall(index, items, clustered(2, 20), cascade) >= 0.97


def test_it_reads_only_what_the_graph_finds(filled, query):
    folder, _ = filled
    with Index.open(folder) as index:
        index.search(query, K, cascade=TWO, approximate=True)
        assert scored(index) == 30


def test_a_stage_that_keeps_more_than_a_walk_is_worth_is_scanned(filled, query):
    folder, items = filled
    with Index.open(folder) as index:
        hits = index.search(query, N // 10, cascade=ONE, approximate=True)
        assert ids_of(hits) == ids_of(ranked(items, query, 1, k=N // 10))
        assert scored(index) == N


def test_vectors_of_any_length_rank_by_their_products(tmp_path):
    """Not by angle or distance, of which the best here is another item."""
    vectors, query = clustered(0, N), clustered(1, 1)[0]
    items = dict(zip([f"{i:04}" for i in range(N)], vectors, strict=True))
    items |= {"long": 3 * np.stack([query[0]] * R), "equal": np.stack([query[0]] * R)}
    Index.create(tmp_path / "index", Layout.for_vectors(D, R))
    with Index.open(tmp_path / "index") as index:
        with index.writer() as writer:
            writer.add(list(items), np.stack(list(items.values())))
            writer.build_ann()
        hits = index.search(query, 3, cascade=ONE, approximate=True)
        assert ids_of(hits)[:2] == ids_of(ranked(items, query, 1))[:2] == ["long", "equal"]


def test_items_that_were_added_since_are_found(filled, query):
    folder, items = filled
    new = clustered(3, 200)
    new[7] = query
    items |= (added := dict(zip([f"new{i}" for i in range(200)], new, strict=True)))
    with Index.open(folder) as index:
        index.search(query, K, cascade=ONE, approximate=True)
        with index.writer() as writer:
            writer.add(list(added), new)
        hits = index.search(query, K, cascade=ONE, approximate=True)
        assert hits[0].id == "new7"
        assert recall(index, items, clustered(4, 20)) >= 0.97
        assert {f"new{i}" for i in range(200)} & {
            hit.id for q in new[:20] for hit in index.search(q, 1, cascade=ONE, approximate=True)
        } >= {f"new{i}" for i in range(20)}


@pytest.mark.parametrize(("count", "walked"), [(8, True), (300, False)])
def test_items_that_were_deleted_are_not_found_and_leave_no_gap(filled, query, count, walked):
    """The nearest go: what the graph finds first is nearly or wholly dead."""
    folder, items = filled
    gone = ids_of(ranked(items, query, 1, k=count))
    with Index.open(folder) as index:
        with index.writer() as writer:
            assert writer.delete(gone) == count
        for id_ in gone:
            del items[id_]
        assert ids_of(index.search(query, K, cascade=ONE, approximate=True)) == ids_of(ranked(items, query, 1))
        assert (scored(index) <= 2 * K) == walked


def test_items_that_were_updated_are_found_by_their_new_vectors_only(filled, query):
    folder, items = filled
    nearest, farthest = ids_of(ranked(items, query, 1, k=N))[:: N - 1]
    items[nearest], items[farthest] = -np.stack([query[0]] * R), np.stack([query[0]] * R)
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.add([nearest, farthest], np.stack([items[nearest], items[farthest]]), replace=True)
        hits = index.search(query, K, cascade=ONE, approximate=True)
        assert ids_of(hits) == ids_of(ranked(items, query, 1))
        assert hits[0].id == farthest
        assert hits[0].score == pytest.approx(1, abs=1e-2)


def test_a_compacted_index_is_scanned_until_the_graph_is_built_again(filled, query, caplog):
    folder, items = filled
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.delete(list(items)[:5])
            writer.compact()
        for id_ in list(items)[:5]:
            del items[id_]
        with caplog.at_level(logging.WARNING, "metaembed"):
            for _ in range(3):
                hits = index.search(query, K, cascade=ONE, approximate=True)
        assert ids_of(hits) == ids_of(ranked(items, query, 1))
        (warning,) = caplog.messages
        assert (
            warning
            == f"2995 of 2995 items are not in the HNSW graph and are scanned; metaembed-index ann {folder} builds one"
        )
        assert build(folder) == 2995
        assert recall(index, items, clustered(2, 20)) >= 0.97
    with Index.open(folder) as index:
        index.search(query, K, cascade=ONE, approximate=True)
        assert scored(index) == K


def test_a_partly_compacted_index_loses_nothing(filled, query):
    """One segment of four is rewritten: its items are scanned, those of the others come from the graph."""
    folder, items = filled
    added = dict(zip([f"new{i}" for i in range(300)], clustered(3, 300), strict=True))
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.add(list(added), np.stack(list(added.values())))
            writer.build_ann()
            writer.delete(["new0"])
            assert writer.compact(1) == 1
        items |= added
        del items["new0"]
        index.search(query, K, cascade=ONE, approximate=True)
        assert 299 <= scored(index) < 299 + 2 * K
        for i in range(1, 20):
            assert index.search(items[f"new{i}"], 1, cascade=ONE, approximate=True)[0].id == f"new{i}"
        assert recall(index, items, clustered(2, 10)) >= 0.97


@pytest.mark.parametrize(("share", "walked"), [(0.9, False), (1, True)])
def test_a_walk_counts_as_the_least_that_one_takes(filled, query, share, walked, monkeypatch):
    """A walk keeps 512 candidates however few are asked for: more than 0.9 of these items, and never more than all."""
    folder, _ = filled
    monkeypatch.setattr(index_ann, "LEAST_WALK", N)
    with Index.open(folder) as index:
        index.ann.worth_walking = share
        index.search(query, K, cascade=ONE, approximate=True)
        assert (scored(index) <= 2 * K) == walked


def test_a_graph_of_mostly_dead_items_is_not_walked(filled, query):
    folder, items = filled
    gone = ids_of(ranked(items, query, 1, k=N - 100))
    with Index.open(folder) as index:
        with index.writer() as writer:
            writer.delete(gone)
        left = {id_: items[id_] for id_ in items if id_ not in set(gone)}
        assert ids_of(index.search(query, K, cascade=ONE, approximate=True)) == ids_of(ranked(left, query, 1))


def test_with_a_filter_everything_that_satisfies_it_is_scored(filled, query):
    folder, items = filled
    some = {id_: vectors for id_, vectors in items.items() if int(id_) >= N - 50}
    with Index.open(folder) as index:
        hits = index.search(query, K, cascade=ONE, where=[f"n>={N - 50}"], approximate=True)
    assert ids_of(hits) == ids_of(ranked(some, query, 1))


def test_items_that_are_all_the_same_are_given_in_full(tmp_path):
    """A graph of equal vectors may lead to few of them; as many as are asked for are to come."""
    folder, one = tmp_path / "index", clustered(0, 1)
    Index.create(folder, Layout.for_vectors(D, R))
    with Index.open(folder).writer() as writer:
        writer.add([f"{i}" for i in range(2000)], np.repeat(one, 2000, axis=0))
        writer.build_ann(connectivity=2, expansion_add=1)
    with Index.open(folder) as index:
        assert len(index.search(one[0], 20, cascade=ONE, approximate=True)) == 20


def test_a_graph_that_leads_to_too_few_is_passed_over(filled, query, monkeypatch):
    folder, items = filled
    monkeypatch.setattr(ann_usearch.Graph, "search", lambda self, query, count: np.zeros(1, np.uint64))
    with Index.open(folder) as index:
        hits = index.search(query, K, cascade=ONE, approximate=True)
    assert ids_of(hits) == ids_of(ranked(items, query, 1))


def flip(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "flipped": flip,
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path, other: path.write_bytes(b""),
    "foreign": lambda path, other: path.write_bytes(other.read_bytes()),
    "missing": lambda path, other: path.unlink(),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_graph_that_is_not_the_one_that_was_written_is_refused_and_can_be_built_again(
    filled, query, harm, tmp_path, capsys
):
    folder, items = filled
    other = tmp_path / "other"
    Index.create(other, Layout.for_vectors(D, R))
    with Index.open(other).writer() as writer:
        writer.add([f"{i:04}" for i in range(N)], clustered(5, N))
        writer.build_ann()
    HARM[harm](graphs(folder)[0], graphs(other)[0])
    with Index.open(folder) as index:
        for _ in range(2):
            with pytest.raises(
                BundleError, match=f"{graphs(folder)[0] if graphs(folder) else 'ann-'}.*metaembed-index ann {folder}"
            ):
                index.search(query, K, cascade=ONE, approximate=True)
        assert ids_of(index.search(query, K, cascade=ONE)) == ids_of(ranked(items, query, 1))
        assert cli_index.main(["verify", str(folder)]) == 1
        assert f"metaembed-index ann {folder}" in capsys.readouterr().out
        assert cli_index.main(["ann", str(folder)]) == 0
        assert recall(index, items, clustered(2, 5)) >= 0.97
    assert cli_index.main(["verify", str(folder)]) == 0


def test_a_graph_that_usearch_refuses_is_one_sentence(filled, query):
    """What another version of usearch may write: the catalogue vouches for it, and it is no graph here."""
    folder, _ = filled
    graphs(folder)[0].write_bytes(b"another format, of which nothing is known here" * 9)
    with Index.open(folder).writer() as writer:
        file = index_ann._settle(graphs(folder)[0])
        record = index_ann.AnnRecord(graphs(folder)[0].name, file.bytes, file.sha256, N, (1, 2, 3))
        with writer._catalogue.writing():
            writer._catalogue.set_about(index_ann.KEY, record.to_json())
    with Index.open(folder) as index, pytest.raises(BundleError, match="usearch refuses.*metaembed-index ann"):
        index.search(query, K, cascade=ONE, approximate=True)


@pytest.mark.parametrize("text", ['{"name": "../ann-x.usearch"}', "[]", "{}", "no JSON"])
def test_a_record_that_is_not_understood_is_one_sentence(filled, query, text):
    folder, _ = filled
    with Index.open(folder).writer() as writer, writer._catalogue.writing():
        writer._catalogue.set_about(index_ann.KEY, text)
    with Index.open(folder) as index, pytest.raises(BundleError, match=f"metaembed-index ann {folder}"):
        index.search(query, K, cascade=ONE, approximate=True)
    assert build(folder) == N


def test_a_vector_that_is_damaged_stops_the_building(filled):
    folder, _ = filled
    path = sorted((folder / "segments").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 5 * D * 2] ^= 1
    path.write_bytes(content)
    before = graphs(folder)
    with pytest.raises(BundleError, match="row 5"):
        build(folder)
    assert graphs(folder) == before


@pytest.mark.parametrize("layout", [{"storage": "int8"}, {"screen": True}], ids=["int8", "screen"])
def test_it_goes_with_every_storage(tmp_path, layout):
    """int8 is as far from the vectors as its codes are: brute force over them has other neighbours at the edge."""
    folder, vectors = tmp_path / "index", clustered(0, N)
    Index.create(folder, Layout(D, (R,), **layout))
    with Index.open(folder).writer() as writer:
        writer.add([f"{i:04}" for i in range(N)], vectors)
        writer.build_ann()
    with Index.open(folder) as index:
        for query in clustered(2, 5):
            exact = index.search(query, K, cascade=ONE)
            hits = index.search(query, K, cascade=ONE, approximate=True)
            assert len(set(ids_of(hits)) & set(ids_of(exact))) >= 9
            assert {hit.id: hit.score for hit in hits}.items() & {hit.id: hit.score for hit in exact}.items()


def test_wrong_requests_are_refused(filled, query, tmp_path):
    folder, _ = filled
    with Index.open(folder) as index:
        for cascade in (None, [Stage(Budget(2, 1), 100), Stage(Budget(2, 2))], [Stage(Budget(1, 2))]):
            with pytest.raises(UsageError, match=r"an approximate first stage is 1,1, not .*1,1:1000 16,64"):
                index.search(query, K, cascade=cascade, approximate=True)
    with Index.open(folder, shard=(0, 2)) as index, pytest.raises(UsageError, match="not of a shard"):
        index.search(query, K, cascade=ONE, approximate=True)
    for wrong in (
        {"connectivity": 1},
        {"connectivity": 257},
        {"expansion_add": 0},
        {"connectivity": 32.5},
        {"connectivity": "x"},
    ):
        with pytest.raises(UsageError, match="whole numbers, 2 to 256"):
            build(folder, **wrong)
    Index.create(tmp_path / "empty", Layout.for_vectors(D, R))
    with pytest.raises(UsageError, match="holds no items"):
        build(tmp_path / "empty")
    with Index.open(folder).writer() as writer:
        writer.delete([f"{i:04}" for i in range(N)])
        with pytest.raises(UsageError, match="holds no items"):
            writer.build_ann()
    with (
        Index.open(tmp_path / "empty") as index,
        pytest.raises(UsageError, match="has no HNSW graph; metaembed-index ann"),
    ):
        index.search(query, K, cascade=ONE, approximate=True)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "usearch":
            raise ModuleNotFoundError("No module named 'usearch'")
sys.meta_path.insert(0, Block())
"""


def test_without_usearch_it_says_what_to_install_and_all_else_works(filled):
    folder, _ = filled
    code = f"""{BLOCK}
import numpy as np
from metaembed.runtime import Budget, Index
from metaembed.runtime.cascade import Stage
from metaembed.runtime.cli_index import main
from metaembed.runtime.errors import MetaEmbedError
assert main(["verify", {str(folder)!r}]) == 0 and main(["info", {str(folder)!r}]) == 0
with Index.open({str(folder)!r}) as index:
    for approximate in (False, True):
        try:
            print(len(index.search(np.ones((1, {D}), np.float32), 3, cascade=[Stage(Budget(1, 1))], approximate=approximate)))
        except MetaEmbedError as error:
            print(error)
sys.exit(main(["ann", {str(folder)!r}]))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    sentence = (
        "an approximate first stage needs usearch (No module named 'usearch'); pip install 'metaembed-export[ann]'"
    )
    assert result.stdout.splitlines()[-2:] == ["3", sentence]
    assert result.stderr == f"metaembed-index ann: {sentence}\n"
    assert result.returncode == 1


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background inherit as ignored
from metaembed.runtime.index_writer import IndexWriter
def track(work):
    for piece in work:
        yield piece
        print("piece", flush=True)
        time.sleep(0.3)
with IndexWriter(sys.argv[1]) as writer:
    writer.build_ann(track=track)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_killed_leaves_the_graph_that_was_there(filled, how):
    folder, items = filled
    before = graphs(folder)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "piece\n"
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode
    with Index.open(folder) as index:
        assert recall(index, items, clustered(2, 5)) >= 0.97
        with index.writer():
            assert graphs(folder) == before


@pytest.mark.parametrize("moment", ["write_graph", "_settle", "sync"])
def test_a_build_that_fails_at_any_moment_leaves_the_graph_that_was_there(filled, moment, monkeypatch):
    folder, items = filled
    before = graphs(folder)

    def fail(path, *args, **options):
        if moment != "sync" or path == folder:  # the folder's, after the file has its name
            raise OSError("no space")

    monkeypatch.setattr(ann_usearch if moment == "write_graph" else index_ann, moment, fail)
    with pytest.raises(OSError, match="no space"):
        build(folder)
    assert graphs(folder) == before
    with Index.open(folder) as index:
        assert recall(index, items, clustered(2, 5)) >= 0.97


def test_ctrl_c_within_usearch_is_an_interrupt(filled):
    """It reports one as an error of its own; the library's word is turned back."""

    keys, vectors = np.arange(60_000, dtype=np.uint64), clustered(0, 60_000, 1)[:, 0]
    folder, _ = filled
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ann_usearch.write_graph(folder / "x", D, [(keys, vectors)] * 20, connectivity=16, expansion_add=500)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_readers_turn_to_a_graph_that_another_process_built(filled, query):
    folder, items = filled
    with Index.open(folder) as index:
        index.search(query, K, cascade=ONE, approximate=True)
        first = graphs(folder)
        with index.writer() as writer:
            writer.add(["new"], query[None])
            writer.compact()
        items["new"] = query
        assert cli_index.main(["ann", str(folder), "--connectivity", "8", "--expansion-add", "64", "--quiet"]) == 0
        assert len(graphs(folder)) == 1
        assert graphs(folder) != first
        assert index.search(query, K, cascade=ONE, approximate=True)[0].id == "new"
        assert scored(index) == K
        assert index.ann.record().name == graphs(folder)[0].name
        assert recall(index, items, clustered(2, 10)) >= 0.95


def test_threads_share_it_while_a_graph_is_built(filled):
    folder, items = filled
    queries = clustered(2, 40)
    with Index.open(folder) as index, ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda q: index.search(q, K, cascade=ONE, approximate=True), list(queries) * 5)
        build(folder)
        for query, hits in zip(list(queries) * 5, found, strict=True):
            assert len(set(ids_of(hits)) & set(ids_of(ranked(items, query, 1)))) >= 8


def test_the_commands_say_what_there_is(filled, capsys):
    folder, items = filled
    with Index.open(folder).writer() as writer:
        writer.delete(list(items)[:2])
        writer.add(["new"], clustered(9, 1))
    capsys.readouterr()
    assert cli_index.main(["info", str(folder)]) == 0
    assert "HNSW graph of 2,998 items, 0.00" in capsys.readouterr().out
    assert cli_index.main(["ann", str(folder)]) == 0
    assert "HNSW graph of 2,999 items built" in capsys.readouterr().out
    assert cli_index.main(["ann", str(folder), "--connectivity", "1"]) == 2


def test_a_graph_that_is_replaced_while_it_is_opened_gives_way_to_the_new_one(filled, query, monkeypatch):
    folder, items = filled
    map_graph, replaced = index_ann.map_graph, []

    def map_late(folder, record):
        if not replaced:
            replaced.append(build(folder))
        return map_graph(folder, record)

    monkeypatch.setattr(index_ann, "map_graph", map_late)
    with Index.open(folder) as index:
        assert recall(index, items, clustered(2, 5)) >= 0.97
    assert replaced == [N]


CUT = """
import os, sys
import numpy as np
from metaembed.runtime.errors import BundleError
from metaembed.runtime.index import Index

folder, graph = sys.argv[1:]
with Index.open(folder) as index:
    index.ann.worth_walking = 1.0
    for size in (None, 4096):
        if size:
            os.truncate(graph, size)
        try:
            print(len(index.search(np.ones((1, 24), np.float32), 10, cascade=[(1, 1)], approximate=True)))
        except BundleError as error:
            print(error)
"""


def test_a_graph_that_is_cut_short_while_it_is_open_is_named(filled):
    """In a process of its own: reading beyond a file's end is a signal (SIGBUS)."""
    folder, _ = filled
    (graph,) = graphs(folder)
    ended = subprocess.run([sys.executable, "-c", CUT, str(folder), str(graph)], capture_output=True, text=True)
    assert ended.returncode == 0, f"ended by {ended.returncode}: {ended.stderr}"
    assert ended.stdout == f"10\n{graph} was cut short; metaembed-index ann {folder} builds one\n"
