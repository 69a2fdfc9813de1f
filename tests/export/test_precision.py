"""bf16 and fp16: what the graphs compute from narrow weights, judged in float32 and float64 on the same rounded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from metaembed.export import encoder
from metaembed.export.bundle import NARROW
from metaembed.export.checkpoint import Checkpoint
from metaembed.export.encoder import GatedMLP, VisionEncoder
from metaembed.export.graph import attach_weights, save_graph
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.export.safetensors_writer import TensorSpec, write_checkpoint
from metaembed.export.source import convert_weights
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.structure import allowed_operators


@pytest.mark.parametrize(("name", "precision"), [("vision", "bf16"), ("language", "bf16"), ("language", "fp16")])
def test_widened_graph_equals_the_fp32_graph_on_the_same_rounded_weights(deep, name: str, precision: str):
    """Expected: the fp32 graph, another trace, over the same narrow bytes. Both compute in float32: 1e-5 of the largest."""
    mine, wanted = deep.run(name, precision, precision), deep.run(name, "fp32", precision)
    assert mine.dtype == wanted.dtype == np.float32
    np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max())


def saved(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("name", ["vision", "language"])
def test_weights_are_stored_once(deep, name: str):
    """The narrow graph and its float32 twin name the same ranges of the same file, and hold next to nothing themselves."""
    model = deep.trace(name, "bf16").clone()
    attach_weights(model, deep.refs("bf16"))
    save_graph(model, deep.folder / f"{name}.onnx")
    graphs = [saved(deep.folder / f"{name}.onnx"), saved(deep.save(name, "bf16", "bf16"))]
    narrow, twin = ({place(tensor) for tensor in graph.graph.initializer} - {None} for graph in graphs)
    assert narrow == twin
    assert sum(length for _, _, length in narrow) == sum(
        ref.nbytes
        for key, ref in deep.weights("bf16").tensors.items()
        if key.startswith("visual.") == (name == "vision")
    )
    for graph in graphs:
        inline = [tensor.ByteSize() for tensor in graph.graph.initializer if place(tensor) is None]
        assert sum(inline) < 20_000


def place(tensor: onnx.TensorProto) -> tuple[str, int, int] | None:
    data = {entry.key: entry.value for entry in tensor.external_data}
    return (data["location"], int(data.get("offset", 0)), int(data["length"])) if data else None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vision", "language"])
def test_saved_graphs_hold_allowed_operators_and_no_trace_of_the_machine(deep, name: str, precision: str):
    """No metadata, no path of ours or of torch, and not one operator outside the written list."""
    path = deep.save(name, precision, precision)
    graph = saved(path).graph
    assert {node.op_type for node in graph.node} <= allowed_operators(20)
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert not any(
        value.metadata_props or value.doc_string for value in (*graph.input, *graph.output, *graph.value_info)
    )
    content = path.read_bytes()
    for word in (b"pkg.torch", b"stack_trace", b".py", b"site-packages", str(Path.home()).encode() + b"/"):
        assert word not in content, word


def test_narrow_graphs_hand_over_image_embeddings_in_their_own_type(deep):
    narrow = NARROW["bf16"]
    vision, language = deep.trace("vision", "bf16"), deep.trace("language", "bf16")
    assert vision.graph.outputs[0].dtype == narrow
    assert {value.name: value.dtype for value in language.graph.inputs}["image_embeddings"] == narrow
    assert language.graph.outputs[0].dtype.name == "FLOAT"


@pytest.fixture
def with_value(tmp_path: Path, tiny) -> Callable[[float], Checkpoint]:
    """A float32 checkpoint in which one weight has this value."""
    checkpoint = write_random_checkpoint(tiny, 0, tmp_path / "small", dtype="fp32")
    specs = {name: TensorSpec(ref.shape, "F32") for name, ref in checkpoint.tensors.items()}

    def write(value: float) -> Checkpoint:
        def pieces(name: str):
            values = np.array(checkpoint.read(name)).reshape(-1)
            if name == "language_model.layers.1.mlp.down_proj.weight":
                values[17] = value
            yield values

        write_checkpoint(tmp_path / "large", checkpoint.config, specs, pieces)
        return Checkpoint.open(tmp_path / "large")

    return write


def test_a_weight_beyond_fp16_is_refused_with_its_name_and_the_way_out(
    with_value: Callable[[float], Checkpoint], tmp_path: Path
):
    large = with_value(-70000.0)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj\.weight holds values beyond.*--precision bf16"):
        convert_weights(large, "fp16", tmp_path / "converted", lambda nbytes: None)
    assert not (tmp_path / "converted").exists()
    converted = convert_weights(large, "bf16", tmp_path / "converted", lambda nbytes: None)
    assert {ref.dtype for ref in converted.tensors.values()} == {"BF16"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_no_matter_of_precision(
    with_value: Callable[[float], Checkpoint], tmp_path: Path, precision: str, value: float
):
    with pytest.raises(BundleError, match=r"down_proj\.weight in .*large/model.safetensors holds NaN or infinite"):
        convert_weights(with_value(value), precision, tmp_path / "converted", lambda nbytes: None)
    assert not (tmp_path / "converted").exists()


def test_a_weight_beyond_bf16_is_refused_with_its_name_and_the_way_out(
    with_value: Callable[[float], Checkpoint], tmp_path: Path
):
    """float32's largest value, 3.4028e38, rounds up to infinity in bfloat16, whose largest is 3.3895e38."""
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj\.weight holds values beyond.*--precision fp32"):
        convert_weights(with_value(3.4028e38), "bf16", tmp_path / "converted", lambda nbytes: None)


