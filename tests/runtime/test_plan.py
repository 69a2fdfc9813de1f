"""Costs against hand counts, MetaEmbed's published table and PyTorch's own FLOP counter over the HF model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime.budget import Budget, parse_budgets
from metaembed.runtime.cli_plan import main, parse_count
from metaembed.runtime.cost import (
    activation_bytes,
    encoder_flops,
    index_bytes,
    language_flops,
    scoring_flops,
    vision_flops,
    weight_bytes,
    weight_bytes_read,
)
from metaembed.runtime.devices import DEVICES, find_device
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.plan import find_geometry, make_plan, measure_padding
from metaembed.runtime.plan_device import bound_times, fit_device

GEOMETRY_7B = KNOWN["7b"].geometry
ALL = parse_budgets(["all"], 16, 64)
GIB = 2**30


@pytest.mark.parametrize(
    ("budget", "gflops", "gib"),
    [("1,1", 0.71, 0.68), ("2,4", 5.73, 2.67), ("4,8", 22.94, 5.34), ("8,16", 91.75, 10.68), ("16,64", 733.89, 42.72)],
)
def test_scoring_and_index_are_those_that_metaembed_reports(budget, gflops, gib):
    """Expected: 7B, 100,000 candidates, arXiv 2509.18095; its 0.71 and 0.68 are rounded by up to 2 %."""
    budget = Budget.parse(budget)
    assert scoring_flops(GEOMETRY_7B, budget, 100_000) / 1e9 == pytest.approx(gflops, rel=0.01 if gflops < 1 else 1e-3)
    assert index_bytes(GEOMETRY_7B, budget.candidate, 100_000) / GIB == pytest.approx(
        gib, rel=0.02 if gib < 1 else 1e-3
    )


def test_int8_index_keeps_a_scale_per_vector():
    assert index_bytes(GEOMETRY_7B, 16, 3, "int8") == 3 * 16 * (3584 + 4)


def tiny(layers=2, depth=4, blocks=(1,)):
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 72,
        "vocab_size": 301,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_config": {
            "depth": depth,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 40,
            "out_hidden_size": 48,
            "fullatt_block_indexes": list(blocks),
        },
    }


def count_by_torch(config, run):
    """FLOPs of matrix products and convolutions by module, from torch.utils.flop_counter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**config, attn_implementation="eager")).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(torch, model)
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def test_language_flops_are_those_of_the_hf_decoder():
    """Expected: torch's counter over HF's layers; HF answers at every position, so answers = positions."""
    config = tiny(layers=3)
    counts = count_by_torch(config, lambda torch, model: model.language_model(inputs_embeds=torch.zeros(1, 11, 48)))
    layers = [count for name, count in counts.items() if re.fullmatch(r".*\.layers\.\d+", name)]
    assert len(layers) == 3
    assert sum(layers) == language_flops(Geometry.from_config(config).text, positions=11, answers=11)


def test_vision_flops_are_those_of_the_hf_tower():
    """Expected: torch's counter over HF's blocks, merger and patch embedding, for four whole windows."""
    config = tiny()

    def run(torch, model):
        model.visual(torch.zeros(256, 1176), grid_thw=torch.tensor([[1, 16, 16]]))

    counts = count_by_torch(config, run)
    parts = [n for name, n in counts.items() if re.fullmatch(r".*\.(blocks\.\d+|patch_embed|merger)", name)]
    assert len(parts) == 6
    assert sum(parts) == vision_flops(Geometry.from_config(config).vision, patches=256)


def test_last_layer_is_computed_for_the_answers_alone():
    """Expected: by hand for one layer of 2 x 2 matrices' worth: k and v for all, q, o, MLP and attention for r rows."""
    geometry = Geometry.from_config(tiny(layers=1))
    t, r, h, kv, i = 11, 5, 48, 16, 72
    by_hand = t * 2 * (2 * h * kv) + r * 2 * (h * h + h * h + 3 * h * i) + r * 4 * t * h
    assert language_flops(geometry.text, positions=t, answers=r) == by_hand


def test_projection_and_image_are_counted():
    config = tiny() | {"dim": 7}
    plain, projected = Geometry.from_config(tiny()), Geometry.from_config(config)
    sizes = {"text_tokens": 4, "image_tokens": 0, "meta_tokens": 3, "answers": 3}
    assert encoder_flops(projected, **sizes).total - encoder_flops(plain, **sizes).total == 2 * 3 * 48 * 7
    assert encoder_flops(plain, **sizes).vision == 0
    with_image = encoder_flops(plain, **sizes | {"image_tokens": 64})
    assert with_image.vision == vision_flops(plain.vision, 256)
    assert with_image.language == language_flops(plain.text, 71, 3)


