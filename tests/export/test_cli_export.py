"""metaembed-export as a stranger misuses it: exit code, one sentence, and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from metaembed.export import build as build_module
from metaembed.export import bundle as bundle_module
from metaembed.export.cli import main
from metaembed.export.memory import count_weights
from metaembed.runtime.errors import ParityError
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.memory import GIB


@pytest.fixture
def checkpoint(demo_folder: Path, tmp_path: Path) -> Path:
    """A copy of the demo checkpoint, to break."""
    return Path(shutil.copytree(demo_folder, tmp_path / "checkpoint"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """In a folder of its own, so that leftovers show."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def refused(output: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, expect this exit code and nothing left; return the sentence."""

    def run(code: int, *argv: object) -> str:
        capsys.readouterr()
        try:
            found = main([*map(str, argv), "-o", str(output), "--quiet"])
        except SystemExit as leaving:  # argparse's own refusals
            found = leaving.code
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert captured.out == ""
        assert captured.err.startswith("metaembed-export: ")
        assert captured.err.count("\n") == 1, captured.err
        assert not list(output.parent.iterdir())
        return captured.err

    return run


@pytest.mark.parametrize("budget", ["0,4", "17,64", "16,65", "8", "", "8,16,1", "a,b", "8.5,16", "-1,4"])
def test_a_wrong_budget(refused: Callable[..., str], budget: str):
    assert "budget" in refused(2, "--model", "demo", f"--budget={budget}")


@pytest.mark.parametrize("model", ["no-such-model", "/nowhere", "../nowhere", "org/model"])
def test_an_unknown_model(refused: Callable[..., str], model: str):
    assert model in refused(2, "--model", model, "--budget", "8,16")


def test_a_folder_that_is_no_checkpoint(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(2, "--model", tmp_path / "empty", "--budget", "8,16")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--model", "demo"),
        ("--budget", "8,16"),
        ("--model", "demo", "--budget", "8,16", "--precision", "int4"),
        ("--model", "demo", "--budget", "8,16", "--random-weights=-1"),
        ("--x",),
    ],
    ids=" ".join,
)
def test_arguments_that_are_missing_or_unknown(refused: Callable[..., str], argv: tuple[str, ...]):
    refused(2, *argv)


@pytest.mark.parametrize("target", ["a100", "orin"])
def test_fp8_for_a_device_without_it_is_refused_before_anything_else_is_looked_at(
    refused: Callable[..., str], target: str
):
    """Neither a budget nor data is given: nothing was read."""
    assert "no fp8 hardware" in refused(2, "--model", "demo", "--quantize", "fp8", "--target", target)


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with TensorRT-RTX and memory, without a GPU."""
    monkeypatch.setattr(build_module, "find_gpu", lambda: None)
    monkeypatch.setattr(build_module, "installed_versions", lambda: {"tensorrt_rtx": "1.7.1"})
    monkeypatch.setattr("metaembed.export.memory_check.available_memory", lambda swap: 999 * GIB)
    return monkeypatch


@pytest.fixture
def builder(equipped: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The same, where nothing is exported."""
    equipped.setattr(bundle_module, "export_bundle", lambda *_, **__: pytest.fail("it was exported"))
    return equipped


DRY = pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["export", "dry-run"])


@DRY
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("--model", "demo", "--target", "orin-nano"),
            "serving takes about 14.4 GiB and Jetson Orin Nano 8 GB has 7.2 GiB",
        ),
        (("--model", "demo", "--target", "a100", "--target", "orin-nano"), "Jetson Orin Nano 8 GB has 7.2 GiB"),
        (("--model", "7b", "--target", "orin-nano", "--precision", "bf16"), "Jetson Orin Nano 8 GB has 7.2 GiB"),
        (("--model", "7b", "--target", "l4"), "NVIDIA L4 has 24.0 GiB"),
        (("--model", "32b", "--target", "orin", "--precision", "bf16"), "Jetson AGX Orin 64 GB has 57.6 GiB"),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_target_that_cannot_hold_the_model_is_refused_before_the_export(
    refused: Callable[..., str], builder: pytest.MonkeyPatch, dry: tuple[str, ...], argv: tuple[str, ...], words: str
):
    """The sentence that metaembed-build has for the exported bundle."""
    assert words in refused(2, "--budget", "8,16", "--random-weights", "0", *argv, *dry)


