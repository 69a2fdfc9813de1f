"""Stages that scan on a GPU, the rest on the CPU: against the same search on the CPU alone, on the stand-in GPU.

The stand-in (fake_tensorrt.py) computes with ONNX Runtime on the same float32 scorer graph and queries are not rounded, so
ids are the same and scores agree to float32's sums. What a real GPU's memory or speed is, nothing here says.
"""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest

from metaembed.export.profiles import scorer_engine
from metaembed.export.scorer import write_scorer
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.cuda import find_gpu
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.graph_maxsim import Scorer
from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.manifest import SCORER, Bundle
from metaembed.runtime.providers import CUDA
from metaembed.runtime.session_ort import OrtSession, available_providers
from metaembed.runtime.session_trt import SharedStream, TrtSession, installed_flavours

spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)

R_Q, R_C, D, CHUNK = 4, 8, 24, 64  # an engine that takes 64 candidates at once: segments go through in pieces
CASCADE = [Stage(Budget(1, 1), 120), Stage(Budget(2, 4), 40), Stage(Budget(4, 8))]


class Device:
    """A scorer on the stand-in, and what it was asked."""

    def __init__(self, folder):
        write_scorer(folder, D, precision="fp32")
        engine = scorer_engine(D, R_Q, queries=32, chunks={R_C: CHUNK})
        self.gpu = fake.FakeGpu()
        self.runs = []
        engines = [fake.FakeEngine(self.gpu, folder / SCORER, engine.profiles)]
        session = TrtSession(engines, gpu=self.gpu, stream=SharedStream(self.gpu), label="fake")
        run = session.run
        session.run = lambda feeds: self.runs.append(feeds["candidates"].shape) or run(feeds)
        self.scorer = Scorer(session)


@pytest.fixture
def device(tmp_path):
    device = Device(tmp_path)
    yield device
    device.scorer.close()
    assert device.gpu.memory == {}, "everything placed was freed with the index"


@pytest.fixture
def vectors():
    values = np.random.default_rng(0).standard_normal((300, R_C, D))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def query():
    values = np.random.default_rng(1).standard_normal((R_Q, D))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=["bf16", "int8"])
def folder(tmp_path, vectors, request):
    """Three segments of 100, 1 and 199 items, two of which are deleted."""
    folder = tmp_path / "index"
    Index.create(folder, Layout.for_vectors(D, R_C, request.param))
    with Index.open(folder).writer() as writer:
        for start, end in [(0, 100), (100, 101), (101, 300)]:
            writer.add([f"item{i:03}" for i in range(start, end)], vectors[start:end])
        writer.delete(["item007", "item250"])
    return folder


def search(index, query, cascade=CASCADE, **options):
    return index.search(query, 20, cascade=cascade, **options)


def assert_same(mine, wanted):
    assert [hit.id for hit in mine] == [hit.id for hit in wanted]
    np.testing.assert_allclose([hit.score for hit in mine], [hit.score for hit in wanted], atol=1e-5)


@pytest.mark.parametrize("held", [1, 3, 4, 8])
def test_a_search_finds_the_same_wherever_a_stage_runs(folder, device, query, held):
    """One, three (no group ends there), four or all vectors on the GPU; the last as a stage of its own over everything."""
    cascade = [Stage(Budget(2, held), 100), Stage(Budget(4, 8))] if held < R_C else [Stage(Budget(4, 8))]
    with Index.open(folder) as plain:
        wanted = search(plain, query, cascade)
    with Index.open(folder) as index:
        assert index.place(device.scorer, held) == 300 * held * D * 4  # float32: this scorer's type
        assert_same(search(index, query, cascade), wanted)
        # By hand: 100 items in two runs of at most 64, 1 in one, 199 in four.
        assert device.runs == [(count, held, D) for count in (64, 36, 1, 64, 64, 64, 7)]


def test_candidates_are_copied_once_and_queries_each_time(folder, device, query):
    with Index.open(folder) as index:
        index.place(device.scorer, 1)
        before = device.gpu.calls.count("copy_in")
        for _ in range(3):
            search(index, query)
        assert device.gpu.calls.count("copy_in") - before == 3 * 7  # a query for each of seven pieces