def test_a_query_image_of_7b_costs_about_20_tflop():
    """Expected: 2 x parameters x tokens as a check of magnitude: 6.5 G x 1,116 and 0.63 G x 4,096, plus attention."""
    flops = encoder_flops(GEOMETRY_7B, text_tokens=12, image_tokens=1024, meta_tokens=80, answers=64)
    assert flops.language == pytest.approx(2 * 6.525e9 * 1116, rel=0.04)
    assert flops.vision == pytest.approx(2 * 0.63e9 * 4096, rel=0.12)


def test_weight_bytes_follow_the_precision():
    """Expected: by hand from the parameters; int8 halves what lies in the Linears of layers and blocks."""
    parameters, layer = 7_747_456_000, 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    block = 4 * 1280**2 + 3 * 1280 * 3420
    assert weight_bytes(GEOMETRY_7B, "bf16") == weight_bytes(GEOMETRY_7B, "fp16") == 2 * parameters
    assert weight_bytes(GEOMETRY_7B, "fp32") == 4 * parameters
    assert weight_bytes(GEOMETRY_7B, "int8") == 2 * parameters - 28 * layer - 32 * block


def test_weights_read_leave_out_the_token_table_and_without_image_the_tower():
    vision, table = 676_550_144, 152_064 * 3584
    with_image, text = (weight_bytes_read(GEOMETRY_7B, "bf16", image=image) for image in (True, False))
    assert with_image - text == 2 * vision
    assert weight_bytes(GEOMETRY_7B, "bf16") - with_image == 2 * table


def test_activation_of_a_7b_position_is_135_kb():
    """Expected: measured once with TensorRT-RTX, two layers of 7B width: about 135 KB per position."""
    assert activation_bytes(GEOMETRY_7B, positions=1, patches=0) == pytest.approx(135_000, rel=0.01)


@pytest.mark.parametrize(("pixels", "ratio"), [("icon", 4.0), ("thumbnail", 1.0), ("banner", None)])
def test_padding_is_whole_windows_over_patches(pixels, ratio):
    """Expected: by hand: 4 x 4 patches in one window of 64; 16 x 16 in four, full; ratio >= 1 for any other."""
    row = next(row for row in measure_padding(1024) if row.name == pixels)
    assert row.ratio >= 1
    if ratio is not None:
        assert row.ratio == ratio


def test_plan_scales_with_candidates_and_batch():
    small, large = (make_plan("7b", GEOMETRY_7B, ALL, n, batch=b) for n, b in ((10, 1), (70, 3)))
    for one, many in zip(small.budgets, large.budgets, strict=True):
        assert (many.scoring_flops, many.index_bytes) == (7 * one.scoring_flops, 7 * one.index_bytes)
    assert large.activation_bytes == 3 * small.activation_bytes
    assert [cost.positions for cost in small.inputs] == [48, 156, 348, 1116]


def test_fit_is_the_widest_type_that_the_device_has_and_holds():
    """Expected: 61 GiB of 32B weights: bf16 on an 80 GB card, fp8 where the hardware has it, int8 on Ampere."""
    plan = make_plan("32b", KNOWN["32b"].geometry, ALL, 1)
    fits = {device.name: fit_device(plan, device) for device in DEVICES}
    assert fits["a100-80gb"].precision == "bf16"
    assert fits["a100-40gb"].precision == "int8"
    assert fits["orin-nano-4gb"].precision is None
    assert fits["orin-nano-4gb"].left_bytes < 0
    for fit in fits.values():
        for budget, candidates in fit.candidates.items():
            vectors = Budget.parse(budget).candidate
            assert index_bytes(plan.geometry, vectors, candidates) <= fit.left_bytes
            assert index_bytes(plan.geometry, vectors, candidates + 1) > fit.left_bytes


