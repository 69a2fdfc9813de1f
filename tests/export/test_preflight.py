"""What is refused before any work, and what it is expected to take. Weights are counted against the checkpoint itself."""

import shutil
from dataclasses import replace

import onnx
import pytest
from safetensors import safe_open

from metaembed.export.device_kit import TENSORRT_PINS
from metaembed.export.memory import count_weights, estimate_build
from metaembed.export.onnx_header import read_opset
from metaembed.export.preflight import check_opset, check_target, check_types, newest_opset, version_key
from metaembed.export.profiles import Sizes, plan_engines, scorer_engine
from metaembed.export.route import choose_route
from metaembed.runtime.budget import Budget
from metaembed.runtime.devices import DEVICES, find_device
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.graph_maxsim import MEMORY_BYTES, QUERIES, chunk_size
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.manifest import Bundle, Limits
from metaembed.runtime.memory import GIB

BUDGETS = (Budget(1, 1), Budget(8, 16), Budget(16, 64))
RTX = {"flavour": "tensorrt_rtx", "version": "1.7.1.116"}


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle, verify=False)


def preflight(bundle, target, *, changes=None, options=None, **arguments):
    bundle = Bundle(bundle.folder, replace(bundle.manifest, **(changes or {})))
    engines = plan_engines(Sizes.of(bundle.manifest), bundle.manifest.budgets, **(options or {}))
    return check_target(bundle, find_device(target), engines, **{**RTX, **arguments})


