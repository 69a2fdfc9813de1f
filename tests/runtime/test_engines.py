"""Which plans may be loaded: the manifest's word, the build record, this GPU, this TensorRT. The plans here are dummies:
everything must be settled before a plan is deserialised, so no TensorRT is needed to test it.
"""

import json
import shlex
import shutil
from dataclasses import replace

import pytest

from metaembed.runtime.engines import choose_engines, read_engine_sets
from metaembed.runtime.errors import BundleError
from metaembed.runtime.manifest import MANIFEST, Bundle, record_files
from metaembed.runtime.session_trt import _plans, load_engine

HERE = {"tensorrt_rtx": "1.7.1.116"}
A100 = (8, 0)


class NoTensorRT:
    """Fails the test when anything is deserialised."""

    class ILogger:
        def __init__(self):
            pass

    @staticmethod
    def Runtime(logger):
        raise AssertionError("a plan was about to be deserialised")


def write_manifest(folder, manifest):
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))


def add_engines(folder, target="a100-80gb", capability=A100, **changes):
    """Put dummy engines of one target into a bundle and vouch for them."""
    bundle = Bundle.open(folder)
    place = folder / "engines" / target
    place.mkdir(parents=True)
    for name in ("vision", "language"):
        (place / f"{name}.plan").write_bytes(f"{target} {name}".encode())
    plans = record_files(place, ["vision.plan", "language.plan"])
    record = {
        "format": "metaembed-engines",
        "format_version": 1,
        "target": target,
        "compute_capability": list(capability),
        "flavour": "tensorrt_rtx",
        "version": "1.7.1.116",
        "bundle": bundle.manifest.fingerprint,
        "engines": [
            {"graph": f"{name[:-5]}.onnx", "plan": name, "bytes": found.bytes, "sha256": found.sha256}
            for name, found in plans.items()
        ],
        **changes,
    }
    (place / "build.json").write_text(json.dumps(record))
    return vouch(folder, bundle)


def vouch(folder, bundle):
    names = [path.relative_to(folder).as_posix() for path in folder.glob("engines/*/*")]
    files = {name: record for name, record in bundle.manifest.files.items() if not name.startswith("engines/")}
    write_manifest(folder, replace(bundle.manifest, files={**files, **record_files(folder, names)}))
    return Bundle.open(folder)


@pytest.fixture
def folder(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "my bundle")


def rebuild(error):
    """The words after metaembed-build in a refusal's one sentence, as a shell reads them."""
    sentence = str(error)
    assert "\n" not in sentence
    return shlex.split(sentence.partition("metaembed-build ")[2])


def again(folder):
    return [str(folder), "--target", "a100-80gb", "-f"]


def test_a_bundle_without_engines_offers_none(folder):
    assert choose_engines(Bundle.open(folder), A100, HERE) is None


def test_the_set_for_this_gpu_is_chosen(folder):
    add_engines(folder, "l4", (8, 9))
    bundle = add_engines(folder)
    found = choose_engines(bundle, A100, HERE)
    assert (found.target, found.plans["language.onnx"]) == ("a100-80gb", ("engines/a100-80gb/language.plan",))
    assert len(read_engine_sets(bundle)) == 2


def test_engines_do_not_change_what_an_index_remembers_of_a_bundle(folder):
    before = Bundle.open(folder).manifest.fingerprint
    assert add_engines(folder).manifest.fingerprint == before


@pytest.mark.parametrize(
    ("changes", "here", "reason"),
    [
        ({"capability": (8, 9)}, HERE, "are for compute capability 8.9, and this GPU has 8.0"),
        ({"version": "1.6.0.1"}, HERE, "were built by tensorrt_rtx 1.6.0.1, and this is 1.7.1.116"),
        ({"version": "1.7.1.115"}, HERE, "were built by tensorrt_rtx 1.7.1.115"),
        ({"flavour": "tensorrt"}, HERE, "need tensorrt, which is not installed"),
        ({}, {}, "need tensorrt_rtx, which is not installed"),
        ({"bundle": "0" * 64}, HERE, "were built from another bundle"),
    ],
)
def test_engines_that_do_not_fit_are_refused_with_the_command_that_rebuilds(folder, changes, here, reason):
    bundle = add_engines(folder, **changes)
    with pytest.raises(BundleError, match=reason) as caught:
        choose_engines(bundle, A100, here)
    # engines of another capability say nothing about what this GPU is called
    assert rebuild(caught.value) == [str(folder), *([] if "capability" in changes else ["--target", "a100-80gb"]), "-f"]


