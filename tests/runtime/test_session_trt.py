"""The TensorRT session's buffer logic on a stand-in GPU (fake_tensorrt.py), and on a real one where there is one.

On the stand-in every expected value is ONNX Runtime's on the same demo bundle: a session must not change a bit of it.
"""

import importlib.util
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed.export.profiles import Sizes, plan_engines
from metaembed.runtime.cuda import Cuda, find_gpu
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle
from metaembed.runtime.session_trt import FLAVOURS, SharedStream, TrtSession, installed_flavours, open_trt_sessions

spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)

TEXTS = ["a red umbrella", None, "a blue anchor and a green star", "x"]
IMAGES = [None, Image.new("RGB", (56, 84), "red"), Image.new("RGB", (140, 56), "navy"), None]


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def reference(demo_bundle):
    with Encoder.open(demo_bundle, verify=False) as encoder:
        yield encoder


@pytest.fixture
def rig(bundle):
    rig = fake.Rig(bundle)
    yield rig
    rig.vision.close()
    rig.language.close()
    assert rig.gpu.memory == {}, "buffers, graphs and the stream are freed"


def patches(seed, images, windows):
    values = np.random.default_rng(seed).standard_normal((images, windows, 64, 1176)).astype(np.float32)
    return {
        "patches": values,
        "patch_positions": np.zeros((images, windows, 64, 2), np.int64),
        "patch_mask": np.ones((images, windows, 64), np.bool_),
    }


@pytest.mark.parametrize("options", [{}, {"profile_per_budget": True}, {"layout": "separate"}], ids=str)
def test_an_encoder_on_engines_equals_one_on_onnx_runtime(bundle, reference, options):
    rig = fake.Rig(bundle, **options)
    encoder = rig.encoder(bundle)
    for budget in (16, 1):
        expected = reference.encode_queries(TEXTS, images=IMAGES, budget=budget, batch_size=2)
        actual = encoder.encode_queries(TEXTS, images=IMAGES, budget=budget, batch_size=2)
        np.testing.assert_array_equal(actual, expected)
    expected = reference.encode_candidates(images=IMAGES[1:3], budget=64)
    np.testing.assert_array_equal(encoder.encode_candidates(images=IMAGES[1:3], budget=64), expected)


def test_image_embeddings_never_visit_the_host(bundle, rig):
    rig.encoder(bundle).encode_candidates(images=IMAGES[1:3], budget=16, batch_size=2)
    assert rig.gpu.calls.count("copy_out") == 1  # the embeddings
    assert rig.gpu.calls.count("copy_in") == 3 + 5  # the vision graph's inputs, the language graph's but for one


def test_buffers_are_reused_and_grow_only_for_larger_inputs(rig):
    rig.vision.run(patches(0, 1, 2))
    before = len(rig.gpu.memory)
    rig.gpu.calls.clear()
    rig.vision.run(patches(1, 1, 2))
    rig.vision.run(patches(2, 1, 1))
    assert "allocate" not in rig.gpu.calls
    assert "allocate_host" not in rig.gpu.calls
    rig.vision.run(patches(3, 2, 3))
    assert rig.gpu.calls.count("allocate") == 4  # three inputs, one output
    assert len(rig.gpu.memory) == before


def test_two_runs_in_a_row_do_not_share_staging_memory_too_early(rig):
    """The stand-in executes late: without a wait, the second input would overwrite the first before it is read."""
    first, second = patches(0, 1, 2), patches(1, 1, 2)
    engine = rig.engines[VISION][0]
    expected = engine.session.run(None, first)[0]
    out = rig.vision.run(first)["image_embeddings"]
    kept = np.asarray(out)
    rig.vision.run(second)
    rig.gpu.drain()
    np.testing.assert_array_equal(kept, expected)


def test_an_output_on_the_gpu_is_refused_once_its_buffer_moved(rig):
    old = rig.vision.run(patches(0, 1, 1))["image_embeddings"]
    rig.vision.run(patches(1, 2, 5))
    with pytest.raises(ValueError, match="gone"):
        np.asarray(old)


def test_outputs_belong_to_the_caller(bundle, rig, reference):
    encoder = rig.encoder(bundle)
    first = encoder.encode_queries(["a red umbrella"])
    kept = first.copy()
    encoder.encode_queries(["a blue anchor"])
    np.testing.assert_array_equal(first, kept)


def test_the_profile_tuned_for_the_side_is_chosen(bundle, rig):
    encoder = rig.encoder(bundle)
    engine = rig.engines[LANGUAGE][0]
    encoder.encode_queries(["a red umbrella"], budget=16)
    assert engine.used_profiles == [0]
    encoder.encode_candidates(images=[Image.new("RGB", (448, 448))], budget=16)
    assert engine.used_profiles == [0, 1]


def test_each_size_finds_its_own_profile(bundle):
    rig = fake.Rig(bundle, profile_per_budget=True)
    encoder = rig.encoder(bundle)
    for budget in (1, 2, 4, 8, 16):
        encoder.encode_queries(["x"], budget=budget)
    assert rig.engines[LANGUAGE][0].used_profiles == [0, 1, 2, 3, 4]


