"""Which providers ONNX Runtime is asked for. What needs a GPU is marked so; the fallback is real, on a build without CUDA."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime import layout
from metaembed.runtime.cuda import find_gpu
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle
from metaembed.runtime.open_sessions import open_ort_sessions
from metaembed.runtime.providers import (
    CPU,
    CUDA,
    MOST_ITEMS,
    TENSORRT,
    input_spans,
    plan_attempts,
    provider_options,
)
from metaembed.runtime.session_ort import OrtSession, available_providers

GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]  # onnxruntime-gpu 1.20
BOTH = (VISION, LANGUAGE)


def order(available: list[str], precision: str, graphs: tuple[str, ...] = BOTH) -> list[tuple[str, bool]]:
    return [(attempt.providers[0], attempt.as_they_are) for attempt in plan_attempts(available, precision, graphs)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_without_cuda_only_the_cpu_is_tried(precision: str):
    assert order(["AzureExecutionProvider", CPU], precision) == [(CPU, False)]


def test_float32_goes_to_tensorrt_then_cuda_then_the_cpu():
    assert order(GPU_BUILD, "fp32") == [(TENSORRT, True), (CUDA, True), (CPU, False)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_graphs_never_go_to_a_weakly_typed_builder(precision: str):
    assert order(GPU_BUILD, precision) == [(CUDA, True), (CUDA, False), (CPU, False)]


def test_the_scorer_is_not_worth_an_engine_that_is_built_on_first_use():
    assert order(GPU_BUILD, "fp32", (SCORER,)) == [(CUDA, True), (CPU, False)]


def test_the_cpu_fills_gaps_but_does_not_count_as_success():
    attempt = plan_attempts(GPU_BUILD, "fp32", BOTH)[0]
    assert attempt.got(TENSORRT)
    assert attempt.got(CUDA)
    assert not attempt.got(CPU)
    assert plan_attempts([CPU], "fp32", BOTH)[-1].got(CPU)


def test_the_profile_of_a_provider_covers_what_the_encoder_makes(demo_bundle: Path):
    """Real inputs, laid out by the runtime: the largest thin image, the longest prompt, one word, every budget."""
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    image, vocab = manifest.geometry.image_token_id, manifest.geometry.text.vocab
    spans = {name: input_spans(manifest, name) for name in BOTH}
    for grid in ((2, 2), (64, 64), (4, 904)):
        pixels = np.zeros((grid[0] * grid[1], 1176), np.float32)
        seen = layout.lay_out_images([pixels] * MOST_ITEMS, [grid] * MOST_ITEMS)
        check_inside(seen.feeds(), spans[VISION])
        prompt = np.array([image] * (grid[0] * grid[1] // 4) + [5] * manifest.limits.text_tokens)
        for budget in manifest.budgets:
            meta = layout.candidate_meta_tokens(vocab, manifest.geometry.query_tokens, budget.candidate)
            windows = seen.patches.shape[1]
            laid = layout.lay_out_prompts([prompt], [grid], meta, budget.candidate, image_token=image, windows=windows)
            embedded = np.zeros((1, windows * layout.UNITS, manifest.geometry.text.hidden))
            check_inside({**laid.feeds(), "image_embeddings": embedded}, spans[LANGUAGE])
    meta = layout.query_meta_tokens(vocab, 1)
    laid = layout.lay_out_prompts([np.array([5])], [None], meta, 1, image_token=image, windows=0)
    check_inside(laid.feeds(), spans[LANGUAGE])


def check_inside(feeds: dict[str, np.ndarray], spans) -> None:
    for name, value in feeds.items():
        low, best, high = spans[name]
        assert all(a <= size <= b for a, size, b in zip(low, value.shape, high, strict=True)), (name, value.shape)
        assert all(a <= size <= b for a, size, b in zip(low, best, high, strict=True)), name


def test_options_name_every_input_once_and_keep_engines_in_the_cache(demo_bundle: Path, tmp_path: Path):
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    options = provider_options(TENSORRT, manifest, VISION, tmp_path)
    assert options["trt_engine_cache_path"] == str(tmp_path)
    assert options["trt_profile_max_shapes"].split(",")[2] == "patch_mask:4x113x64"  # a 2 x 452 strip has 113 windows
    assert "trt_int8_enable" not in options
    int8 = replace(manifest, quantization={"type": "int8"})
    assert provider_options(TENSORRT, int8, VISION, tmp_path)["trt_int8_enable"] == "True"
    # onnxruntime_pybind_state.cc: "should be 'True' or 'False'", and anything else is an error.
    assert {value for name, value in options.items() if name.endswith("_enable")} == {"True"}
    assert not any("cache" in name for name in provider_options(TENSORRT, manifest, VISION, None))
    assert provider_options(CPU, manifest, VISION, None) == {}


@pytest.mark.skipif(CUDA in available_providers(), reason="this build of ONNX Runtime has the CUDA provider")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_not_really_here_is_one_sentence_and_the_next_is_taken(
    demo_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """ONNX Runtime itself falls back without failing: what it says afterwards is what counts."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    with caplog.at_level(logging.WARNING, "metaembed"):
        sessions = open_ort_sessions(Bundle.open(demo_bundle, verify=False), BOTH, available=GPU_BUILD)
    assert {session.providers[0] for session in sessions} == {CPU}
    assert [record.getMessage().split(";")[0].split(" and got ")[0] for record in caplog.records] == [
        f"asked for {TENSORRT}",
        f"asked for {CUDA}",
    ]
    assert all("\n" not in record.getMessage() for record in caplog.records)
    # It turns TensorFloat-32 off in all of NVIDIA's libraries, and ONNX Runtime's TensorRT provider has no option for that.
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None or CUDA not in available_providers(), reason="needs onnxruntime-gpu and a GPU")
def test_on_a_gpu_the_golden_vectors_come_back_through_a_provider_of_nvidia(demo_bundle: Path):
    from metaembed.runtime.check import check_bundle
    from metaembed.runtime.encoder import Encoder

    bundle = Bundle.open(demo_bundle)
    sessions = open_ort_sessions(bundle, BOTH)
    assert sessions[0].providers[0] in (TENSORRT, CUDA)
    check_bundle(Encoder(bundle, *sessions)).require()


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None or CUDA not in available_providers(), reason="needs onnxruntime-gpu and a GPU")
def test_on_a_gpu_recorded_queries_are_those_of_runs_as_usual(demo_bundle: Path):
    from metaembed.runtime.encoder import Encoder

    texts = ["a red circle", "two blue squares", "a page of stars", "words", "none"] * 2
    with Encoder.open(demo_bundle) as plain, Encoder.open(demo_bundle, cuda_graphs=True) as recorded:
        for text in texts:
            np.testing.assert_allclose(recorded.encode_queries([text]), plain.encode_queries([text]), atol=1e-5)
        assert recorded._language._recorded


@pytest.mark.parametrize("rows", [2, 0])
def test_bf16_goes_in_and_comes_out_bit_by_bit(bf16_identity: Path, rows: int):
    """numpy has no bf16, so these go through OrtValues; 1.0078125 is the next value after 1."""
    values = np.array([[1.0078125, -0.0, 3e38], [1e-40, 0.1, -2]], np.float32).astype(ml_dtypes.bfloat16)[:rows]
    got = OrtSession(bf16_identity).run({"x": values})["y"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.view(np.uint16), values.view(np.uint16))


def test_another_type_than_the_graph_takes_is_one_sentence(bf16_identity: Path):
    with pytest.raises(UsageError, match="x has type float32, and the graph takes bfloat16"):
        OrtSession(bf16_identity).run({"x": np.zeros((2, 3), np.float32)})