@DRY
def test_a_target_whose_build_does_not_fit_here_is_refused_before_the_export(
    refused: Callable[..., str], builder: pytest.MonkeyPatch, dry: tuple[str, ...]
):
    builder.setattr("metaembed.export.memory_check.available_memory", lambda swap: 9 * GIB)
    command = ("--model", "3b", "--random-weights", "0", "--precision", "bf16", "--target", "l4", "--budget", "8,16")
    assert "this machine has 9.0 GiB free" in refused(2, *command, *dry)


@DRY
def test_a_builder_that_is_missing_is_known_before_the_export(
    refused: Callable[..., str], builder: pytest.MonkeyPatch, dry: tuple[str, ...]
):
    builder.setattr(build_module, "installed_versions", dict)
    sentence = refused(2, "--model", "demo", "--budget", "8,16", "--target", "a100", *dry)
    assert "tensorrt_rtx is not installed" in sentence


@DRY
@pytest.mark.parametrize("force", [(), ("-f",)], ids=["plain", "force"])
@pytest.mark.parametrize("kind", ["stranger", "kit"])
def test_a_taken_kit_folder_is_known_before_the_export(
    output: Path,
    builder: pytest.MonkeyPatch,
    demo_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    dry: tuple[str, ...],
    force: tuple[str, ...],
    kind: str,
):
    kit = output.with_name("out-kit-agx-orin-64gb")
    kit.mkdir()
    (kit / "bundle.json").write_text("{}" if kind == "stranger" else (demo_bundle / "bundle.json").read_text())
    command = ["--model", "demo", "--budget", "8,16", "--target", "orin", "-o", str(output), "--quiet", *dry, *force]
    if kind == "kit" and force:  # it may be replaced
        command += () if dry else ("--dry-run",)
        assert main(command) == 0
        return
    assert main(command) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert str(kit) in told.err
    assert [path.name for path in output.parent.iterdir()] == [kit.name]


def test_several_targets_in_one_word_are_told_apart(refused: Callable[..., str]):
    sentence = refused(2, "--model", "demo", "--budget", "8,16", "--target", "A100,l4")
    assert "repeat --target: --target A100 --target l4" in sentence