def test_a_batch_is_no_larger_than_every_profile_takes(bundle):
    """Eight queries and four candidates share the language engine: six candidates come in two batches."""
    rig = fake.Rig(bundle)
    assert rig.language.max_items == 4
    assert rig.encoder(bundle).encode_candidates(["x"] * 6, budget=64).shape == (6, 64, 128)


def test_repeated_shapes_are_recorded_once_and_replayed(bundle, reference):
    gpu = fake.FakeGpu()
    (vision, _) = plan_engines(Sizes.of(bundle.manifest), bundle.manifest.budgets)
    engine = fake.FakeEngine(gpu, bundle.path(VISION), vision.profiles)
    session = TrtSession([engine], gpu=gpu, stream=SharedStream(gpu), label="fake", cuda_graphs=True)
    for seed in range(5):
        feeds = patches(seed, 1, 2)
        expected = engine.session.run(None, feeds)[0]
        np.testing.assert_array_equal(session.run(feeds)["image_embeddings"], expected)
    assert engine.used_profiles == [0, 0]  # one plain run, one recorded; three more only launched
    assert gpu.calls.count("launch") == 4
    session.run(patches(9, 2, 3))
    session.close()
    assert gpu.memory == {}


def test_nothing_is_recorded_or_replayed_right_after_another_shape(bundle):
    """TensorRT updates its context at the first enqueue of a shape, and a recording must not hold that: it comes plain again."""
    gpu = fake.FakeGpu()
    (vision, _) = plan_engines(Sizes.of(bundle.manifest), bundle.manifest.budgets)
    engine = fake.FakeEngine(gpu, bundle.path(VISION), vision.profiles)
    session = TrtSession([engine], gpu=gpu, stream=SharedStream(gpu), label="fake", cuda_graphs=True)
    launched = []
    for windows in (3, 2, 3, 2, 2, 2, 3, 2, 2):  # the largest first, so that no buffer moves later
        before = gpu.calls.count("launch")
        feeds = patches(windows, 1, windows)
        expected = engine.session.run(None, feeds)[0]
        np.testing.assert_array_equal(session.run(feeds)["image_embeddings"], expected)
        launched.append(gpu.calls.count("launch") - before)
    assert launched == [0, 0, 0, 0, 1, 1, 0, 0, 1]
    session.close()
    assert gpu.memory == {}


@pytest.mark.parametrize(
    "call", ["set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"]
)
def test_what_tensorrt_refuses_with_false_is_an_error_and_the_session_recovers(
    bundle, rig, reference, call, monkeypatch
):
    """The API's setters raise nothing: unchecked, the engine would run with the last shapes and addresses."""
    encoder, image = rig.encoder(bundle), Image.new("RGB", (448, 448), "navy")
    encoder.encode_queries(["a red umbrella"])
    (context,) = rig.engines[LANGUAGE][0].contexts
    monkeypatch.setattr(context, call, lambda *arguments: False)
    for _ in range(2):
        with pytest.raises(MetaEmbedError, match="TensorRT refused"):
            encoder.encode_candidates(images=[image], budget=16)
    monkeypatch.undo()
    expected = reference.encode_candidates(images=[image], budget=16)
    np.testing.assert_array_equal(encoder.encode_candidates(images=[image], budget=16), expected)


def test_shapes_that_cannot_be_inferred_are_one_sentence(rig, monkeypatch):
    def fail():
        raise RuntimeError("shape inference failed")  # what the bindings' docstring promises

    monkeypatch.setattr(rig.engines[VISION][0].contexts[0], "infer_shapes", fail)
    with pytest.raises(MetaEmbedError, match="TensorRT cannot infer shapes: shape inference failed"):
        rig.vision.run(patches(0, 1, 1))


def test_a_run_like_the_last_sets_nothing_anew(rig):
    rig.vision.run(patches(0, 1, 2))
    (context,) = rig.engines[VISION][0].contexts
    context.calls.clear()
    expected = rig.engines[VISION][0].session.run(None, patches(1, 1, 2))[0]
    np.testing.assert_array_equal(np.asarray(rig.vision.run(patches(1, 1, 2))["image_embeddings"]), expected)
    assert set(context.calls) == {"infer"}  # the stand-in's own, in execute_async_v3


def test_an_engine_that_cannot_be_recorded_runs_without(bundle, caplog):
    gpu = fake.FakeGpu()
    (vision, _) = plan_engines(Sizes.of(bundle.manifest), bundle.manifest.budgets)
    engine = fake.FakeEngine(gpu, bundle.path(VISION), vision.profiles)
    engine.waits = True
    session = TrtSession([engine], gpu=gpu, stream=SharedStream(gpu), label="fake", cuda_graphs=True)
    with caplog.at_level(logging.WARNING, "metaembed"), session:
        for seed in range(4):
            feeds = patches(seed, 1, 2)
            np.testing.assert_array_equal(session.run(feeds)["image_embeddings"], engine.session.run(None, feeds)[0])
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "this engine cannot be recorded as a CUDA graph"
    ]
    assert "launch" not in gpu.calls
    assert gpu.memory == {}


