"""Buffers of ONNX Runtime's sessions on a GPU. Here the device is the CPU: ONNX Runtime and its bindings are real, and only
the GPU's memory is the host's. ``pytest -m gpu tests/runtime/test_providers.py`` is the same on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from metaembed.runtime import open_sessions as open_sessions_module
from metaembed.runtime import session_ort_gpu
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.graph_maxsim import Scorer
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle
from metaembed.runtime.session import DeviceSession
from metaembed.runtime.session_ort_gpu import KeptOutput, OrtGpuSession


class HostGpu:
    """Host memory by address, each copy counted; memory that was freed is filled, so that a late reader shows."""

    def __init__(self):
        self.memory: dict[int, ctypes.Array] = {}
        self.copied_in = self.copied_out = 0

    def use(self):
        pass

    def allocate(self, size):
        block = (ctypes.c_ubyte * size)()
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        block = self.memory.pop(address)
        ctypes.memset(address, 0xFF, len(block))

    allocate_host, free_host = allocate, free

    def copy_in(self, device, host, size, stream):
        self.copied_in += size
        ctypes.memmove(device, host, size)

    def copy_out(self, host, device, size, stream):
        self.copied_out += size
        ctypes.memmove(host, device, size)

    def synchronise(self, stream):
        pass


@pytest.fixture
def gpu() -> HostGpu:
    return HostGpu()


def on_device(path: Path, gpu: HostGpu, **options) -> OrtGpuSession:
    return OrtGpuSession(path, gpu=gpu, device="cpu", **options)


def test_image_embeddings_go_from_graph_to_graph_without_a_copy(demo_bundle: Path, gpu: HostGpu):
    bundle = Bundle.open(demo_bundle, verify=False)
    images = [Image.new("RGB", size, "teal") for size in ((56, 84), (140, 28), (28, 28))]
    with Encoder.open(demo_bundle, verify=False) as plain:
        expected = plain.encode_candidates(["a", None, "b c"], images=images), plain.encode_queries(["x y"])
    vision = on_device(bundle.path(VISION), gpu, keep_on_device=True)
    with Encoder(bundle, vision, on_device(bundle.path(LANGUAGE), gpu)) as encoder:
        got = encoder.encode_candidates(["a", None, "b c"], images=images), encoder.encode_queries(["x y"])
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (gpu.copied_in, gpu.copied_out) == (0, 0)


def test_placed_candidates_are_scored_where_they_lie_and_freed(demo_bundle: Path, gpu: HostGpu):
    rng = np.random.default_rng(0)
    queries, values = (rng.standard_normal(shape, np.float32) for shape in ((2, 4, 128), (300, 16, 128)))
    expected = np.einsum("qrd,nsd->qnrs", queries.astype(float), values.astype(float)).max(-1).sum(-1)
    session = on_device(Bundle.open(demo_bundle, verify=False).path(SCORER), gpu)
    assert isinstance(session, DeviceSession)
    with Scorer(session) as scorer:
        placed = scorer.place(values.__getitem__, values.shape)
        assert gpu.copied_in == values.nbytes == sum(map(len, gpu.memory.values()))
        for _ in range(2):
            np.testing.assert_allclose(scorer.scores(queries, placed), expected, atol=1e-4)
        assert gpu.copied_in == values.nbytes
        placed.free()
    assert gpu.memory == {}


def test_what_repeats_in_shape_runs_from_and_to_the_same_places(demo_bundle: Path, gpu: HostGpu):
    """What a CUDA graph needs; that it is one, and faster, ``pytest -m gpu tests/runtime/test_providers.py`` and the bench show."""
    bundle = Bundle.open(demo_bundle, verify=False)
    texts = ["one", "other", "third", "words of another length", "fourth", "fifth"]
    language = on_device(bundle.path(LANGUAGE), gpu, cuda_graphs=True)
    vision = on_device(bundle.path(VISION), gpu, keep_on_device=True)
    with Encoder.open(demo_bundle, verify=False) as plain, Encoder(bundle, vision, language, pad_to=16) as encoder:
        expected = [plain.encode_queries([text]) for text in texts]
        got = [encoder.encode_queries([text]) for text in texts]
        for mine, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, other, atol=2e-6)
        image = Image.new("RGB", (56, 56), "teal")
        for _ in range(3):  # embeddings that lie on the GPU: as usual
            held = len(gpu.memory)
            np.testing.assert_array_equal(
                encoder.encode_candidates(images=[image]), plain.encode_candidates(images=[image])
            )
            assert len(gpu.memory) == held
        assert gpu.memory
    assert gpu.memory == {}


def test_only_so_many_shapes_are_recorded(bf16_identity: Path, gpu: HostGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session_ort_gpu, "MOST_RECORDED", 2)
    session = on_device(bf16_identity, gpu, cuda_graphs=True)
    buffers = []
    for rows in (1, 2, 3):
        for value in (1, 2, 3):
            given = np.full((rows, 3), value, ml_dtypes.bfloat16)
            np.testing.assert_array_equal(session.run({"x": given})["y"].astype(float), given.astype(float))
        buffers.append(len(gpu.memory))
    assert buffers == [4, 8, 8]  # an input and an output, on either side
    with pytest.raises(UsageError, match="float32"):
        session.run({"x": np.ones((1, 3), np.float32)})
    session.close()
    assert gpu.memory == {}
    with pytest.raises(UsageError, match="closed"):
        session.run({"x": given})


def test_cuda_graphs_without_a_gpu_are_refused(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_sessions_module, "find_gpu", lambda: None)
    with pytest.raises(UsageError, match="CUDA graphs record what runs on an NVIDIA GPU; here it is ONNX Runtime"):
        Encoder.open(demo_bundle, verify=False, cuda_graphs=True)


@pytest.mark.parametrize("rows", [2, 0])
def test_bf16_stays_on_the_device_bit_by_bit(bf16_identity: Path, gpu: HostGpu, rows: int):
    values = np.array([[1.0078125, -0.0, 3e38], [1e-40, 0.1, -2]], np.float32).astype(ml_dtypes.bfloat16)[:rows]
    first, second = (on_device(bf16_identity, gpu, keep_on_device=keep) for keep in (True, False))
    placed = first.place(values)
    kept = first.run({"x": placed})["y"]
    assert isinstance(kept, KeptOutput)
    assert (kept.shape, kept.dtype) == (values.shape, values.dtype)
    for got in (np.asarray(kept), second.run({"x": kept})["y"]):
        assert got.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got.view(np.uint16), values.view(np.uint16))
    assert np.asarray(kept, np.float32).dtype == np.float32


def test_what_is_wrong_with_a_feed_is_said_before_the_device_reads_it(bf16_identity: Path, gpu: HostGpu):
    session = on_device(bf16_identity, gpu)
    with pytest.raises(UsageError, match="x has type float32, and the graph takes bfloat16"):
        session.run({"x": session.place(np.zeros((2, 3), np.float32))})
    freed = session.place(np.zeros((2, 3), ml_dtypes.bfloat16))
    freed.free()
    with pytest.raises(MetaEmbedError, match="this array is gone"):
        session.run({"x": freed})
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.place(np.zeros((2, 3), ml_dtypes.bfloat16))
