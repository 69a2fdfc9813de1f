"""Tracing without weights: the interface of CONTRIBUTING.md, and nothing but names in place of weights.

The geometry is deep enough that layers are repeated rather than traced.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest

from metaembed.export.encoder import LanguageEncoder, VisionEncoder
from metaembed.export.graph import check_operators, optimise, weights_of
from metaembed.export.trace import trace_language, trace_vision
from metaembed.runtime.geometry import Geometry, TextGeometry, VisionGeometry

GEOMETRY = Geometry(
    text=TextGeometry(
        hidden=48, layers=5, heads=4, kv_heads=2, intermediate=56, vocab=90, rms_eps=1e-6, rope_theta=1e4,
        mrope_section=(2, 2, 2),
    ),
    vision=VisionGeometry(hidden=40, depth=6, heads=2, intermediate=44, out_hidden=48, full_attention_blocks=(2, 5)),
    projection=24,
)  # fmt: skip
# CONTRIBUTING.md's two tables, by hand.
INTERFACE = {
    "vision": ({"patches": "FLOAT 4", "patch_positions": "INT64 4", "patch_mask": "BOOL 3"}, "image_embeddings"),
    "language": (
        {"token_ids": "INT64 2", "image_rows": "INT64 2", "image_embeddings": "FLOAT 3", "positions": "INT64 3"}
        | {"mask": "BOOL 2", "rows": "INT64 1"},
        "embeddings",
    ),
}
MODULES = {"vision": VisionEncoder, "language": LanguageEncoder}


@pytest.fixture(scope="module")
def models() -> dict[str, ir.Model]:
    return {"vision": trace_vision(GEOMETRY), "language": trace_language(GEOMETRY)}


@pytest.mark.parametrize("name", INTERFACE)
def test_inputs_and_outputs_are_those_of_the_contract(models: dict[str, ir.Model], name: str):
    inputs, output = INTERFACE[name]
    graph = models[name].graph
    assert {value.name: f"{value.dtype.name} {len(value.shape)}" for value in graph.inputs} == inputs
    assert [value.name for value in graph.outputs] == [output]
    assert graph.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("name", INTERFACE)
def test_weights_have_hf_names_shapes_and_no_values(models: dict[str, ir.Model], name: str):
    """Independent source: the module's own state_dict, which loads HF's strictly in tests/parity."""
    wanted = {key: tuple(tensor.shape) for key, tensor in MODULES[name](GEOMETRY).state_dict().items()}
    assert {weight.name: tuple(weight.shape.numpy()) for weight in weights_of(models[name])} == wanted


@pytest.mark.parametrize("name", INTERFACE)
def test_optimising_again_keeps_every_weight_and_graphs_use_allowed_operators_only(
    models: dict[str, ir.Model], name: str
):
    model = models[name]
    before = {weight.name for weight in weights_of(model)}
    optimise(model)
    assert {weight.name for weight in weights_of(model)} == before
    check_operators(model)


def test_sizes_that_vary_are_dynamic_and_the_others_are_not(models: dict[str, ir.Model]):
    shapes = {value.name: value.shape for model in models.values() for value in model.graph.inputs}
    fixed = {name: [dim for dim in shape if isinstance(dim, int)] for name, shape in shapes.items()}
    assert fixed == {
        "patches": [64, 1176],
        "patch_positions": [64, 2],
        "patch_mask": [64],
        "token_ids": [],
        "image_rows": [],
        "image_embeddings": [48],
        "positions": [3],
        "mask": [],
        "rows": [],
    }


@pytest.mark.parametrize("blocks", [(0,), ()], ids=["first", "none"])
def test_a_deep_tower_without_whole_image_blocks_after_the_first_is_repeated(blocks: tuple[int, ...]):
    """Independent source: the names of the module's own state_dict."""
    geometry = replace(GEOMETRY, vision=replace(GEOMETRY.vision, depth=4, full_attention_blocks=blocks))
    names = [weight.name for weight in weights_of(trace_vision(geometry))]
    assert sorted(names) == sorted(VisionEncoder(geometry).state_dict())
