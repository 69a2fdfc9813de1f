"""What indexing merges by itself: bounds by the geometric rule, counted by hand on the files; answers by float64 brute force."""

import math
import random

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime import cli_index
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_layout import Layout

R, D = 3, 5
ONE = [Stage.parse("1,1")]
ITEM_BYTES = R * D * 2  # bf16
FILE_BYTES = 1024  # of a header, more than this layout's


@pytest.fixture
def folder(tmp_path):
    Index.create(tmp_path / "index", Layout(D, (1, R)))
    return tmp_path / "index"


def vectors(rng, count):
    return rng.standard_normal((count, R, D)).astype(np.float32)


def best(items, query, k):
    """Ids by float64 MaxSim over what bf16 keeps of every item; ties by id."""
    scores = {
        id_: (query.astype(np.float64) @ values.astype(ml_dtypes.bfloat16).astype(np.float64).T).max(-1).sum()
        for id_, values in items.items()
    }
    return sorted(items, key=lambda id_: (-scores[id_], id_))[:k]


def found(index, query, k):
    return [hit.id for hit in index.search(query, k, cascade=[Stage.parse(f"2,{R}")])]


def sizes(folder):
    """Bytes by name of every segment's file."""
    return {path.name: path.stat().st_size for path in (folder / SEGMENTS).iterdir()}


def living(folder):
    with Index.open(folder) as index:
        return [(len(part.alive), int(part.alive.sum())) for part in index.snapshot().parts]


def tidied(folder, change):
    """Change an index in a writer of its own; returns the bytes that tidying it then wrote."""
    with Index.open(folder).writer() as writer:
        change(writer)
        before = sizes(folder)
        writer.tidy()
    return sum(size for name, size in sizes(folder).items() if name not in before)


def test_items_that_come_one_by_one_are_rewritten_log_n_times_at_most_and_leave_log_n_segments(folder):
    """An item's segment at least doubles whenever it is rewritten, so n log2 n items are in all; merging all each time
    would write n n / 2, and never merging leave n segments.
    """
    n, rng, items, written, merges = 300, np.random.default_rng(0), {}, 0, 0
    for i in range(n):
        items[f"{i:03}"] = vectors(rng, 1)[0]
        bytes_ = tidied(folder, lambda writer, i=i: writer.add([f"{i:03}"], items[f"{i:03}"][None]))
        written, merges = written + bytes_, merges + bool(bytes_)
        assert len(sizes(folder)) <= math.log2(i + 1) + 1
        if i % 37 == 0:
            query = vectors(rng, 1)[0, :2]
            with Index.open(folder) as index:
                assert found(index, query, i + 1) == best(items, query, i + 1)
    crcs = 2 * 4  # a CRC-32 for each of two groups
    assert 0 < written <= n * math.log2(n) * (ITEM_BYTES + crcs) + merges * FILE_BYTES
    with Index.open(folder) as index:
        assert index.verify() == []
        assert sum(alive for _, alive in living(folder)) == len(index) == n