def test_recorded_runs_survive_a_change_of_side(bundle, reference):
    """Profiles change between them; the stand-in fails where a graph is launched that its context has left behind."""
    rig = fake.Rig(bundle, cuda_graphs=True)
    encoder, images = rig.encoder(bundle), [Image.new("RGB", (448, 448), "navy")]
    wanted = reference.encode_queries(["x"], budget=16), reference.encode_candidates(images=images, budget=16)
    for _ in range(2):
        for _ in range(4):
            np.testing.assert_array_equal(encoder.encode_queries(["x"], budget=16), wanted[0])
        for _ in range(4):
            np.testing.assert_array_equal(encoder.encode_candidates(images=images, budget=16), wanted[1])
    assert rig.gpu.calls.count("launch") == 4 * 3 + 7  # all but the first of four in a row; all images are of one size
    encoder.close()
    assert rig.gpu.memory == {}


def test_a_freed_array_is_no_input(rig):
    placed = rig.vision.place(patches(0, 1, 2)["patches"])
    placed.free()
    with pytest.raises(ValueError, match="gone"):
        rig.vision.run({**patches(0, 1, 2), "patches": placed})


def test_a_shape_outside_every_profile_is_one_sentence_with_the_way_out(rig):
    with pytest.raises(UsageError, match="at most 8 items at once.*--max-batch"):
        rig.vision.run(patches(0, 9, 1))
    assert rig.vision.max_items == 8


def test_wrong_names_and_types_are_refused(rig):
    feeds = patches(0, 1, 1)
    with pytest.raises(UsageError, match="takes patch_mask, patch_positions, patches, not"):
        rig.vision.run({**feeds, "more": feeds["patches"]})
    with pytest.raises(UsageError, match="patches has type float64"):
        rig.vision.run({**feeds, "patches": feeds["patches"].astype(np.float64)})


def test_a_closed_session_does_not_run_and_closes_twice(bundle):
    rig = fake.Rig(bundle)
    with rig.vision as vision, rig.language:
        pass
    assert rig.gpu.memory == {}
    vision.close()
    with pytest.raises(UsageError, match="closed"):
        vision.run(patches(0, 1, 1))


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_there_are_no_engine_sessions_and_one_sentence_says_why(bundle):
    assert open_trt_sessions(bundle, (VISION, LANGUAGE)) is None
    with pytest.raises(MetaEmbedError, match="no NVIDIA driver|CUDA"):
        Cuda()


def has(*flavours):
    return find_gpu() is not None and not installed_flavours().keys().isdisjoint(flavours)


@pytest.mark.gpu
@pytest.mark.skipif(not has(*FLAVOURS), reason="needs an NVIDIA GPU and TensorRT")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_engines_built_on_this_gpu_pass_the_golden_check(tmp_path, precision):
    """The golden vectors are Hugging Face's, so this judges TensorRT itself. Needs a GPU that the device table names."""
    from metaembed.export.cli import main as export
    from metaembed.export.cli_build import main as build
    from metaembed.runtime.cli_check import main as check

    folder = str(tmp_path / "bundle")
    assert export(["--model", "demo", "--budget", "all", "--precision", precision, "-o", folder, "--quiet"]) == 0
    assert build([folder, "--quiet"]) == 0
    assert check([folder]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not has("tensorrt"), reason="needs an NVIDIA GPU and TensorRT; TensorRT-RTX records runs by itself")
def test_recorded_runs_on_this_gpu_equal_plain_ones_and_the_benchmark_runs(narrow_demo, tmp_path):
    """Sides alternate, so profiles change between recordings: what a fake cannot say is whether TensorRT allows it."""
    from metaembed.bench.cli import main as bench
    from metaembed.export.cli_build import main as build

    folder, records = shutil.copytree(narrow_demo("bf16"), tmp_path / "bundle"), tmp_path / "engine.jsonl"
    assert build([str(folder), "--quiet"]) == 0
    opened, graphs = Bundle.open(folder), (VISION, LANGUAGE)
    image = Image.new("RGB", (448, 448), "navy")
    with Encoder(opened, *open_trt_sessions(opened, graphs)) as plain:
        expected = plain.encode_queries(["x"]), plain.encode_candidates(images=[image])
    with Encoder(opened, *open_trt_sessions(opened, graphs, cuda_graphs=True)) as recorded:
        for _ in range(2):
            for _ in range(4):
                np.testing.assert_allclose(recorded.encode_queries(["x"]), expected[0], atol=1e-6)
            for _ in range(4):
                np.testing.assert_allclose(recorded.encode_candidates(images=[image]), expected[1], atol=1e-6)
    for graphs in ([], ["--cuda-graphs"]):
        assert bench(["engine", str(folder), *graphs, "-o", str(records)]) == 0
    assert len(records.read_text().splitlines()) == 2 * (
        1 + 10 + 15
    )  # the images; both sides' five sizes; 5 budgets, 3 places
