"""metaembed-calibrate end to end on the demo, and every way in which it must refuse to write a bundle."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from metaembed.bench.calibration import plan_int8_weights
from metaembed.calibration import quantise, sensitivity
from metaembed.calibration.cli import main
from metaembed.calibration.dataset import CalibrationSet
from metaembed.calibration.linears import find_linears
from metaembed.calibration.quantise import Quantised, Request, quantise_bundle
from metaembed.calibration.recipe import Recipe
from metaembed.calibration.sensitivity import Found
from metaembed.runtime.budget import Budget
from metaembed.runtime.cli_check import main as check
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import BundleError, ParityError, UsageError
from metaembed.runtime.manifest import Bundle, cpu_graph, write_manifest
from metaembed.runtime.tensors import TOKEN_TABLE


@pytest.fixture(scope="module")
def int8(
    small_bundle: Path, calibration_set: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Quantised]:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return folder, quantise_bundle(small_bundle, Request(type="int8", data=calibration_set, threads=1), folder)


@pytest.fixture(scope="module")
def bf16_bundle(narrow_demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in bf16, which every GPU deployment quantises, at one budget. Nothing here is judged by Hugging Face."""
    folder = shutil.copytree(narrow_demo("bf16"), tmp_path_factory.mktemp("bf16") / "bundle")
    write_manifest(folder, replace(Bundle.open(folder).manifest, budgets=(Budget(4, 8),)))
    return folder


def test_an_int8_bundle_passes_its_own_check(int8, capsys):
    folder, done = int8
    assert done.check
    assert done.verdict
    assert check([str(folder), "--quiet"]) == 0
    assert "within the int8 tolerance" in capsys.readouterr().out


def test_the_manifest_says_what_was_quantised_and_on_which_data(int8, small_bundle, calibration_set):
    folder, done = int8
    quantization = Bundle.open(folder).manifest.quantization
    assert quantization["type"] == "int8"
    assert quantization["share_of_linear_multiplies"] == pytest.approx(done.recipe.share)
    assert quantization["calibration"]["sha256"] == calibration_set.sha256
    assert quantization["source_fingerprint"] == Bundle.open(small_bundle).manifest.fingerprint


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_bf16_bundle_is_quantised_and_its_float32_twins_keep_the_ranking(
    bf16_bundle, calibration_set, tmp_path, form
):
    """The deployed graphs and the twins that ranges are observed on do not name their tensors alike. Expected: the float
    bundle's own embeddings; everything is quantised, which costs more than the tolerance of a searched recipe."""
    quantise_bundle(
        bf16_bundle, Request(type=form, data=calibration_set, judge=False, threads=1), tmp_path / "quantised"
    )
    texts = ["a red umbrella", "a green star and a blue anchor", "Which page is it?"]
    with Encoder.open(tmp_path / "quantised", threads=1) as found, Encoder.open(bf16_bundle, threads=1) as wanted:
        for side in ("encode_queries", "encode_candidates"):
            cosines = (getattr(found, side)(texts) * getattr(wanted, side)(texts)).sum(-1)
            assert cosines.min() > 0.95
            assert cosines.min() < 0.99999  # something was rounded
    for name in ("vision.onnx", "language.onnx"):
        types = [
            value.dtype.name
            for value in ir.load(tmp_path / "quantised" / name).graph.initializers.values()
            if value.name.endswith("weight_scale")
        ]
        assert types
        assert set(types) == {"BFLOAT16"}
    if form == "int8":  # what docs/calibration.md says of the large models by the same arithmetic
        files = (tmp_path / "quantised/weights").iterdir()
        stored = sum(array.nbytes for file in files for array in load_file(file).values())
        planned = plan_int8_weights(Bundle.open(bf16_bundle).manifest.geometry)
        assert stored == planned["int8_bytes"]
        assert planned["ratio"] < 0.55