def test_a_large_segment_comes_back_from_the_gpu_in_ranges(folder, device, query, monkeypatch):
    """By hand: ranges of at least 70 items, whole pieces of 64. 100 items are one, as 1 is; 199 are 128 and 71."""
    scores = device.scorer.scores
    ranges = []
    monkeypatch.setattr(device.scorer, "scores", lambda q, placed: ranges.append(placed.shape[0]) or scores(q, placed))
    monkeypatch.setattr("metaembed.runtime.index_scan.CHUNK_ITEMS", 70)
    with Index.open(folder) as plain, Index.open(folder) as index:
        index.place(device.scorer, 1)
        assert_same(search(index, query), search(plain, query))
    assert ranges == [100, 1, 128, 71]
    assert device.runs == [(count, 1, D) for count in (64, 36, 1, 64, 64, 64, 7)]


def test_later_stages_and_filters_that_leave_few_stay_on_the_cpu(folder, device, query):
    with Index.open(folder) as plain, Index.open(folder) as index:
        index.place(device.scorer, 8)
        assert_same(search(index, query), search(plain, query))
        assert device.runs == []  # (4,8) came last, over 40 survivors


def test_what_was_added_and_compacted_since_is_scored_and_freed(folder, device, query, vectors):
    with Index.open(folder) as index, Index.open(folder) as plain:
        taken = index.place(device.scorer, 1)
        with plain.writer() as writer:
            writer.add(["better"], np.tile(query, (2, 1))[None])  # each query vector finds itself
            writer.delete([f"item{i:03}" for i in range(100)])
        assert search(index, query)[0].id == "better"
        assert_same(search(index, query), search(plain, query))
        with plain.writer() as writer:
            writer.compact()
        assert_same(search(index, query), search(plain, query))
        assert index.device.nbytes == (300 - 100 - 1 + 1) * D * 4 < taken  # item007 was among the first hundred


def test_every_thread_that_frees_or_reads_makes_the_gpu_its_own_first(folder, device, query, monkeypatch):
    """CUDA's context belongs to a thread: without it, freeing fails with error 201 and the memory is lost."""
    current = threading.local()
    monkeypatch.setattr(device.gpu, "use", lambda: setattr(current, "here", True))
    for name in ("free", "free_host", "allocate", "copy_in", "copy_out"):
        real = getattr(device.gpu, name)

        def checked(*args, real=real):
            assert getattr(current, "here", False), "invalid device context (error 201)"
            return real(*args)

        monkeypatch.setattr(device.gpu, name, checked)
    problems = []

    def elsewhere(work):
        def run():
            try:
                work()
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    index = Index.open(folder)
    index.place(device.scorer, 1)
    with Index.open(folder).writer() as writer:
        writer.compact()
    elsewhere(lambda: search(index, query))
    elsewhere(index.close)
    assert not problems


def test_placing_again_and_closing_give_the_memory_back(folder, device):
    with Index.open(folder) as index:
        index.place(device.scorer, 8)
        assert index.place(device.scorer, 1) == index.device.nbytes == 300 * D * 4


def test_a_gpu_that_is_too_small_keeps_nothing(folder, device, query, monkeypatch):
    room = [4]

    def allocate(size):
        room[0] -= 1
        if room[0] < 0:
            raise MetaEmbedError("the GPU has no memory left")
        return type(device.gpu).allocate(device.gpu, size)

    monkeypatch.setattr(device.gpu, "allocate", allocate)
    with Index.open(folder) as index:
        with pytest.raises(MetaEmbedError, match="no memory left"):
            index.place(device.scorer, 1)
        assert index.device is None
        assert len(search(index, query)) == 20
        assert not device.runs


def test_what_cannot_be_placed_is_refused(folder, device, tmp_path):
    with Index.open(folder) as index:
        for vectors in (0, 9):
            with pytest.raises(UsageError, match="this index stores 8"):
                index.place(device.scorer, vectors)
        with Scorer(OrtSession(tmp_path / SCORER)) as scorer, pytest.raises(UsageError, match="host memory"):
            index.place(scorer, 1)
        assert index.device is None