@pytest.mark.parametrize(
    ("argv", "stored", "matrix", "other"),
    [
        (("--target", "h200"), "fp32", 4, 4),
        (("--target", "h200", "--precision", "bf16"), "bf16", 2, 2),
        (("--target", "h200", "--precision", "bf16", "--quantize", "int8", "--data", "demo"), "int8 over bf16", 1, 2),
        (("--target", "h200", "--quantize", "int8", "--data", "demo"), "int8 over fp32", 1, 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_dry_run_sizes_the_index_beside_the_type_that_is_asked_for(
    output: Path,
    builder: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    stored: str,
    matrix: int,
    other: int,
):
    """By hand: nine tenths of 141 GiB, less the weights, hold so many candidates of 16 x 3584 in bf16; activation is 0.5 %."""
    assert main(["--model", "7b", "--budget", "8,16", "--dry-run", "-o", str(output), *argv]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert " ".join(last[2:-1]) == stored
    counts = count_weights(KNOWN["7b"].geometry).values()
    weights = sum(matrix * (part.matrices + part.table) + other * part.others for part in counts)
    expected = (0.9 * 141 * GIB - weights) / (16 * 3584 * 2)
    assert int(last[-1].replace(",", "")) == pytest.approx(expected, rel=0.01)


def test_a_dry_run_names_the_devices_without_hardware_for_the_type(output: Path, capsys: pytest.CaptureFixture[str]):
    """A T4 has no bf16, an A100 no FP8 (TensorRT's support matrix)."""
    command = ["--model", "7b", "--budget", "8,16", "--dry-run", "-o", str(output)]
    assert main([*command, "--precision", "bf16", "--quantize", "fp8", "--data", "demo"]) == 0
    rows = {line.split()[0]: line.split()[2:] for line in capsys.readouterr().out.splitlines() if line[:1].isalnum()}
    assert rows["t4"] == ["no", "bf16", "-"]
    assert rows["a100-80gb"] == ["no", "fp8", "-"]
    assert rows["l4"][:3] == ["fp8", "over", "bf16"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--quantize", "int8"), ("--data", "JSONL", "demo")),
        (("--quantize", "fp8"), ("--data", "JSONL", "demo")),
        (("--data", "demo"), ("--quantize int8", "--quantize fp8")),
        (("--quantize", "int8", "--data", "nowhere.jsonl"), ("nowhere.jsonl is missing",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_quantising_without_its_data_or_data_without_quantising(
    refused: Callable[..., str], argv: tuple[str, ...], words: tuple[str, ...]
):
    sentence = refused(2, "--model", "demo", "--budget", "8,16", *argv)
    assert all(word in sentence for word in words)


def test_failed_quantisation_leaves_neither_bundle(refused: Callable[..., str], cheap: pytest.MonkeyPatch):
    """The float bundle is written, beside the output; calibration then finds no graph in it."""
    sentence = refused(1, "--model", "demo", "--budget", "8,16", "--no-parity", "--quantize", "int8", "--data", "demo")
    assert "vision.onnx" in sentence


@pytest.mark.parametrize(("asked", "held"), [("4096", 1024), ("1024", 1024), ("100", 100)])
def test_more_image_tokens_than_the_checkpoints_processor_makes_are_not_promised(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: str, held: int
):
    """The demo's preprocessor_config.json has max_pixels = 1024 * 28 * 28: engines built for more would never see it."""
    monkeypatch.setattr(bundle_module, "write_graphs", lambda *_: None)  # slow, and not asked about here
    command = ["--model", "demo", "--budget", "1,1", "--max-image-tokens", asked, "--no-parity", "-o", str(output)]
    assert main(command) == 0
    assert json.loads((output / "bundle.json").read_text())["limits"]["image_tokens"] == held
    assert ("at most 1024 visual tokens, not 4096" in capsys.readouterr().err) == (asked == "4096")


@pytest.mark.parametrize("limit", ["--max-image-tokens", "--max-text-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_limit_that_is_no_positive_number(refused: Callable[..., str], limit: str, value: str):
    refused(2, "--model", "demo", "--budget", "8,16", f"{limit}={value}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_checkpoint_without_a_part(refused: Callable[..., str], checkpoint: Path, name: str):
    (checkpoint / name).unlink()
    assert name in refused(2, "--model", checkpoint, "--budget", "8,16")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("parity", [("--no-parity",), ()], ids=["unverified", "parity"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_traced(
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    precision: str,
    parity: tuple[str, ...],
    value: float,
):
    """The last row of the token table, which no token has and no golden input would reach. 704 rows of 128."""
    monkeypatch.setattr(bundle_module, "trace_vision", lambda *_, **__: pytest.fail("it was traced"))
    tensors = load_file(checkpoint / "model.safetensors")
    (table,) = (name for name in tensors if name.endswith(".embed_tokens.weight"))
    tensors[table][703, 127] = value
    save_file(tensors, checkpoint / "model.safetensors")
    sentence = refused(1, "--model", checkpoint, "--budget", "8,16", "--precision", precision, *parity)
    assert "language_model.embed_tokens.weight" in sentence
    assert f"{checkpoint / 'model.safetensors'} holds NaN or infinite values (1 of {704 * 128})" in sentence


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_truncated_weights(refused: Callable[..., str], checkpoint: Path, kept: int):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors" in refused(1, "--model", checkpoint, "--budget", "8,16")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"shared_query_doc_prompt": True}, "shared"),
        ({"num_query_prompt_tokens": "16"}, "num_query_prompt_tokens"),
        ({"vision_config": 5}, "vision_config"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_exported(refused: Callable[..., str], checkpoint: Path, change: dict, word: str):
    config = json.loads((checkpoint / "config.json").read_bytes())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    assert word in refused(2, "--model", checkpoint, "--budget", "8,16")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "[]", "5", "{", "[" * 100_000], ids=lambda text: text[:3] or "empty")
def test_json_that_is_damaged(refused: Callable[..., str], checkpoint: Path, name: str, content: str):
    (checkpoint / name).write_text(content)
    refused(1, "--model", checkpoint, "--budget", "8,16")


@pytest.mark.parametrize("kind", ["bundle", "stranger", "file"])
def test_an_output_that_exists(demo_bundle: Path, output: Path, capsys: pytest.CaptureFixture[str], kind: str):
    if kind == "file":
        output.write_text("precious")
    else:
        output.mkdir()
        manifest = (demo_bundle / "bundle.json").read_text() if kind == "bundle" else "{}"
        (output / "bundle.json").write_text(manifest)
    force = [] if kind == "bundle" else ["-f"]
    assert main(["--model", "demo", "--budget", "8,16", "-o", str(output), "--quiet", *force]) == 2
    assert str(output) in capsys.readouterr().err
    assert [path.name for path in output.parent.iterdir()] == ["out"]


SLOW = ("trace_vision", "trace_language", "attach_weights", "check_operators", "attend_in_parts", "save_graph")
STEPS = ("open_source", "convert_weights", "_write_assets", "place_weights", *SLOW, "write_manifest")


def write_to_full_disk(*_: object, **__: object) -> None:
    with open("/dev/full", "w") as file:  # the kernel itself says ENOSPC
        file.write("x")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An export whose slow steps do nothing: what a failing step leaves is under test."""
    for step in SLOW:
        monkeypatch.setattr(bundle_module, step, lambda *_, **__: None)
    return monkeypatch


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_at_any_step(refused: Callable[..., str], cheap: pytest.MonkeyPatch, step: str):
    cheap.setattr(bundle_module, step, write_to_full_disk)
    assert "disk is full" in refused(1, "--model", "demo", "--budget", "8,16", "--no-parity")


def test_out_of_memory(refused: Callable[..., str], cheap: pytest.MonkeyPatch):
    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    cheap.setattr(bundle_module, "trace_language", exhaust)
    assert "memory" in refused(1, "--model", "demo", "--budget", "8,16")


def test_failed_parity_leaves_no_bundle(refused: Callable[..., str], cheap: pytest.MonkeyPatch):
    def disagree(*_: object, **__: object) -> None:
        raise ParityError("parity failed on here: query r=8, text: worst cosine 0.5")

    cheap.setattr(bundle_module, "_judge", disagree)
    assert "parity failed" in refused(1, "--model", "demo", "--budget", "8,16")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--max-image-tokens", "3"), "needs 4"),
        (("--quantize", "int8", "--data", "nowhere.jsonl"), "nowhere.jsonl is missing"),
        (("--adapter", "."), "no PEFT adapter"),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_dry_run_refuses_what_the_export_would(refused: Callable[..., str], argv: tuple[str, ...], words: str):
    """The demo's processor makes no image of less than 56 x 56 pixels, 4 tokens."""
    assert words in refused(2, "--model", "demo", "--budget", "8,16", "--dry-run", *argv)


@pytest.mark.parametrize("option", ["--model", "--base", "--adapter"])
def test_an_unset_variable_is_not_the_current_folder(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, option: str
):
    monkeypatch.chdir(checkpoint)
    others = {"--model": (), "--base": ("--model", "7b"), "--adapter": ("--model", ".")}[option]
    assert f"{option} is empty" in refused(2, *others, option, "", "--budget", "8,16", "--dry-run")


def test_a_bundle_is_no_model_to_export(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    assert "it is a bundle" in refused(2, "--model", tmp_path / "bundle", "--budget", "8,16")


@pytest.mark.usefixtures("equipped")
def test_a_device_named_twice_is_one_target(output: Path, cheap: pytest.MonkeyPatch):
    """runtime/devices.py: orin is another name of agx-orin-64gb."""
    heard: list[str] = []
    cheap.setattr("metaembed.export.cli.build", lambda argv: heard.extend(argv) or 0)
    targets = ["--target", "orin", "--target", "agx-orin-64gb", "--target", "a100", "--target", "orin"]
    assert main(["--model", "demo", "--budget", "1,1", "--no-parity", "-o", str(output), *targets]) == 0
    assert heard == [str(output), "--target=agx-orin-64gb", "--target=a100-80gb"]


def test_a_dry_run_counts_the_largest_image_that_the_processor_makes(output: Path, capsys: pytest.CaptureFixture[str]):
    """The demo's preprocessor_config.json has max_pixels = 1024 * 28 * 28, to which the export keeps."""
    command = ["--model", "demo", "--budget", "8,16", "--dry-run", "-o", str(output)]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert "image of 1024 tokens" in plain
    assert main([*command, "--max-image-tokens", "4096"]) == 0
    assert capsys.readouterr().out == plain


def test_limits_between_which_no_image_lies(refused: Callable[..., str], checkpoint: Path):
    """401 tokens exactly: a prime, so a single row, which is longer than the 200 times its width that Qwen takes."""
    rules = json.loads((checkpoint / "preprocessor_config.json").read_bytes())
    rules |= {"min_pixels": 401 * 28 * 28, "max_pixels": 401 * 28 * 28}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(rules))
    assert "no image keeps to both limits" in refused(2, "--model", checkpoint, "--budget", "8,16")


def test_a_dry_run_refuses_weights_that_are_cut_short(refused: Callable[..., str], checkpoint: Path):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in refused(1, "--model", checkpoint, "--budget", "8,16", "--dry-run")
    assert main(["--model", str(checkpoint), "--budget", "8,16", "--dry-run", "--random-weights", "0"]) == 0


def test_a_dry_run_refuses_a_tokenizer_beyond_the_token_table(refused: Callable[..., str], checkpoint: Path):
    """The demo's last id is 642 (video_token_id of its config.json)."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    config["text_config"]["vocab_size"] = 642
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "'<|video_pad|>' the id 642" in refused(1, "--model", checkpoint, "--budget", "8,16", "--dry-run")
    (checkpoint / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(2, "--model", checkpoint, "--budget", "8,16", "--dry-run")


def test_a_dry_run_refuses_layers_that_attend_otherwise(refused: Callable[..., str], checkpoint: Path):
    """The demo has three; use_sliding_window: false does not undo layer_types, in transformers."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    sliding = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8, "use_sliding_window": False}
    config["text_config"] |= sliding
    (checkpoint / "config.json").write_text(json.dumps(config))
    for flags in ((), ("--dry-run",)):
        assert "sliding_attention" in refused(2, "--model", checkpoint, "--budget", "8,16", *flags)


def test_a_dry_run_refuses_an_adapter_for_another_model(refused: Callable[..., str], checkpoint: Path, tmp_path: Path):
    """64 wide, where the demo's decoder has 128."""
    (tmp_path / "lora").mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {f"{module}.lora_A.weight": np.ones((1, 64), np.float32), f"{module}.lora_B.weight": np.ones((128, 1))}
    save_file(
        {name: half.astype(np.float32) for name, half in halves.items()},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    command = ("--model", checkpoint, "--adapter", tmp_path / "lora", "--budget", "8,16", "--dry-run")
    assert "([128, 64] onto [128, 128])" in refused(2, *command)


def test_tokenizer_json_is_parsed_once(output: Path, cheap: pytest.MonkeyPatch):
    """Not free for Qwen's 152,000 tokens."""
    real, parsed = tokenizers.Tokenizer, []

    class Counting:
        def __call__(self, model: object) -> object:
            return real(model)

        def __getattr__(self, name: str) -> object:
            parsed.append(name)  # from_file, from_str ...
            return getattr(real, name)

    cheap.setattr(tokenizers, "Tokenizer", Counting())
    assert main(["--model", "demo", "--budget", "1,1", "--no-parity", "--quiet", "-o", str(output)]) == 0
    assert len(parsed) == 1


def test_a_dry_run_refuses_an_output_that_exists(output: Path, capsys: pytest.CaptureFixture[str]):
    output.write_text("precious")
    assert main(["--model", "demo", "--budget", "8,16", "--dry-run", "-o", str(output)]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_a_dry_run_of_a_known_size_needs_no_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("METAEMBED_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "7b", "--budget", "8,16", "--dry-run"]) == 0


def test_two_words_on_parity(refused: Callable[..., str]):
    assert "--no-parity" in refused(2, "--model", "demo", "--budget", "8,16", "--parity", "full", "--no-parity")


@pytest.mark.parametrize("seed", [(), ("--random-weights", "0")], ids=["own", "random"])
@pytest.mark.parametrize(
    ("rows", "limit", "code", "words"),
    [(642, "1024", 1, "642 rows"), (704, "3", 2, "needs 4")],
    ids=["tokenizer", "images"],
)
def test_tokenizer_and_image_limit_are_judged_before_weights_are_opened_or_made(
    refused: Callable[..., str],
    cheap: pytest.MonkeyPatch,
    checkpoint: Path,
    rows: int,
    limit: str,
    code: int,
    words: str,
    seed: tuple[str, ...],
):
    """The demo's last id is 642 (video_token_id of its config.json); its processor makes no image of less than 4 tokens."""
    cheap.setattr(bundle_module, "open_source", lambda *_, **__: pytest.fail("weights were opened"))
    config = json.loads((checkpoint / "config.json").read_bytes())
    config["text_config"]["vocab_size"] = rows
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert words in refused(code, "--model", checkpoint, "--budget", "1,1", "--max-image-tokens", limit, *seed)


@pytest.mark.parametrize("flags", [[], ["--force", "--quiet", "--verbose"]], ids=["none", "all"])
@pytest.mark.usefixtures("equipped")
def test_the_build_hears_the_flags_that_it_shares(output: Path, cheap: pytest.MonkeyPatch, flags: list[str]):
    heard: list[str] = []
    cheap.setattr("metaembed.export.cli.build", lambda argv: heard.extend(argv) or 0)
    command = ["--model", "demo", "--budget", "1,1", "--no-parity", "--target", "a100-80gb", "-o", str(output)]
    assert main([*command, *flags]) == 0
    assert heard == [str(output), "--target=a100-80gb", *flags]


def test_the_current_folder_as_model_names_the_bundle(cheap: pytest.MonkeyPatch, checkpoint: Path):
    cheap.chdir(checkpoint)
    assert main(["--model", ".", "--budget", "1,1", "--no-parity", "--quiet"]) == 0
    assert (checkpoint / "checkpoint-bundle" / "bundle.json").is_file()


CODE = "import sys; from metaembed.export.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_file_size_limit_while_really_exporting(demo_folder: Path, output: Path):
    """The whole command in a process that may write 20 kB a file: less than any graph."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, "--model", str(demo_folder), "--budget", "1,1", "--no-parity", "-o", str(output)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    assert "too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(output.parent.iterdir())
