"""Real builds with TensorRT-RTX, ahead of time and without a GPU. They prove parsing, types, shapes, sizes and refusals;
nothing here says anything about speed or accuracy on a device.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaembed.export.cli_build import main as build_command
from metaembed.export.engine_process import MemoryWatch, run_worker
from metaembed.export.memory import count_weights
from metaembed.export.profiles import scorer_engine
from metaembed.export.scorer import write_scorer
from metaembed.runtime.cli_check import main as check_command
from metaembed.runtime.engines import read_engine_sets
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.manifest import LANGUAGE, MANIFEST, Bundle, record_files

pytest.importorskip("tensorrt_rtx", reason="pip install 'metaembed-export[tensorrt-rtx]'")
TARGETS = {"a100": [8, 0], "a10": [8, 6], "l4": [8, 9], "rtx5090": [12, 0]}
COMPUTE = {"bf16": "BF16", "fp16": "HALF"}


@pytest.fixture(scope="module", params=COMPUTE)
def narrow_bundle(request, narrow_demo):
    return narrow_demo(request.param)


@pytest.fixture
def folder(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "bundle", copy_function=os.link)


@pytest.fixture(scope="module")
def built(demo_bundle, tmp_path_factory):
    """The fp32 demo with engines for an A100 at one budget."""
    folder = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("built") / "bundle", copy_function=os.link)
    assert build_command([str(folder), "--target", "a100", "--budget", "8,16", "--quiet"]) == 0
    return folder


def build_record(folder, target="a100-80gb"):
    return json.loads((folder / "engines" / target / "build.json").read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_the_demo_builds_for_every_target_in_both_types_at_all_budgets(narrow_bundle, target, tmp_path):
    folder = shutil.copytree(narrow_bundle, tmp_path / "bundle", copy_function=os.link)
    assert build_command([str(folder), "--target", target, "--quiet"]) == 0
    bundle = Bundle.open(folder)
    (found,) = read_engine_sets(bundle)
    record = build_record(folder, found.target)
    assert record["compute_capability"] == TARGETS[target]
    assert record["strongly_typed"] is True
    assert record["built_on_device"] is False
    vision, language, scorer = record["engines"]
    types = {
        tensor["name"]: tensor["type"] for tensor in (*language["tensors"]["inputs"], *vision["tensors"]["inputs"])
    }
    assert types == {  # the interface of CONTRIBUTING.md
        **dict.fromkeys(("token_ids", "image_rows", "positions", "rows", "patch_positions"), "INT64"),
        "image_embeddings": COMPUTE[bundle.manifest.precision],
        **dict.fromkeys(("mask", "patch_mask"), "BOOL"),
        "patches": "FLOAT",
    }
    assert language["tensors"]["outputs"][0] | {"shape": None} == {"name": "embeddings", "type": "FLOAT", "shape": None}
    rows = [(p["ranges"]["rows"]["min"], p["ranges"]["rows"]["max"]) for p in language["profiles"]]
    assert rows == [([1], [16]), ([1], [64])]
    scored = {t["name"]: t["type"] for kind in ("inputs", "outputs") for t in scorer["tensors"][kind]}
    kind = COMPUTE[bundle.manifest.precision]
    assert scored == {"queries": kind, "candidates": kind, "scores": "FLOAT"}
    weights = count_weights(bundle.manifest.geometry)
    for engine in (vision, language):
        assert engine["bytes"] > weights[engine["name"]].bytes(bundle.manifest.precision, None)
    for engine in record["engines"]:
        assert engine["bytes"] == (folder / f"engines/{found.target}/{engine['plan']}").stat().st_size


def test_the_manifest_vouches_for_what_was_built_and_the_log_is_kept(built):
    bundle = Bundle.open(built)
    files = {name for name in bundle.manifest.files if name.startswith("engines/")}
    assert files == {
        f"engines/a100-80gb/{name}" for name in ("build.json", "language.plan", "scorer.plan", "vision.plan")
    }
    assert "Engine generation completed" in (built / "engines/a100-80gb.log").read_text()
    assert bundle.manifest.fingerprint == build_record(built)["bundle"]
    assert not list(built.glob("engines/.a100*"))


def test_estimates_are_recorded_beside_what_was_measured(built):
    record = build_record(built)
    measured = [engine["peak_memory_bytes"] for engine in record["engines"]]
    assert all(peak > 50 << 20 for peak in measured), "a process with TensorRT-RTX holds more than this"
    assert 0.5 < record["estimate"]["build_peak"] / max(measured) < 2.5
    stated = [engine["activation_bytes"] for engine in record["engines"]]
    assert 0.3 < record["estimate"]["activations"] / sum(stated) < 3
    assert 0.5 < record["estimate"]["plans"] / sum(engine["bytes"] for engine in record["engines"]) < 2


def test_the_recorded_polygraphy_line_builds_the_same_engine(built, tmp_path):
    engine = next(engine for engine in build_record(built)["engines"] if engine["name"] == "language")
    line = engine["commands"]["polygraphy"].replace("language.plan", shlex.quote(str(tmp_path / "again.plan")))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(line, shell=True, cwd=built, env=environment, check=True, capture_output=True)
    assert (tmp_path / "again.plan").stat().st_size == pytest.approx(engine["bytes"], rel=0.01)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["build", "dry-run"])
def test_engines_are_replaced_only_when_asked(built, capsys, dry):
    assert build_command([str(built), "--target", "a100", *dry]) == 2
    assert "exists already; -f builds it again" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_builds_nothing(folder, capsys):
    assert build_command([str(folder), "--target", "a100", "--target", "orin", "--dry-run", "--budget", "8,16"]) == 0
    printed = capsys.readouterr().out
    assert "compute capability 8.0, tensorrt_rtx" in printed
    assert "profile candidate, min-opt-max: token_ids, image_rows, mask 1x33-" in printed
    assert "can be built for agx-orin-64gb (kit); nothing was built" in printed
    assert not (folder / "engines").exists()
    assert len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "h1000"], "there is no device"),
        (["--target", "a100", "--budget", "3,5"], "budget 3,5 is not in this bundle"),
        (["--target", "a100", "--budget", "8"], "not of the form R_Q,R_C"),
        (["--target", "a100", "--max-batch", "0"], "at least one item"),
        (["--target", "a100", "-o", "x"], "-o is for a device kit"),
        (["--target", "a100", "-o", "x", "--dry-run"], "-o is for a device kit"),
        (["--target", "orin", "--flavour", "tensorrt"], "--flavour kit"),
        (["--target", "orin", "--flavour", "tensorrt_rtx"], "does not build these graphs for compute capability 8.7"),
        (["--target", "a100", "--layout", "x"], "invalid choice"),
    ],
    ids=str,
)
def test_wrong_requests_get_one_sentence_and_exit_2(folder, capsys, arguments, reason):
    try:
        code = build_command([str(folder), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert not (folder / "engines").exists()


# --- mending damaged engines


def swap(place):
    (place / "vision.plan").rename(place / "kept")
    (place / "language.plan").rename(place / "vision.plan")
    (place / "kept").rename(place / "language.plan")


DAMAGE = {
    "altered": lambda place: rewrite(place / "vision.plan", b"x" * (place / "vision.plan").stat().st_size),
    "cut": lambda place: rewrite(place / "language.plan", b"x"),
    "missing": lambda place: (place / "language.plan").unlink(),
    "swapped": swap,
    "gone": shutil.rmtree,
    "unreadable record": lambda place: rewrite(place / "build.json", b"{"),
}


def rewrite(path, content):
    path.unlink()  # the link, not the file that other tests share
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_engines_stop_the_bundle_and_the_command_it_names_mends_it(built, tmp_path, capsys, damage):
    """Each kind of damage is refused with a sentence that holds the command; that command is run as it reads."""
    folder = shutil.copytree(built, tmp_path / "bundle", copy_function=os.link)
    DAMAGE[damage](folder / "engines" / "a100-80gb")
    assert check_command([str(folder), "--quiet"]) == 1
    sentence = capsys.readouterr().err
    command = shlex.split(sentence.partition("metaembed-build ")[2])
    assert command == [str(folder), "--target", "a100-80gb", "-f"]
    assert sentence.count("\n") == 1
    assert build_command([*command, "--budget", "8,16", "--quiet"]) == 0
    (found,) = read_engine_sets(Bundle.open(folder))
    assert set(found.plans) == {"vision.onnx", "language.onnx", "scorer.onnx"}


def test_damage_elsewhere_is_not_built_upon(folder, capsys):
    rewrite(folder / LANGUAGE, b"x")
    assert build_command([str(folder), "--target", "a100", "-f"]) == 1
    assert "export again" in capsys.readouterr().err
    assert not (folder / "engines").exists()


def test_a_name_that_leaves_the_folder_is_refused_among_engines_too(folder, demo_bundle, capsys):
    manifest = json.loads((demo_bundle / MANIFEST).read_bytes())
    manifest["files"]["engines/../../out.plan"] = {"bytes": 1, "sha256": "0" * 64}
    rewrite(folder / MANIFEST, json.dumps(manifest).encode())
    assert build_command([str(folder), "--target", "a100", "-f"]) == 1
    assert "names a file outside the bundle" in capsys.readouterr().err


def test_engines_are_never_built_through_a_link(folder, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (folder / "engines").symlink_to(tmp_path / "elsewhere")
    assert build_command([str(folder), "--target", "a100"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


# --- what the builder itself refuses


def make_order(tmp_path, graph, capability, shapes):
    """An order to the worker for a graph of one profile whose shapes are fixed."""
    onnx.save(graph, tmp_path / "graph.onnx")
    ranges = {name: {"min": shape, "opt": shape, "max": shape} for name, shape in shapes.items()}
    return {
        "onnx": str(tmp_path / "graph.onnx"),
        "plan": str(tmp_path / "x.plan"),
        "capability": capability,
        "profiles": [{"name": "only", "ranges": ranges}],
        "timing_cache": None,
        "log": str(tmp_path / "log"),
    }


def small_graph(kind, nodes, constants=(), opset=20):
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", kind, ["b", 32])],
            [helper.make_tensor_value_info("y", kind, None)],
            list(constants),
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )


def refusal(order):
    with pytest.raises(MetaEmbedError) as caught:
        run_worker(order, "tensorrt_rtx", lambda event: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fp8_on_compute_capability_8_0_is_refused_by_the_builder_too(tmp_path):
    """Why the preflight refuses it: TensorRT-RTX 1.7.1 gets as far as compiling."""
    scale = numpy_helper.from_array(np.array(0.05, np.float32), "scale")
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    graph = small_graph(TensorProto.FLOAT, nodes, [scale, zero, weight])
    assert "fp8" in refusal(make_order(tmp_path, graph, [8, 0], {"x": [2, 32]})).lower()
    run_worker(make_order(tmp_path, graph, [8, 9], {"x": [2, 32]}), "tensorrt_rtx", lambda event: None)


def test_bf16_on_compute_capability_7_5_is_refused_by_the_builder_too(tmp_path):
    graph = small_graph(TensorProto.BFLOAT16, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    graph.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [32, 32], [0.5] * 1024))
    assert "bf16" in refusal(make_order(tmp_path, graph, [7, 5], {"x": [2, 32]})).lower()


def test_an_operator_that_the_parser_lacks_is_one_sentence(tmp_path):
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"], axis=0),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    sentence = refusal(make_order(tmp_path, small_graph(TensorProto.FLOAT, nodes), [8, 0], {"x": [2, 32]}))
    assert "refused the graph" in sentence
    assert "SplitToSequence" in sentence


def test_a_failed_build_leaves_the_bundle_as_it_was_and_its_log(folder, demo_bundle, capsys):
    """The bundle vouches for a language graph that imports an opset and holds nothing."""
    for name in (LANGUAGE, MANIFEST):
        (folder / name).unlink()  # the link, not the file that other tests share
    (folder / LANGUAGE).write_bytes(b"\x42\x04\x0a\x00\x10\x14")
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    files = {**manifest.files, **record_files(folder, [LANGUAGE])}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()))
    assert build_command([str(folder), "--target", "a100", "--quiet"]) == 1
    assert "the builder refused the graph" in capsys.readouterr().err
    assert [path.name for path in (folder / "engines").iterdir()] == ["a100-80gb.log"]
    assert not [name for name in Bundle.open(folder).manifest.files if name.startswith("engines/")]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("kill -9 $$", "most likely because memory ran out"),
        ("kill -11 $$", "the builder crashed (SIGSEGV)"),
        ("echo 'ModuleNotFoundError: No module named polygraphy' >&2; exit 1", "could not start: ModuleNotFoundError"),
    ],
)
def test_a_builder_that_dies_is_one_sentence(tmp_path, monkeypatch, script, sentence):
    """A process that really ends this way stands for the interpreter that runs the worker."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "log").write_text("")
    order = {"plan": str(tmp_path / "x.plan"), "log": str(tmp_path / "log")}
    assert sentence in refusal(order)


