"""What a refusal for memory proposes: each change is made, and must then be accepted, or at least take less."""

import re
from dataclasses import replace

import pytest

from metaembed.export import memory_check
from metaembed.export.build_options import BuildOptions, chosen_engines
from metaembed.export.cli_build import main as build_command
from metaembed.export.memory import estimate_build
from metaembed.export.preflight import check_planned, check_target
from metaembed.export.savings import possible_changes
from metaembed.runtime.devices import find_device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.manifest import Bundle, Limits
from metaembed.runtime.memory import GIB

KIT = {"flavour": "tensorrt", "version": None, "builds_here": False}
HERE = {"flavour": "tensorrt_rtx", "version": "1.7.1", "builds_here": True}


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle, verify=False)


class Request:
    """A bundle of a known model, for a device, by these options."""

    def __init__(self, bundle, model, target, how, **options):
        geometry = bundle.manifest.geometry if model == "demo" else KNOWN[model].geometry
        precision = "fp32" if model == "demo" else "bf16"
        manifest = replace(bundle.manifest, geometry=geometry, precision=precision, limits=Limits())
        self.bundle, self.device, self.how = Bundle(bundle.folder, manifest), find_device(target), how
        self.options = BuildOptions(budgets=manifest.budgets, **options)
        self.engines = chosen_engines(manifest, self.options)

    def changes(self):
        return possible_changes(self.bundle.manifest, self.device, self.options)

    def check(self, **more):
        return check_target(self.bundle, self.device, self.engines, **self.how, changes=self.changes(), **more)

    def refusal(self, **more):
        with pytest.raises(UsageError) as caught:
            self.check(**more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def sizes(self, manifest, engines):
        unified = self.device.integrated
        return estimate_build(manifest, engines, self.how["flavour"], unified=unified)


@pytest.mark.parametrize(
    ("model", "target", "how", "options"),
    [
        ("demo", "orin-nano", KIT, {}),
        ("7b", "l4", KIT, {"layout": "separate"}),
        ("7b", "agx-orin-32gb", KIT, {}),
        ("3b", "a100", HERE, {}),
        ("3b", "a100", HERE, {"profile_per_budget": True}),
    ],
    ids=str,
)
def test_what_is_proposed_is_accepted_and_what_is_not_would_be_refused(
    bundle, monkeypatch, model, target, how, options
):
    monkeypatch.setattr(memory_check, "available_memory", lambda swap: 9 * GIB)
    asked = Request(bundle, model, target, how, **options)
    sentence = asked.refusal()
    proposed = 0
    for way in asked.changes():
        for change in way:
            changed = Bundle(bundle.folder, change.manifest)
            if f"{change.words} (" in sentence:
                check_target(changed, asked.device, change.engines, **how)
                proposed += 1
                break
            with pytest.raises(UsageError):
                check_target(changed, asked.device, change.engines, **how)
    assert proposed == len(re.findall(r"\(\d+\.\d [GM]iB\)", sentence)) >= 1


def test_where_no_change_is_enough_those_that_lower_the_number_are_named(bundle):
    asked = Request(bundle, "7b", "orin-nano-4gb", KIT)
    sentence = asked.refusal()
    assert "none of these is enough alone" in sentence
    before = asked.sizes(asked.bundle.manifest, asked.engines).serving
    named = [change for way in asked.changes() for change in way if f"{change.words} (" in sentence]
    assert {change.words for change in named} >= {
        "--quantize int8",
        "--max-image-tokens 64",
        "--side candidate",
        "--max-batch 1",
    }
    assert all(asked.sizes(change.manifest, change.engines).serving < before for change in named)


def test_a_refused_build_is_offered_what_lowers_its_largest_plan_and_swap_only(bundle):
    """Image tokens, batches and sides change no plan by much: the number that was refused comes from plans alone."""
    sentence = Request(bundle, "7b", "agx-orin-32gb", KIT).refusal()
    assert "the build takes about 47.3 GiB and Jetson AGX Orin 32 GB has 28.8 GiB" in sentence
    assert "metaembed-calibrate with --quantize int8" in sentence
    for useless in ("--max-image-tokens", "--side", "--max-batch", "--layout"):
        assert useless not in sentence


def test_the_swap_that_a_refusal_names_is_enough_and_a_gib_less_is_not(bundle):
    asked = Request(bundle, "7b", "agx-orin-32gb", KIT)
    amount = int(re.search(r"--swap (\d+)", asked.refusal())[1])
    asked.check(swap=amount * GIB)
    again = asked.refusal(swap=(amount - 1) * GIB)
    assert f"with {amount - 1}.0 GiB of swap" in again
    assert f"--swap {amount}," in again, "the whole amount, not what is lacking"


def test_a_machine_that_builds_is_told_how_much_swap_to_add(bundle, monkeypatch):
    """Its own swap is measured, so there is no flag to give."""
    monkeypatch.setattr(memory_check, "available_memory", lambda swap: 9 * GIB)
    asked = Request(bundle, "3b", "a100", HERE)
    sentence = asked.refusal()
    assert "--swap" not in sentence
    amount = int(re.search(r"add (\d+) GiB of swap", sentence)[1])
    monkeypatch.setattr(memory_check, "available_memory", lambda swap: (9 + amount) * GIB)
    asked.check()


@pytest.mark.parametrize(
    ("model", "target", "words"),
    [
        ("7b", "agx-orin-32gb", "or export without --target and run metaembed-build with --swap 19"),
        ("demo", "orin-nano", "--precision bf16 (1.1 GiB) or --max-image-tokens 256"),
        ("demo", "orin-nano", "export without --target and run metaembed-build with --max-batch"),
    ],
)
def test_before_an_export_options_are_those_of_its_own_command_or_named_with_theirs(bundle, model, target, words):
    asked = Request(bundle, model, target, KIT)
    with pytest.raises(UsageError) as caught:
        check_planned(asked.bundle.manifest, asked.device, asked.engines, **KIT, changes=asked.changes())
    assert words in str(caught.value)


# --- the command and the kit's recipe


@pytest.fixture
def small_board(monkeypatch):
    """An Orin of one GiB, which serves the demo in bf16, and builds it with swap only."""
    monkeypatch.setattr(memory_check, "USABLE", 1 / 64)


def test_a_kit_counts_the_swap_that_its_device_will_have(narrow_demo, small_board, tmp_path, capsys):
    command = [str(narrow_demo("bf16")), "--target", "orin", "--max-batch", "1", "-o", str(tmp_path / "kit")]
    assert build_command(command) == 2
    assert "give --swap 1, when the device will have that many GiB of swap" in capsys.readouterr().err
    assert build_command([*command, "--swap", "1"]) == 0
    recipe = (tmp_path / "kit" / "BUILD.md").read_text()
    assert "The build needs 1 GiB of swap" in recipe
    for word in ("fallocate -l 1G /swapfile", "mkswap /swapfile", "swapon /swapfile"):
        assert word in recipe


def test_a_recipe_speaks_of_swap_only_where_it_is_needed(narrow_demo, tmp_path):
    assert build_command([str(narrow_demo("bf16")), "--target", "orin", "-o", str(tmp_path / "kit"), "--quiet"]) == 0
    assert "swap" not in (tmp_path / "kit" / "BUILD.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "l4", "--swap", "8"], "--swap is for a device kit"),
        (["--target", "orin", "--swap", "-1"], "from 0 on"),
    ],
    ids=["built here", "negative"],
)
def test_swap_where_it_means_nothing_is_refused(narrow_demo, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr("metaembed.export.build.installed_versions", lambda: {"tensorrt_rtx": "1.7.1"})
    try:
        code = build_command([str(narrow_demo("bf16")), *arguments, "--dry-run"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert reason in capsys.readouterr().err