def test_lower_bounds_are_bytes_over_bandwidth_or_operations_over_peak():
    """Expected: by hand from the A100's 2,039 GB/s and 312 TFLOP/s."""
    a100 = find_device("a100")
    plan = make_plan("7b", GEOMETRY_7B, ALL, 100_000)
    bounds = {bound.what: bound for bound in bound_times(plan, a100, fit_device(plan, a100))}
    assert bounds["score at 16,64"].milliseconds == pytest.approx(45.8752e9 / 2039e9 * 1e3)
    assert bounds["score at 16,64"].bound_by == "memory"
    assert bounds["encode image of 1024 tokens"].milliseconds == pytest.approx(plan.inputs[-1].flops.total / 312e9)
    assert bounds["encode image of 1024 tokens"].bound_by == "compute"
    assert bounds["encode text query"].bound_by == "memory"


def test_index_that_does_not_fit_is_marked():
    plan = make_plan("7b", GEOMETRY_7B, ALL, 10**7)
    orin = find_device("orin-64gb")
    marked = [bound.what for bound in bound_times(plan, orin, fit_device(plan, orin)) if "does not fit" in bound.what]
    assert [what.split(" ")[2] for what in marked] == ["1,1", "2,4", "4,8", "8,16", "16,64"]


def test_geometry_is_found_in_a_checkpoint_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    assert find_geometry(str(tmp_path)) == Geometry.from_config(tiny())
    assert find_geometry("7B") == GEOMETRY_7B


@pytest.mark.parametrize("content", ["{", "[]", '"7b"', "\udcff"])
def test_damaged_config_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises((BundleError, UsageError), match=r"config\.json"):
        find_geometry(str(tmp_path))


def test_candidates_may_be_written_as_powers():
    assert [parse_count(text) for text in ("100000", "1e5", "1e8")] == [100_000, 100_000, 100_000_000]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "8b"], "none of demo, 3b, 7b, 32b"),
        (["--model", "7b", "--candidates", "many"], "whole number"),
        (["--model", "7b", "--candidates", "1.5"], "whole number"),
        (["--model", "7b", "--candidates", "nan"], "whole number"),
        (["--model", "7b", "--candidates", "inf"], "whole number"),
        (["--model", "7b", "--candidates", "0"], "whole number"),
        (["--model", "7b", "--budget", "32,64"], "this model has 16"),
        (["--model", "7b", "--device", "abacus"], "abacus"),
        (["--model", "7b", "--batch", "0"], "at least one"),
        (["--model", "7b", "--max-image-tokens", "-1"], "at least one"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(capsys, arguments, word):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("tokens", ["1", "3", "10"])
def test_limits_below_the_typical_images_leave_those_out(capsys, tokens):
    """By hand: 1,600 x 100 pixels keep their aspect ratio in no fewer than 12 tokens."""
    assert main(["--model", "7b", "--max-image-tokens", tokens]) == 0
    assert "1600 x 100" not in capsys.readouterr().out


def test_command_prints_the_published_numbers(capsys):
    assert main(["--model", "7b"]) == 0
    printed = capsys.readouterr().out
    for number in ("7,747,456,000", "20.210", "5.73", "22.94", "91.75", "10.68", "42.72"):
        assert number in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_command_as_json_and_for_one_device(capsys):
    assert main(["--model", "3b", "--budget", "8,16", "--candidates", "1e6", "--device", "orin-64gb", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budgets"][0]["index_bytes"] == 2 * 16 * 2048 * 10**6
    assert data["devices"][0]["precision"] == "bf16"
    assert main(["--model", "7b", "--device", "thor"]) == 0
    assert np.isfinite(float(capsys.readouterr().out.split("encode text query")[-1].split()[0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "orin-nano-4gb"], "does not fit"),
        (["--device", "orin-nano-4gb", "--json"], '"precision": null'),
        (["--device", "orin-nano-4gb", "--latency-ms", "100"], "GiB too much"),
        (["--device", "orin-nano-4gb", "--latency-ms", "100", "--json"], '"chosen": null'),
        (["--batch", "100000"], "lacks"),  # on every known device
    ],
)
def test_a_plan_in_which_nothing_fits_is_printed_and_exits_with_1(capsys, arguments, words):
    assert main(["--model", "32b", *arguments]) == 1
    captured = capsys.readouterr()
    assert words in captured.out
    assert not captured.err


def test_the_demo_is_known_by_name(demo_folder: Path, capsys: pytest.CaptureFixture[str]):
    """Expected: the config.json that the export package ships."""
    assert find_geometry("demo") == find_geometry(str(demo_folder))
    assert main(["--model", "demo"]) == 0
    assert "demo" in capsys.readouterr().out