def test_an_interrupted_build_stops_its_worker_and_leaves_nothing(folder):
    from metaembed.export.build import build_target, check_build
    from metaembed.export.build_options import BuildOptions
    from metaembed.runtime.devices import find_device

    def interrupt(engine, event):
        raise KeyboardInterrupt

    bundle = Bundle.open(folder)
    options = BuildOptions(budgets=bundle.manifest.budgets)
    with pytest.raises(KeyboardInterrupt):
        build_target(bundle, check_build(bundle, find_device("a100"), options), on_event=interrupt)
    assert [path.name for path in (folder / "engines").iterdir()] == ["a100-80gb.log"]


def test_peak_memory_is_seen_from_outside():
    """A process that holds 200 MiB and gives them back is seen to have held them."""
    code = "import time; a = bytearray(200 << 20); time.sleep(0.4); del a; time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process, MemoryWatch(process.pid) as watch:
        process.wait()
        time.sleep(0.05)
    assert 200 << 20 <= watch.peak < 260 << 20


def test_the_scorer_builds_as_an_engine(tmp_path):
    write_scorer(tmp_path, 128)
    spec = scorer_engine(128, 16, 32, {1: 5000, 64: 100})
    order = make_order(tmp_path, onnx.load(tmp_path / "scorer.onnx"), [8, 0], {})
    order["profiles"] = [profile.to_json() for profile in spec.profiles]
    events, _ = run_worker(order, "tensorrt_rtx", lambda event: None)
    types = {tensor["name"]: tensor["type"] for kind in events["done"]["tensors"].values() for tensor in kind}
    assert types == {"queries": "BF16", "candidates": "BF16", "scores": "FLOAT"}