def crafted_mlp() -> tuple[GatedMLP, torch.Tensor]:
    """Weights that fit fp16 and outputs that do too, but a product gate * up of up to some 400,000."""
    torch.manual_seed(0)
    mlp = GatedMLP(24, 40, bias=True)
    for linear, size in ((mlp.gate_proj, 40.0), (mlp.up_proj, 40.0), (mlp.down_proj, 0.005)):
        linear.weight.data = size * torch.randn_like(linear.weight)
        linear.bias.data.zero_()
    mlp = mlp.half().requires_grad_(False)
    return mlp, torch.randn(7, 24).half()


def test_fp16_survives_what_overflows_a_plain_swiglu():
    """Expected in float64. The same product in plain float16 is infinite: that is the failure guarded against."""
    mlp, x = crafted_mlp()
    plain = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert plain.isinf().any()
    wide = {name: value.double() for name, value in mlp.state_dict().items()}
    gate, up = (x.double() @ wide[f"{name}_proj.weight"].T for name in ("gate", "up"))
    product = gate / (1 + torch.exp(-gate)) * up
    assert 65504 < product.abs().max() < 64 * 65504
    expected = product @ wide["down_proj.weight"].T
    got = mlp(x)
    assert got.isfinite().all()
    assert torch.nn.functional.cosine_similarity(got.double(), expected).min() > 0.9999
    torch.testing.assert_close(got.double(), expected, atol=float(expected.abs().max()) * 2e-3, rtol=0)


def overflowing_tower(geometry: Geometry, dtype: torch.dtype) -> VisionEncoder:
    """Blocks whose SwiGLU products reach some 300,000, as those of Qwen2.5-VL do; weights that fit fp16."""
    torch.manual_seed(1)
    tower = VisionEncoder(geometry).requires_grad_(False)
    for block in tower.visual.blocks:
        mlp = block.mlp
        for linear, size in ((mlp.gate_proj, 30.0), (mlp.up_proj, 30.0), (mlp.down_proj, 1e-4)):
            linear.weight.copy_((size * torch.randn_like(linear.weight)).half())
            linear.bias.zero_()
    for parameter in tower.parameters():  # not module.to(dtype), which would round the rotary frequencies
        parameter.data = parameter.data.half().to(dtype)
    return tower.eval()


def test_fp16_guards_the_whole_vision_tower(deep, monkeypatch):
    """Expected: float32 over the same weights. Without the guard the same tower gives no finite image embedding."""
    feeds = [torch.from_numpy(values) for values in deep.images().feeds().values()]
    wanted = overflowing_tower(deep.geometry, torch.float32)(*feeds)
    guarded = overflowing_tower(deep.geometry, torch.float16)(*feeds).float()
    assert guarded.isfinite().all()
    real = feeds[2].reshape(len(deep.grids), -1, 4)[..., 0]
    assert torch.nn.functional.cosine_similarity(guarded, wanted, dim=-1)[real].min() > 0.999
    monkeypatch.setattr(encoder, "FP16_SCALE", 1.0)
    assert not overflowing_tower(deep.geometry, torch.float16)(*feeds)[real].isfinite().all()
