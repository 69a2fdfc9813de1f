"""TensorRT-RTX, ahead of time and without a GPU, takes the quantised demo graphs: parsing, types and weight embedding."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from metaembed.calibration.dataset import CalibrationSet
from metaembed.calibration.formats import FORMATS
from metaembed.calibration.quantise import Request, draft_recipe
from metaembed.calibration.recipe import Recipe
from metaembed.calibration.workshop import Workshop
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle

# Smallest, typical and largest size of each dynamic axis.
SIZES = {"i": (1, 1, 2), "w": (1, 2, 4), "b": (1, 1, 2), "t": (8, 64, 128), "m": (1, 32, 64), "r": (1, 8, 16)}
# A100, RTX 30, L4, RTX 50; FP8 arithmetic begins with 8.9.
CAPABILITIES = {"int8": [(8, 0), (8, 6), (8, 9), (12, 0)], "fp8": [(8, 9), (12, 0)]}


@pytest.fixture(scope="module")
def recipes(
    small_bundle: Path,
    narrow_demo: Callable[[str], Path],
    calibration_set: CalibrationSet,
    tmp_path_factory: pytest.TempPathFactory,
):
    """Name to a folder with both quantised graphs: of each type over fp32, and FP8 with a float32 token table or over bf16."""
    folders = {}
    for name, form in FORMATS.items():
        folder = tmp_path_factory.mktemp(name)
        workshop = Workshop(Bundle.open(small_bundle), folder, form, threads=1)
        request = Request(type=name, data=calibration_set, observer="max", smooth=False, threads=1)
        recipe: Recipe = draft_recipe(workshop, request, lambda line: None, lambda work, what: work)
        recipe = recipe.quantising_twice([group.name for group in recipe.groups[::3]])  # both forms in one graph
        folders[name] = pack(workshop, recipe)
    more = {
        "table high": (small_bundle, replace(recipe, token_table=False)),
        "fp8 over bf16": (narrow_demo("bf16"), recipe),
    }
    for name, (source, changed) in more.items():
        workshop = Workshop(Bundle.open(source), tmp_path_factory.mktemp("more"), form, threads=1)
        folders[name] = pack(workshop, changed)
    return folders


def pack(workshop: Workshop, recipe: Recipe) -> Path:
    for graph, model in workshop.pack(recipe).items():
        ir.save(model, workshop.folder / graph)
    return workshop.folder


def build(path: Path, capabilities: list[tuple[int, int]]) -> int:
    """Bytes of one engine for all the compute capabilities."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    backend = pytest.importorskip("polygraphy.backend.tensorrt_rtx", reason="polygraphy is not installed")
    from polygraphy.backend.trt import NetworkFromOnnxPath, Profile, engine_bytes_from_network

    profile = Profile()
    for value in (value for value in ir.load(path).graph.inputs if not value.is_initializer()):
        shapes = ([SIZES[str(d)][k] if isinstance(d, ir.SymbolicDim) else d for d in value.shape] for k in range(3))
        smallest, typical, largest = (tuple(int(size) for size in shape) for shape in shapes)
        profile.add(value.name, min=smallest, opt=typical, max=largest)
    network = NetworkFromOnnxPath(str(path), strongly_typed=True)
    config = backend.CreateConfigRTX(profiles=[profile], compute_capabilities=capabilities)
    return memoryview(engine_bytes_from_network(network, config)).nbytes


@pytest.mark.parametrize("form", [*CAPABILITIES, "fp8 over bf16"])
@pytest.mark.parametrize("graph", [VISION, LANGUAGE])
def test_a_quantised_graph_builds(recipes, form, graph):
    assert build(recipes[form] / graph, CAPABILITIES[form.split()[0]]) > 1 << 20


def test_a_plan_keeps_the_token_table_in_one_byte_a_number(recipes, small_bundle):
    """Against a plan of the same recipe with the table in float32, 4 bytes: 704 rows of 128, less 4 bytes of scale a row."""
    text = Bundle.open(small_bundle).manifest.geometry.text
    saved = text.vocab * text.hidden * 3 - text.vocab * 4
    small, large = (build(recipes[name] / LANGUAGE, [(8, 9)]) for name in ("fp8", "table high"))
    assert large - small == pytest.approx(saved, rel=0.1)