def refusal(*arguments, **keywords):
    with pytest.raises(UsageError) as caught:
        preflight(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("target", ["a100", "orin", "a10", "orin-nano", "t4"])
def test_fp8_is_refused_below_8_9_with_what_to_use_instead(bundle, target):
    changes = {"quantization": {"type": "fp8"}, "precision": "fp16"}
    sentence = refusal(bundle, target, changes=changes, flavour="tensorrt", version=None, builds_here=False)
    assert "has no fp8 hardware" in sentence
    assert "fp8 starts at 8.9: l4, rtx4090, l40s, h100" in sentence
    assert "int8" in sentence
    with pytest.raises(UsageError, match="no fp8 hardware"):
        check_types(find_device(target), "fp16", "fp8")


@pytest.mark.parametrize("target", ["l4", "h100", "thor", "rtx5090"])
def test_fp8_passes_where_there_is_hardware(bundle, target):
    changes = {"quantization": {"type": "fp8"}, "precision": "bf16"}
    preflight(bundle, target, changes=changes, flavour="tensorrt", version=None, builds_here=False)


def test_bf16_is_refused_on_turing(bundle):
    sentence = refusal(bundle, "t4", changes={"precision": "bf16"})
    assert "has no bf16 hardware (compute capability 7.5; bf16 starts at 8.0" in sentence
    assert "--precision fp16" in sentence


@pytest.mark.parametrize("target", ["orin", "h100", "thor", "t4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_is_refused_where_it_has_no_kernels(bundle, target, precision):
    """TensorRT-RTX 1.7.1 refuses 8.7, 9.0 and 11.0 itself, and products in float32, as the scorer's are, for 7.5."""
    sentence = refusal(bundle, target, changes={"precision": precision})
    assert "TensorRT-RTX does not build these graphs for compute capability" in sentence
    assert "to get a device kit" in sentence


@pytest.mark.parametrize(
    ("target", "version", "reason"),
    [
        ("thor", "10.3.0", "10.13 is the first that does"),
        ("rtx5090", "10.7.0", "10.8 is the first"),
        ("a100", "10.2.0", "10.3"),
    ],
)
def test_a_tensorrt_older_than_the_device_is_refused(bundle, target, version, reason):
    assert reason in refusal(bundle, target, flavour="tensorrt", version=version)


def test_versions_compare_as_numbers():
    assert version_key("10.13.0.35") > version_key("10.3.0") > version_key("10.3")
    assert [newest_opset(version) for version in ("10.3.0", "10.13.0", "10.15.1", "11.4.1")] == [20, 20, 24, 24]


def test_an_opset_beyond_the_parser_is_refused(bundle, tmp_path):
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    for name in ("vision.onnx", "language.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        model.opset_import[0].version = 23
        onnx.save(model, folder / name)
    newer = Bundle(folder, bundle.manifest)
    assert "language.onnx uses opset 23, and the parser of TensorRT 10.3.0 takes 20" in refusal(
        newer, "orin", flavour="tensorrt", version="10.3.0"
    )
    preflight(newer, "orin", flavour="tensorrt", version="11.4.1")
    kit = {"flavour": "tensorrt", "version": None, "builds_here": False}
    assert "TensorRT 10.3.0 takes 20; export with --opset 20" in refusal(newer, "orin", **kit)
    preflight(newer, "h100", **kit)  # the kit installs one that parses it


def test_a_kit_installs_a_tensorrt_that_parses_every_opset(bundle, monkeypatch):
    """onnx-tensorrt's docs/operators.md: opset 20 up to release 10.14, 24 from 10.15. With an older pin the kit is refused."""
    version = dict(pin.split("==") for pin in TENSORRT_PINS)["tensorrt-cu12"]
    assert tuple(map(int, version.split(".")[:2])) >= (10, 15)
    monkeypatch.setattr("metaembed.export.preflight.KIT_TENSORRT", "10.2.0")
    monkeypatch.setattr("metaembed.export.preflight.read_opset", lambda path: 23)
    kit = {"flavour": "tensorrt", "version": None, "builds_here": False}
    assert "TensorRT 10.2.0 takes 20" in refusal(bundle, "h100", **kit)


def test_fp32_attention_is_refused_as_tensorrt_rtx_does(bundle):
    """tests/export/test_opset_23.py builds the bf16 one."""
    sentence = refusal(bundle, "a100", changes={"opset": 23})
    assert "no kernel for an Attention operator in fp32; export with --precision bf16, or --opset 20" in sentence
    preflight(bundle, "a100", changes={"opset": 23, "precision": "bf16"})


def test_an_opset_is_refused_before_the_export_for_boards_of_jetpack_6_and_7_0():
    for target, tensorrt in (("orin", "10.3.0"), ("orin-nano", "10.3.0"), ("thor", "10.13")):
        with pytest.raises(UsageError, match=rf"TensorRT {tensorrt} .* takes opset 20, not 23; export with --opset 20"):
            check_opset(find_device(target), 23)
        check_opset(find_device(target), 20)
    check_opset(find_device("a100"), 23)


def test_attention_in_fp32_is_refused_before_the_export_where_tensorrt_rtx_builds():
    for target in ("a100", "l4", "rtx5090"):
        with pytest.raises(UsageError, match="no kernel for an Attention operator in fp32; .*--opset 20"):
            check_opset(find_device(target), 23, "fp32")
        check_opset(find_device(target), 23, "bf16")
        check_opset(find_device(target), 20, "fp32")
    check_opset(find_device("h100"), 23, "fp32")


def test_the_opset_is_read_as_the_onnx_package_reads_it(bundle, tmp_path):
    for name in ("vision.onnx", "language.onnx"):
        model = onnx.load(bundle.folder / name, load_external_data=False)
        assert read_opset(bundle.folder / name) == model.opset_import[0].version == 20
    other = onnx.helper.make_model(
        onnx.helper.make_graph([], "empty", [], []),
        opset_imports=[onnx.helper.make_opsetid("com.example", 3), onnx.helper.make_opsetid("", 17)],
    )
    onnx.save(other, tmp_path / "other.onnx")
    assert read_opset(tmp_path / "other.onnx") == 17


@pytest.mark.parametrize("damage", [b"", b"\x00", b"not a model", b"\x42\xff", b"\x42\x04\x0a\x00", b"\xff" * 64])
def test_what_is_no_onnx_model_is_one_sentence(tmp_path, damage):
    (tmp_path / "x.onnx").write_bytes(damage)
    with pytest.raises(BundleError, match="is not an ONNX model"):
        read_opset(tmp_path / "x.onnx")


def test_all_problems_are_told_at_once(bundle):
    changes = {"precision": "bf16", "quantization": {"type": "fp8"}}
    sentence = refusal(bundle, "t4", changes=changes, version="1.0.0")
    assert sentence.count(";") >= 4
    assert "no bf16" in sentence
    assert "no fp8" in sentence
    assert "older than" in sentence


# --- memory


def test_counted_weights_are_those_of_the_demo_checkpoint(demo_folder, bundle):
    """Independent source: the tensors of the checkpoint file."""
    with safe_open(demo_folder / "model.safetensors", "np") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    counts = dict.fromkeys(sizes, 1)
    for name, shape in sizes.items():
        for size in shape:
            counts[name] *= size
    vision = sum(count for name, count in counts.items() if "visual" in name)
    ours = count_weights(bundle.manifest.geometry)
    assert ours["vision"].matrices + ours["vision"].others == vision
    language = ours["language"]
    assert language.matrices + language.table + language.others == sum(counts.values()) - vision
    assert language.table == next(
        count for name, count in counts.items() if name.endswith("language_model.embed_tokens.weight")
    )
    linears = {name: count for name, count in counts.items() if len(sizes[name]) == 2 and "embed" not in name}
    assert ours["vision"].matrices == sum(count for name, count in linears.items() if "visual" in name)
    assert ours["language"].matrices == sum(count for name, count in linears.items() if "visual" not in name)


@pytest.mark.parametrize(("model", "billions"), [("3b", 3.75), ("7b", 8.29), ("32b", 33.45)])
def test_counted_weights_are_those_that_hugging_face_states(model, billions):
    """Qwen2.5-VL model cards (3B 3.75, 7B 8.29, 32B 33.5 billion); lm_head, which is not exported, is in the last two."""
    geometry = KNOWN[model].geometry
    total = sum(part.matrices + part.table + part.others for part in count_weights(geometry).values())
    head = 0 if model == "3b" else geometry.text.vocab * geometry.text.hidden
    assert (total + head) / 1e9 == pytest.approx(billions, rel=0.01)


def known(bundle, model, **changes):
    return {"geometry": KNOWN[model].geometry, "precision": "bf16", "limits": Limits(), **changes}


def test_seven_billion_fit_an_agx_orin_64gb_and_an_a100(bundle):
    kit = {"flavour": "tensorrt", "version": None, "builds_here": False}
    for target in ("orin", "a100", "h100", "thor"):
        preflight(bundle, target, changes=known(bundle, "7b"), **kit)


def test_this_machines_memory_is_what_counts_when_it_builds(bundle, monkeypatch):
    monkeypatch.setattr("metaembed.export.memory_check.available_memory", lambda swap: 9 * GIB)
    assert "this machine has 9.0 GiB free" in refusal(bundle, "a100", changes=known(bundle, "3b"))
    monkeypatch.setattr("metaembed.export.memory_check.available_memory", lambda swap: 15 * GIB)
    preflight(bundle, "a100", changes=known(bundle, "3b"))


def test_a_full_disk_is_known_beforehand(bundle, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1 << 20))
    assert "the plans take about" in refusal(bundle, "a100")


@pytest.mark.parametrize(
    ("model", "precision", "graph", "profiles", "measured"),
    [
        ("3b", "bf16", "vision", 0, 2_039_076_864),
        ("3b", "bf16", "language", 1, 1_116_533_248),
        ("3b", "bf16", "language", 2, 583_598_592),
        ("demo", "fp32", "vision", 0, 13_537_841_152),
        ("demo", "fp32", "language", 1, 758_714_880),
    ],
)
def test_estimated_activations_are_what_the_builder_stated(bundle, model, precision, graph, profiles, measured):
    """Stated by TensorRT-RTX 1.7.1 in its log, for plans of these sizes built for compute capability 8.0."""
    geometry = bundle.manifest.geometry if model == "demo" else KNOWN[model].geometry
    manifest = replace(bundle.manifest, geometry=geometry, precision=precision)
    side = {0: None, 1: "query", 2: "candidate"}[profiles]
    engines = plan_engines(Sizes.of(manifest), manifest.budgets, side=side)
    chosen = [engine for engine in engines if engine.name == graph]
    assert estimate_build(manifest, chosen, "tensorrt_rtx").activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("budget", "measured"), [(Budget(16, 64), 249_626_624), (Budget(8, 16), 230_465_536)])
def test_estimated_activations_of_the_scorer_are_what_the_builder_stated(bundle, budget, measured):
    """By TensorRT-RTX 1.7.1 in its log, for 128 dims."""
    chunk = chunk_size(MEMORY_BYTES, QUERIES, budget.query, budget.candidate, 128)
    engine = scorer_engine(128, budget.query, QUERIES, {budget.candidate: chunk})
    assert estimate_build(bundle.manifest, [engine], "tensorrt_rtx").activations == pytest.approx(measured, rel=0.05)


def test_a_card_is_not_held_to_what_a_board_with_one_memory_takes(bundle):
    """A server with an L4 and 16 GiB builds 3B: the GPU's copies of the weights lie on the card. 3 to 4 times its language
    weights of 6.173 GB (measured, docs/tensorrt.md) are reported of Jetsons."""
    changes = known(bundle, "3b")
    card, board = (
        preflight(bundle, target, changes=changes, flavour="tensorrt", version=None, builds_here=False).estimate
        for target in ("l4", "agx-orin-64gb")
    )
    assert card.plans == board.plans
    assert card.build_peak < 16 * 2**30
    assert 3 * 6.173e9 < board.build_peak < 4 * 6.173e9


def test_serving_takes_the_activations_of_every_open_engine(bundle):
    engines = plan_engines(Sizes.of(bundle.manifest), BUDGETS)
    single = [estimate_build(bundle.manifest, [engine], "tensorrt_rtx") for engine in engines]
    both = estimate_build(bundle.manifest, engines, "tensorrt_rtx")
    assert both.activations == pytest.approx(sum(one.activations for one in single), abs=2)
    assert both.serving > sum(one.plans + one.activations for one in single)


@pytest.mark.parametrize(
    ("graph", "plan", "peak"), [("vision", 1_359_083_004, 2_349_379_584), ("language", 6_232_459_972, 10_778_550_272)]
)
def test_estimated_plans_and_peaks_are_what_was_measured(bundle, graph, plan, peak):
    """3B, random bf16 weights, built for compute capability 8.0 with TensorRT-RTX 1.7.1: within 1 % and 12 %."""
    manifest = replace(bundle.manifest, **known(bundle, "3b"))
    engines = [engine for engine in plan_engines(Sizes.of(manifest), manifest.budgets) if engine.name == graph]
    estimate = estimate_build(manifest, engines, "tensorrt_rtx")
    assert estimate.plans == pytest.approx(plan, rel=0.01)
    assert estimate.build_peak == pytest.approx(peak, rel=0.12)


def test_int8_halves_the_matrices_and_the_token_table_only(bundle):
    manifest = replace(bundle.manifest, **known(bundle, "7b"))
    engines = plan_engines(Sizes.of(manifest), BUDGETS)
    whole = estimate_build(manifest, engines, "tensorrt_rtx").weights
    matrices = sum(part.matrices for part in count_weights(manifest.geometry).values())
    for quantization, halved in (
        ({"type": "int8"}, matrices),  # as bundles of earlier versions were
        ({"type": "int8", "token_table": "int8"}, matrices + 152_064 * 3584),
    ):
        small = estimate_build(replace(manifest, quantization=quantization), engines, "tensorrt_rtx").weights
        assert whole - small == halved


# --- routes


@pytest.mark.parametrize(
    ("target", "here", "installed", "route"),
    [
        ("a100", None, {"tensorrt_rtx": "1.7"}, "tensorrt_rtx"),
        ("a100", (8, 0), {"tensorrt": "10.13", "tensorrt_rtx": "1.7"}, "tensorrt"),
        ("a100", (8, 0), {"tensorrt_rtx": "1.7"}, "tensorrt_rtx"),
        ("a100", (8, 9), {"tensorrt": "10.13", "tensorrt_rtx": "1.7"}, "tensorrt_rtx"),
        ("orin", None, {"tensorrt_rtx": "1.7"}, "kit"),
        ("orin", None, {}, "kit"),
        ("orin", (8, 7), {"tensorrt": "10.3.0"}, "tensorrt"),
        ("h100", (8, 0), {"tensorrt": "10.3.0"}, "kit"),
    ],
)
def test_engines_are_built_by_the_best_builder_that_reaches_the_target(target, here, installed, route):
    assert choose_route(find_device(target), None, here, installed) == route


@pytest.mark.parametrize(
    ("target", "asked", "here", "installed", "reason"),
    [
        ("a100", None, None, {}, r"tensorrt_rtx is not installed .* pip install 'metaembed-export\[tensorrt-rtx\]'"),
        ("orin", None, (8, 7), {}, "--system-site-packages"),
        ("a100", "tensorrt", None, {"tensorrt": "10.3"}, "this machine has no GPU; --flavour kit"),
        ("a100", "tensorrt", (8, 9), {"tensorrt": "10.3"}, "compute capability 8.9"),
        ("a100", "nope", None, {}, "there is no flavour 'nope'"),
    ],
)
def test_a_route_that_does_not_exist_is_refused_with_the_way_out(target, asked, here, installed, reason):
    with pytest.raises(UsageError, match=reason):
        choose_route(find_device(target), asked, here, installed)


def test_every_device_has_a_route_without_a_gpu():
    routes = {device.name: choose_route(device, None, None, {"tensorrt_rtx": "1.7"}) for device in DEVICES}
    assert {name for name, route in routes.items() if route == "kit"} == {
        *(device.name for device in DEVICES if device.integrated),
        "h100",
        "h200",
        "t4",
    }