def test_damage_is_found_before_it_reaches_the_gpu(folder, device, query):
    path = max((folder / "segments").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + 5] ^= 1  # the first vector of that segment's first item
    path.write_bytes(content)
    with Index.open(folder) as index, pytest.raises(BundleError, match="damaged in row 0"):
        index.place(device.scorer, 1)
    with Index.open(folder, skip_damaged=True) as index:
        index.place(device.scorer, 1)
        with Index.open(folder, skip_damaged=True) as plain:
            assert_same(search(index, query), search(plain, query))


def test_a_filter_that_leaves_most_is_scanned_on_the_gpu(tmp_path, device, query, vectors):
    folder = tmp_path / "years"
    Index.create(folder, Layout.for_vectors(D, R_C))
    with Index.open(folder).writer() as writer:
        writer.add([f"item{i:03}" for i in range(300)], vectors, payloads=[{"year": 2000 + i % 10} for i in range(300)])
    with Index.open(folder) as index, Index.open(folder) as plain:
        index.place(device.scorer, 1)
        wanted = search(plain, query, where=["year>=2001"])
        assert_same(search(index, query, where=["year>=2001"]), wanted)
        assert len(device.runs) == 5


def test_small_candidates_go_through_in_larger_pieces_than_large_ones(tmp_path):
    """A profile for each size: what one run takes is that size's chunk, not the largest candidates'."""
    write_scorer(tmp_path, D, precision="fp32")
    gpu, spec = fake.FakeGpu(), scorer_engine(D, R_Q, queries=32, chunks={1: 200, R_C: 50})
    engine = fake.FakeEngine(gpu, tmp_path / SCORER, spec.profiles)
    rng = np.random.default_rng(1)
    with Scorer(TrtSession([engine], gpu=gpu, stream=SharedStream(gpu), label="fake")) as scorer:
        for r_c, pieces in ((1, [200, 130]), (3, [50] * 6 + [30]), (R_C, [50] * 6 + [30])):
            values = rng.standard_normal((330, r_c, D)).astype(np.float32)
            queries = rng.standard_normal((2, R_Q, D)).astype(np.float32)
            placed = scorer.place(values.__getitem__, values.shape)
            assert [piece.shape[0] for piece in placed.pieces] == pieces
            expected = np.einsum("qrd,nsd->qnrs", queries.astype(float), values.astype(float)).max(-1).sum(-1)
            np.testing.assert_allclose(scorer.scores(queries, placed), expected, atol=1e-4)
            np.testing.assert_allclose(scorer.scores(queries, values), expected, atol=1e-4)
            placed.free()
    assert gpu.memory == {}


@pytest.mark.gpu
@pytest.mark.skipif(
    find_gpu() is None or not (installed_flavours() or CUDA in available_providers()),
    reason="needs an NVIDIA GPU, and TensorRT or onnxruntime-gpu",
)
def test_a_real_gpu_finds_what_the_cpu_finds(tmp_path):
    """The demo's scorer graph, in float32, over 10,000 random items: the same twenty."""
    from metaembed.export.cli import main as export
    from metaembed.export.cli_build import main as build

    bundle, folder = tmp_path / "bundle", tmp_path / "index"
    assert export(["--model", "demo", "--budget", "all", "--no-parity", "-o", str(bundle), "--quiet"]) == 0
    if installed_flavours():
        assert build([str(bundle), "--quiet"]) == 0
    rng = np.random.default_rng(0)
    Index.create(folder, Layout.for_vectors(128, 16))
    with Index.open(folder).writer() as writer:
        writer.add([f"{i:05}" for i in range(10_000)], rng.standard_normal((10_000, 16, 128)).astype(np.float32))
    query = rng.standard_normal((4, 128)).astype(np.float32)
    cascade = [Stage(Budget(1, 1), 200), Stage(Budget(4, 16))]
    with Scorer.open(Bundle.open(bundle)) as scorer, Index.open(folder) as index, Index.open(folder) as plain:
        index.place(scorer, 1)
        assert_same(search(index, query, cascade), search(plain, query, cascade))