def test_a_swapped_plan_is_refused_even_when_the_manifest_vouches_for_the_bytes(folder):
    bundle = add_engines(folder)
    vision, language = (folder / f"engines/a100-80gb/{name}.plan" for name in ("vision", "language"))
    vision.rename(folder / "kept")
    language.rename(vision)
    (folder / "kept").rename(language)
    with pytest.raises(BundleError, match="is not the plan that its build.json describes") as caught:
        read_engine_sets(vouch(folder, bundle))
    assert rebuild(caught.value) == again(folder)


def test_a_plan_from_another_target_under_this_name_is_refused(folder):
    bundle = add_engines(folder)
    add_engines(folder, "l4", (8, 9))
    shutil.copy(folder / "engines/l4/language.plan", folder / "engines/a100-80gb/language.plan")
    with pytest.raises(BundleError, match="is not the plan") as caught:
        read_engine_sets(vouch(folder, bundle))
    assert rebuild(caught.value) == again(folder)


@pytest.mark.parametrize("damage", [lambda plan: plan[:-1], lambda plan: plan + b"!", lambda plan: b"x" + plan[1:]])
def test_a_damaged_plan_is_refused_when_the_bundle_opens_and_again_before_it_is_deserialised(folder, damage):
    bundle = add_engines(folder)
    plan = folder / "engines/a100-80gb/language.plan"
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(BundleError):
        Bundle.open(folder)
    with pytest.raises(BundleError, match="has changed since it was built") as caught:
        load_engine(NoTensorRT, bundle, "engines/a100-80gb/language.plan")
    assert rebuild(caught.value) == again(folder)


def test_a_plan_that_the_manifest_does_not_name_is_refused(folder):
    bundle = add_engines(folder)
    (folder / "engines/a100-80gb/stray.plan").write_bytes(b"stray")
    with pytest.raises(BundleError, match="has no engines/a100-80gb/stray.plan") as caught:
        load_engine(NoTensorRT, bundle, "engines/a100-80gb/stray.plan")
    assert rebuild(caught.value) == again(folder)


def test_a_plan_that_is_a_link_out_of_the_bundle_is_refused(folder, tmp_path):
    add_engines(folder)
    plan = folder / "engines/a100-80gb/language.plan"
    plan.rename(tmp_path / "elsewhere")
    plan.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link that leaves the bundle") as caught:
        Bundle.open(folder)
    assert rebuild(caught.value) == again(folder)


def test_engines_without_a_graph_are_refused(folder):
    bundle = add_engines(folder)
    (found,) = read_engine_sets(bundle)
    with pytest.raises(BundleError, match="lack scorer.onnx") as caught:
        _plans(bundle, found, "scorer.onnx")
    assert rebuild(caught.value) == again(folder)


def test_the_command_names_the_bundle_as_it_was_given(folder, monkeypatch):
    add_engines(folder, format_version=2)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(BundleError) as caught:
        read_engine_sets(Bundle.open("my bundle"))
    assert rebuild(caught.value) == ["my bundle", "--target", "a100-80gb", "-f"]


@pytest.mark.parametrize("plan", ["../../../etc/passwd", "/etc/passwd", "../l4/language.plan"])
def test_a_build_record_that_points_elsewhere_is_refused(folder, plan):
    engine = {"graph": "language.onnx", "plan": plan, "bytes": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="names a plan that bundle.json does not vouch for") as caught:
        read_engine_sets(add_engines(folder, engines=[engine]))
    assert rebuild(caught.value) == again(folder)


@pytest.mark.parametrize(
    "changes",
    [{"format_version": 2}, {"format": "other"}, {"compute_capability": 8}, {"engines": None}, {"engines": [{}]}],
    ids=str,
)
def test_a_damaged_build_record_is_one_sentence(folder, changes):
    with pytest.raises(BundleError, match=r"build.json is (damaged|of format)") as caught:
        read_engine_sets(add_engines(folder, **changes))
    assert rebuild(caught.value) == again(folder)


def test_a_build_record_that_is_not_json_is_one_sentence(folder):
    bundle = add_engines(folder)
    (folder / "engines/a100-80gb/build.json").write_text("{")
    with pytest.raises(BundleError, match=r"build.json is damaged \(JSONDecodeError") as caught:
        read_engine_sets(vouch(folder, bundle))
    assert rebuild(caught.value) == again(folder)
