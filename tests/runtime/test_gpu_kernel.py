"""The MaxSim kernel for GPUs. Here its own source runs on the CPU, lane by lane (emulate_cuda.h); ``pytest -m gpu`` runs it on a
GPU. What it should give is MaxSim in float64."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime import gpu_kernel
from metaembed.runtime.cuda import find_gpu
from metaembed.runtime.errors import UsageError
from metaembed.runtime.gpu_kernel import FEW, PTX, TYPES, VARIANTS, KernelScorer, kernel_name, open_kernel, shared_bytes
from metaembed.runtime.manifest import Bundle

SOURCE = Path(__file__).parents[2] / "runtime" / "_maxsim.cu"
COMPILER = shutil.which("g++") or shutil.which("c++")
STREAM = 7
NAMES = [kernel_name(dtype, variant) for dtype in TYPES.values() for variant in VARIANTS]


class EmulatedGpu:
    """Host memory by address, and the kernel compiled for the CPU."""

    name, capability = "emulated", (8, 0)

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.memory: dict[int, ctypes.Array] = {}
        self.launched: list[tuple[int, int, int]] = []

    def use(self):
        pass

    def allocate(self, size):
        block = (ctypes.c_ubyte * size)(*b"\xff" * min(size, 64))
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        del self.memory[address]

    allocate_host, free_host = allocate, free

    def copy_in(self, device, host, size, stream):
        ctypes.memmove(device, host, size)

    def copy_out(self, host, device, size, stream):
        ctypes.memmove(host, device, size)

    def create_stream(self):
        return STREAM

    def synchronise(self, stream):
        assert stream == STREAM

    destroy_stream = synchronise

    def load_module(self, ptx):
        assert ptx.startswith(b"//")
        return 1

    def unload_module(self, module):
        assert module == 1

    def find_kernel(self, module, name, shared_bytes):
        return getattr(self.library, f"emulated_{name}")

    def run_kernel(self, kernel, grid, threads, shared_bytes, stream, *arguments):
        assert (threads, stream) == (128, STREAM)
        self.launched.append((*grid, shared_bytes))
        kernel(ctypes.c_int(grid[0]), ctypes.c_int(grid[1]), *arguments)
        assert ctypes.c_int.in_dll(self.library, "stray_reads").value == 0, "it read beyond the candidates"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text(
        f'#include "{Path(__file__).with_name("emulate_cuda.h")}"\n#include "{SOURCE}"\n'
        + "\n".join(f"EMULATE(emulated_{name}, {name})" for name in NAMES)
    )
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "kernel.cpp", "-o", "kernel.so"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder / "kernel.so"


@pytest.fixture
def gpu(library: Path) -> EmulatedGpu:
    return EmulatedGpu(library)


def draw(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(TYPES[kind])


def judge(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    (count, r_q, dim), (items, r_c, _) = queries.shape, candidates.shape
    flat = (values.astype(np.float64).reshape(-1, dim) for values in (queries, candidates))
    products = np.matmul(next(flat), next(flat).T).reshape(count, r_q, items, r_c)
    return products.max(-1).sum(1)


SHAPES = [  # queries, r_q, items, r_c: every way in which vectors share a warp, and ends that are not full
    (1, 1, 70, 1),
    (2, 2, 37, 2),
    (1, 4, 21, 4),
    (1, 16, 9, 8),
    (1, 8, 5, 16),
    (1, 16, 3, 32),
    (1, 16, 3, 64),
    (1, 3, 11, 3),
    (2, 5, 3, 12),
    (1, 16, 3, 24),
    (1, 7, 2, 41),
    (1, 21, 9, 8),
    (17, 1, 40, 1),  # queries that share a tile, and a tile that is not full
    (9, 2, 5, 24),
    (5, 3, 21, 4),
    (3, 8, 9, 8),
    (2, 21, 3, 41),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_kernel_gives_maxsim(gpu: EmulatedGpu, shape: tuple[int, int, int, int], kind: str):
    count, r_q, items, r_c = shape
    queries, candidates = draw((count, r_q, 64), kind), draw((items, r_c, 64), kind, seed=1)
    if items > 2:  # all products negative: what fills a tile must not win
        candidates[1] = -np.abs(candidates[1])
        queries[0] = np.abs(queries[0])
    with KernelScorer(gpu, TYPES[kind]) as scorer:
        placed = scorer.place(candidates.__getitem__, candidates.shape)
        for given in (placed, candidates):
            np.testing.assert_allclose(scorer.scores(queries, given), judge(queries, candidates), atol=1e-6 * r_q)
        placed.free()
    assert gpu.memory == {}


@pytest.mark.parametrize("long", [300, 400], ids=["four lines", "three lines"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_vectors_stream_through_shared_memory(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch, count: int, long: int):
    """Six lines, the last half full, twice and once: more than are ever under way."""
    monkeypatch.setattr(gpu_kernel, "LONG", long)
    with KernelScorer(gpu, TYPES["bf16"]) as scorer:
        for r_c in (41, 6):
            queries, candidates = draw((count, 16, 352), "bf16"), draw((9, r_c, 352), "bf16", seed=1)
            np.testing.assert_allclose(scorer.scores(queries, candidates), judge(queries, candidates), atol=2e-5)


def test_several_blocks_pieces_and_queries_each_write_their_own_scores(
    gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
):
    queries, candidates = draw((5, 2, 32), "bf16"), draw((300, 1, 32), "bf16", seed=1)
    monkeypatch.setattr(gpu_kernel, "QUERIES", 3)
    monkeypatch.setattr(gpu_kernel, "MEMORY_BYTES", 290 * 64)
    with KernelScorer(gpu, TYPES["bf16"]) as scorer:
        placed = scorer.place(candidates.__getitem__, candidates.shape)
        assert [piece.shape[0] for piece in placed.pieces] == [290, 10]
        for given, options in ((placed, {}), (candidates, {"memory_bytes": 270 * 64})):
            got = scorer.scores(queries, given, **options)
            np.testing.assert_allclose(got, judge(queries, candidates), atol=1e-6)
        placed.free()
    assert gpu.launched[:2] == [(1, 3, shared_bytes(FEW)), (1, 1, shared_bytes(FEW))]  # 128 vectors a block


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden_by_a_larger_product(gpu: EmulatedGpu, bad: float):
    queries, candidates = draw((1, 4, 32), "bf16"), draw((3, 8, 32), "bf16", seed=1)
    candidates[1, 3, 5] = bad
    with KernelScorer(gpu, TYPES["bf16"]) as scorer:
        got = scorer.scores(queries, candidates)
    assert np.isfinite(got[0]).tolist() == [True, False, True]


def test_nothing_to_score_is_no_launch_and_wrong_shapes_are_one_sentence(gpu: EmulatedGpu):
    with KernelScorer(gpu, TYPES["bf16"]) as scorer:
        assert scorer.scores(draw((0, 4, 32), "bf16"), draw((3, 8, 32), "bf16")).shape == (0, 3)
        assert scorer.scores(draw((2, 4, 32), "bf16"), np.zeros((0, 8, 32), TYPES["bf16"])).shape == (2, 0)
        for dim, dims in ((32, 64), (40, 40)):
            with pytest.raises(UsageError, match="a multiple of 32"):
                scorer.scores(draw((1, 4, dim), "bf16"), draw((3, 8, dims), "bf16"))
        with pytest.raises(UsageError, match="a candidate takes 512 bytes; 100 are allowed"):
            scorer.scores(draw((1, 4, 32), "bf16"), draw((3, 8, 32), "bf16"), memory_bytes=100)
    assert gpu.launched == []


def test_the_ptx_is_of_this_source():
    """The first line of the PTX names the source that it was compiled from."""
    import hashlib

    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert PTX.read_text().splitlines()[0] == f"// _maxsim.cu {digest}", "compile it again: see CONTRIBUTING.md"
    assert all(f".entry {name}(" in PTX.read_text() for name in NAMES)


def test_float32_bundles_are_not_for_the_kernel(demo_bundle: Path):
    assert open_kernel(Bundle.open(demo_bundle, verify=False)) is None


def test_an_installation_without_the_ptx_scores_by_the_graph(narrow_demo, monkeypatch: pytest.MonkeyPatch, caplog):
    """A device kit's wheel lacked the PTX, and metaembed-check ended there on every GPU from 8.0 on."""

    class Gpu:
        name, capability = "a GPU", (8, 7)

        def use(self):
            pass

        def load_module(self, ptx):
            raise AssertionError("there is nothing to load")

    monkeypatch.setattr(gpu_kernel, "find_gpu", Gpu)
    monkeypatch.setattr(gpu_kernel, "PTX", Path("lacking.ptx"))
    bundle = Bundle.open(narrow_demo("bf16"), verify=False)
    with caplog.at_level(logging.WARNING, "metaembed"):
        assert open_kernel(bundle) is None
    assert "does not start on a GPU" in caplog.text
    assert "lacking.ptx" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None or find_gpu().capability < (8, 0), reason="needs an NVIDIA GPU from 8.0 on")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dim", [128, 2048, 3584, 5120])
def test_on_a_gpu_the_kernel_gives_maxsim(kind: str, dim: int):
    """The tolerance for bf16 storage, 2e-6 a query vector, against float64."""
    with KernelScorer(find_gpu(), TYPES[kind]) as scorer:
        for count, r_q, items, r_c in [*SHAPES, (33, 16, 500, 16), (1, 16, 300, 64), (1, 1, 20_000, 1)]:
            queries, candidates = draw((count, r_q, dim), kind), draw((items, r_c, dim), kind, seed=1)
            got, expected = scorer.scores(queries, candidates), judge(queries, candidates)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * r_q)