def test_twins_that_hold_other_linears_are_refused(bf16_bundle, calibration_set, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bf16_bundle, folder)
    manifest = Bundle.open(folder).manifest
    twin = folder / cpu_graph("language.onnx")
    model = ir.load(twin)
    linear = next(find_linears(model))
    same = ir.node("Identity", [linear.matmul.inputs[1]])
    model.graph.insert_before(linear.matmul, same)
    linear.matmul.replace_input_with(1, same.outputs[0])
    ir.save(model, twin)
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match="twins do not hold the same Linears"):
        quantise_bundle(folder, Request(type="int8", data=calibration_set, judge=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_a_quarter_of_fp32_and_no_float_copy_travels_along(int8, small_bundle):
    """Counted from the source's own header: each quantised weight has one byte an element, and is nowhere else."""
    folder, done = int8
    assert done.recipe.share >= 0.9
    source = load_file(next((small_bundle / "weights").iterdir()))
    shapes = {name.split("model.", 1)[-1] if name.startswith("model.") else name: x.shape for name, x in source.items()}
    codes = load_file(folder / "weights/int8-01.safetensors")
    high = load_file(folder / "weights/high-01.safetensors")
    kept = {name for name in high if not name.endswith("_scale")}
    assert shapes.keys() == {name.removesuffix("_quantised") for name in codes} | kept  # every parameter, once
    for name, array in codes.items():
        weight = name.removesuffix("_quantised")
        turned = 1 if weight == TOKEN_TABLE else -1  # Linears: (in, out), see test_qdq's count of bytes kept per code
        assert array.shape == shapes[weight][::turned]
        assert weight not in high
    assert sorted(path.name for path in (folder / "weights").iterdir()) == [
        "high-01.safetensors",
        "int8-01.safetensors",
    ]


def test_a_recipe_replays_to_the_same_bundle(int8, small_bundle, tmp_path):
    folder, _ = int8
    again = ["--quantize", "int8", "--recipe", str(folder / "recipe.json"), "-o", str(tmp_path / "again"), "--quiet"]
    assert main([str(small_bundle), *again]) == 0
    assert Bundle.open(tmp_path / "again").manifest.fingerprint == Bundle.open(folder).manifest.fingerprint


def test_a_smaller_budget_is_a_prefix_of_a_larger_one_in_int8_too(int8):
    """Static ranges keep the property that dynamic ones would break: every row is rounded on its own."""
    with Encoder.open(int8[0], threads=1) as encoder:
        texts = ["a red umbrella", "a green star and a blue anchor"]
        large = encoder.encode_candidates(texts, budget=16)
        np.testing.assert_allclose(encoder.encode_candidates(texts, budget=4), large[:, :4], atol=1e-5)


def test_integer_kernels_give_what_the_exact_simulation_gives(int8):
    """ONNX Runtime's integer products against Q/DQ computed in floating point, without fusing anything.

    Sums differ in their last bits, and now and then one lies where rounding turns, so that a few vectors differ more. Kernels
    that saturate (those for VNNI, on a processor without) move them all.
    """
    from metaembed.calibration.sessions import ExactSession

    folder, _ = int8
    models = [ir.load(folder / name) for name in ("vision.onnx", "language.onnx")]
    exact = Encoder(Bundle.open(folder), *(ExactSession(model, folder, threads=1) for model in models))
    with Encoder.open(folder, threads=1) as encoder, exact:
        texts = [
            "a red umbrella",
            "a green star",
            "Which page is it?",
            "two knights and a queen",
            "pink telephone",
            "x",
        ]
        cosines = (encoder.encode_queries(texts) * exact.encode_queries(texts)).sum(-1)
        assert np.median(cosines) > 0.9999
        assert cosines.min() > 0.99


def edited(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, groups=tuple(replace(group, **changes) for group in recipe.groups))


def test_a_bundle_that_fails_its_own_check_is_never_written(int8, small_bundle, tmp_path):
    """Ranges a thousand times too small clip everything."""
    ruined = edited(int8[1].recipe, amax=1e-3)
    with pytest.raises(ParityError, match="fails its own check and was not written"):
        quantise_bundle(small_bundle, Request(type="int8", recipe=ruined, threads=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.recipe.json"]


def test_the_recipe_that_a_failed_check_proposes_passes(
    int8, small_bundle, calibration_set, tmp_path, monkeypatch, capsys
):
    """A group's range is a thousand times too small, and the search, which is tested on its own, says that all is well."""
    group = int8[1].recipe.groups[-1].name
    groups = tuple(
        replace(entry, cost=None, amax=entry.amax / (1000 if entry.name == group else 1))
        for entry in int8[1].recipe.groups
    )
    ruined = replace(int8[1].recipe, groups=groups)
    monkeypatch.setattr("metaembed.calibration.sensitivity.search", lambda *_, **__: Found(ruined, int8[1].verdict, 1))
    with pytest.raises(ParityError, match="with which a simulation passes: metaembed-calibrate BUNDLE") as failed:
        quantise_bundle(small_bundle, Request(type="int8", data=calibration_set, threads=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.recipe.json"]
    assert group in Recipe.load(tmp_path / "out.recipe.json").high
    words = shlex.split(str(failed.value).split("metaembed-calibrate BUNDLE ")[1])
    assert main([str(small_bundle), *words, "-o", str(tmp_path / "out"), "--quiet"]) == 0


def test_too_small_a_share_fails_and_names_the_nearest_recipe(
    int8, small_bundle, calibration_set, tmp_path, monkeypatch
):
    """The search itself is tested on its own; here, what the command says when it comes back with too little."""
    recipe = int8[1].recipe
    half = recipe.quantising([group.name for group in recipe.groups[::2]])
    monkeypatch.setattr(sensitivity, "search", lambda *args, **how: sensitivity.Found(half, int8[1].verdict, 1))
    monkeypatch.setattr(quantise, "draft_recipe", lambda *args: recipe)
    with pytest.raises(
        ParityError, match=r"kept high .* below 90\.0%\. The nearest recipe that passes is .*recipe\.json"
    ):
        quantise_bundle(small_bundle, Request(type="int8", data=calibration_set, threads=1), tmp_path / "out")
    assert Recipe.load(tmp_path / "out.recipe.json") == half
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_too_small_a_share_is_refused_for_what_it_says(int8, small_bundle, tmp_path):
    recipe = int8[1].recipe
    half = recipe.quantising([group.name for group in recipe.groups[1:]])
    with pytest.raises(ParityError, match=rf"the recipe keeps 1 of {len(recipe.groups)} groups high.* below 100\.0%"):
        quantise_bundle(small_bundle, Request(type="int8", recipe=half, min_share=1, threads=1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "nothing"}, "does not name the Linears that read it"),
        ({"linears": ("nothing",)}, "does not name the Linears that read it"),
        ({"exponents": (1, 2)}, "has 2 exponents, not"),
    ],
)
def test_a_smoothing_that_does_not_fit_is_refused(int8, small_bundle, tmp_path, change, sentence):
    recipe = int8[1].recipe
    assert recipe.smoothings
    edited = replace(recipe, smoothings=(replace(recipe.smoothings[0], **change), *recipe.smoothings[1:]))
    with pytest.raises(UsageError, match=sentence):
        quantise_bundle(small_bundle, Request(type="int8", recipe=edited, threads=1), tmp_path / "out")


def test_a_smoothing_that_is_there_twice_is_refused(int8, small_bundle, tmp_path):
    recipe = int8[1].recipe
    edited = replace(recipe, smoothings=(*recipe.smoothings, recipe.smoothings[0]))
    with pytest.raises(UsageError, match="smooths .* twice"):
        quantise_bundle(small_bundle, Request(type="int8", recipe=edited, threads=1), tmp_path / "out")


def test_the_structure_of_a_bundle_in_two_steps_is_sound(int8, small_bundle, tmp_path, capsys):
    """ONNX Runtime does not open such graphs without folding constants."""
    twice = int8[1].recipe.quantising_twice([group.name for group in int8[1].recipe.groups[::3]])
    twice.save(tmp_path / "recipe.json")
    arguments = ["--quantize", "int8", "--recipe", str(tmp_path / "recipe.json"), "--no-judge", "--quiet"]
    assert main([str(small_bundle), *arguments, "-o", str(tmp_path / "out")]) == 0
    assert check([str(tmp_path / "out"), "--structure", "--quiet"]) == 0


def test_nan_in_a_weight_is_named_and_nothing_is_written(small_bundle, calibration_set, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(small_bundle, folder)
    path = next((folder / "weights").iterdir())
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    order = {key: value.copy() for key, value in tensors.items()}
    order[name][3, 5] = np.nan
    data = bytearray(path.read_bytes())
    place = data.find(tensors[name].tobytes())
    data[place : place + tensors[name].nbytes] = order[name].tobytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(data)
    write_manifest(folder, Bundle.open(folder, verify=False).manifest)
    with pytest.raises(
        BundleError,
        match=r"up_proj\.weight in \S+/model.safetensors holds 1 values that are NaN",
    ):
        quantise_bundle(folder, Request(type="int8", data=calibration_set), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_bundle_is_not_quantised_again(int8, calibration_set, tmp_path):
    with pytest.raises(UsageError, match="is quantised already"):
        quantise_bundle(int8[0], Request(type="int8", data=calibration_set), tmp_path / "out")


def test_a_recipe_of_another_type_is_refused(int8):
    with pytest.raises(UsageError, match="the recipe is for int8, and fp8 was asked for"):
        Request(type="fp8", recipe=int8[1].recipe)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give one of them"),
        (["--data", "demo", "--recipe", "none.json"], "none.json cannot be read"),
        (["--data", ""], "--data is empty, perhaps an unset variable"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl is missing"),
        (["--data", "demo", "--samples", "3"], "at least 16"),
        (["--data", "demo", "--min-share", "2"], "not between 0 and 1"),
        (["--recipe", "r.json", "--samples", "20", "--no-smoothing"], "--samples, --no-smoothing would say how"),
    ],
)
def test_a_wrong_request_is_one_sentence(small_bundle, tmp_path, capsys, arguments, sentence):
    code = main([str(small_bundle), "--quantize", "int8", "-o", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_of_one_image_is_one_sentence_through_the_command(small_bundle, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "data/one.png")
    data = ["--data", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([str(small_bundle), "--quantize", "int8", *data]) == 2
    assert "gives 1 distinct, readable query inputs" in capsys.readouterr().err
    assert json.loads((small_bundle / "bundle.json").read_text())["quantization"] is None


def test_a_bundle_that_nothing_judged_says_so(small_bundle, calibration_set, tmp_path, capsys):
    """A rehearsal with random weights has no ranking to keep; a bundle without a verdict must never pass for a checked one."""
    done = quantise_bundle(small_bundle, Request(type="int8", data=calibration_set, judge=False), tmp_path / "out")
    assert done.verdict is None
    assert done.check is None
    assert done.recipe.share == pytest.approx(1.0)
    assert Bundle.open(tmp_path / "out").unverified
    again = ["--quantize", "int8", "--recipe", str(tmp_path / "out/recipe.json"), "--no-judge"]
    assert main([str(small_bundle), *again, "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert "UNVERIFIED" in capsys.readouterr().out
    assert Bundle.open(tmp_path / "again").unverified
