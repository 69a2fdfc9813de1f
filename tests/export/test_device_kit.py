"""The device kit: complete, and installable with nothing but what it holds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metaembed.export.cli_build import main as build_command
from metaembed.runtime.manifest import LANGUAGE, Bundle


@pytest.fixture(scope="module")
def kit(demo_bundle, tmp_path_factory):
    """A kit for Orin, unpacked in an empty folder."""
    folder = tmp_path_factory.mktemp("kit")
    assert build_command([str(demo_bundle), "--target", "orin", "-o", str(folder / "kit"), "--quiet"]) == 0
    return Path(shutil.move(folder / "kit", tmp_path_factory.mktemp("device") / "kit"))


def test_a_kit_holds_all_that_its_one_command_needs(kit):
    bundle = Bundle.open(kit)
    record = json.loads((kit / "kit.json").read_text())
    assert record["command"] == "metaembed-build . --target agx-orin-64gb && metaembed-check ."
    assert record["jetpacks"]["6.2"] == "10.3.0"
    assert {"golden/query.safetensors", "golden/candidate.safetensors", LANGUAGE} <= set(bundle.manifest.files)
    assert not any(name.startswith("engines/") for name in bundle.manifest.files)
    recipe = (kit / "BUILD.md").read_text()
    assert record["command"] in recipe
    assert "JetPack 6.2: TensorRT 10.3.0" in recipe
    assert all("==" in line for line in (kit / "requirements.txt").read_text().splitlines())


def test_the_kits_wheel_installs_and_its_command_runs_there(kit, tmp_path):
    """pip itself judges the wheel; the command then runs on nothing but what pip installed, and no torch or onnx."""
    (wheel,) = kit.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'transformers'))); "
    run = "from metaembed.export.cli_build import main; sys.exit(main(['.', '--target', 'orin', '--dry-run']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", block + run], cwd=kit, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can be built for agx-orin-64gb" in done.stdout
    assert (tmp_path / "bin" / "metaembed-build").exists()