@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes_and_goes_the_cost_and_the_segments_stay_in_proportion(folder, seed):
    """Additions of 1 to 30 items, updates and deletions by chance, in a writer each, and a limit of 64 items a segment.

    A deletion makes a segment of l items smaller, which allows another 1 / l of a doubling to each of them: 1.45 items'
    rewriting in all, and one more where half a segment is dead.
    """
    rng, chance, items, added, deleted, written = np.random.default_rng(seed), random.Random(seed), {}, 0, 0, 0
    limit = 64 if seed % 2 else 1 << 30
    for step in range(80):
        count = chance.choice([1, 1, 3, 30])
        new = [f"{step:02}-{i}" for i in range(count)]
        changed = chance.sample(sorted(items), min(len(items), chance.choice([0, 0, 2])))
        gone = chance.sample(sorted(items.keys() - set(changed)), min(len(items) // 4, chance.choice([0, 1, 12])))
        fresh = dict(zip(new + changed, vectors(rng, count + len(changed)), strict=True))
        with Index.open(folder).writer() as writer:
            writer.add(list(fresh), np.stack(list(fresh.values())), replace=True)
            writer.delete(gone)
            before = sizes(folder)
            writer.tidy(limit * ITEM_BYTES)
        items = {id_: value for id_, value in (items | fresh).items() if id_ not in gone}
        added, deleted = added + len(fresh), deleted + len(gone) + len(changed)
        with Index.open(folder) as index:
            parts = index.snapshot().parts
            written += sum(len(part.alive) for part in parts if part.segment.path.name not in before)
            query = vectors(rng, 1)[0, :2]
            assert found(index, query, 20) == best(items, query, 20)
        assert len(parts) <= math.log2(len(items)) + 1 + 4 * len(items) / limit
        assert all(stored < 2 * alive for stored, alive in living(folder))
        assert all(stored <= limit for stored, _ in living(folder))
    assert 0 < written <= added * math.log2(added) + 2.45 * deleted


@pytest.mark.parametrize(
    ("counts", "gone", "left"),
    [
        ([8, 4, 2, 1, 1], 0, [16]),
        ([8, 4, 2, 1], 0, [8, 4, 2, 1]),
        ([8, 3, 3], 0, [8, 6]),
        ([9, 1, 7], 0, [9, 1, 7]),
        ([6, 1, 5], 0, [12]),  # 5 is more than 1, but 6 is no more than both
        ([16, 2], 7, [16, 2]),
        ([16, 2], 8, [2, 8]),  # half of it is dead: rewritten alone
        ([16, 2], 14, [4]),  # as small as the other by then
        ([16, 2], 16, [2]),
    ],
)
def test_what_is_merged(folder, counts, gone, left):
    """Items of each segment, by hand; deleted ones count where they lie, not where they are merged."""
    rng = np.random.default_rng(1)
    with Index.open(folder).writer() as writer:
        for number, count in enumerate(counts):
            writer.add([f"{number}-{i:02}" for i in range(count)], vectors(rng, count))
        writer.delete([f"0-{i:02}" for i in range(gone)])
        writer.tidy()
    assert [stored for stored, _ in living(folder)] == left


def test_a_segment_that_is_full_is_left_alone(folder):
    rng = np.random.default_rng(2)
    with Index.open(folder).writer() as writer:
        for number, count in enumerate([6, 6, 6, 2, 2]):
            writer.add([f"{number}-{i}" for i in range(count)], vectors(rng, count))
        writer.tidy(10 * ITEM_BYTES)
        assert sorted(stored for stored, _ in living(folder)) == [4, 6, 6, 6]
        writer.tidy(10 * ITEM_BYTES)  # 4 and 6 fit, but 6 is more than 4
        assert sorted(stored for stored, _ in living(folder)) == [4, 6, 6, 6]
        assert writer.compact(10 * ITEM_BYTES) == 2
    assert sorted(stored for stored, _ in living(folder)) == [6, 6, 10]


def test_a_graph_outlasts_small_additions(folder):
    """Until they are as many as what it holds; what was added is found beside it."""
    pytest.importorskip("usearch")
    rng, n = np.random.default_rng(3), 64
    with Index.open(folder).writer() as writer:
        writer.add([f"old{i}" for i in range(n)], vectors(rng, n))
        writer.build_ann()
    for i in range(n):
        new = vectors(rng, 1)
        with Index.open(folder) as index:
            tidied(folder, lambda writer, i=i, new=new: writer.add([f"new{i}"], new))
            record = index.ann.record()
            assert record is not None
            held = sum(int(part.alive.sum()) for part in index.snapshot().parts if part.number in record.segments)
            assert held == (n if i < n - 1 else 0)
            index.ann.worth_walking = 1
            exact, near = (index.search(new[0], 10, cascade=ONE, approximate=walk) for walk in (False, True))
            assert [hit.id for hit in near] == [hit.id for hit in exact]


def test_a_resumed_run_leaves_the_large_segment_and_its_graph(demo_bundle, tmp_path, capsys):
    """The finding: one more item rewrote up to 1 GiB and emptied the graph."""
    pytest.importorskip("usearch")
    lines, folder = tmp_path / "lines.jsonl", tmp_path / "index"
    command = [str(demo_bundle), "--data", str(lines), "-o", str(folder), "--budget", "4", "--quiet", "--resume"]
    lines.write_text("\n".join(f'{{"id": {i}, "text": "number {i}"}}' for i in range(128)))
    assert cli_index.main(command) == 0
    assert len(sizes(folder)) == 1  # two batches
    (large,) = sizes(folder)
    assert cli_index.main(["ann", str(folder), "--quiet"]) == 0
    lines.write_text('{"id": "one more", "text": "another"}')
    assert cli_index.main(command) == 0
    assert large in sizes(folder)
    assert len(sizes(folder)) == 2
    capsys.readouterr()
    assert cli_index.main(["info", str(folder)]) == 0
    assert "HNSW graph of 128 items" in capsys.readouterr().out


def test_damage_stops_only_the_merges_that_would_read_it(folder):
    rng = np.random.default_rng(4)
    with Index.open(folder).writer() as writer:
        writer.add([f"a{i}" for i in range(9)], vectors(rng, 9))
        (large,) = sizes(folder)
        (folder / SEGMENTS / large).write_bytes(b"damaged")
        writer.add(["b"], vectors(rng, 1))
        writer.add(["c"], vectors(rng, 1))
        assert writer.tidy() == 2
        writer.add([f"d{i}" for i in range(7)], vectors(rng, 7))
        before = sizes(folder)
        with pytest.raises(BundleError, match=large):
            writer.tidy()
    assert sizes(folder) == before
