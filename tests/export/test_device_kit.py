"""The device kit: complete, and installable with nothing but what it holds."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from metaembed.export import device_wheel
from metaembed.export.cli_build import main as build_command
from metaembed.runtime.cli_check import main as check_command
from metaembed.runtime.manifest import LANGUAGE, MANIFEST, Bundle

ROOT = Path(__file__).parents[2]


def copy_of(bundle, folder):
    return shutil.copytree(bundle, folder, copy_function=os.link)


@pytest.fixture(scope="module")
def kit(demo_bundle, tmp_path_factory):
    """A kit for Orin, unpacked in an empty folder."""
    folder = tmp_path_factory.mktemp("kit")
    assert build_command([str(demo_bundle), "--target", "orin", "-o", str(folder / "kit"), "--quiet"]) == 0
    return Path(shutil.move(folder / "kit", tmp_path_factory.mktemp("device") / "kit"))


def test_a_kit_holds_all_that_its_one_command_needs(kit):
    bundle = Bundle.open(kit)
    record = json.loads((kit / "kit.json").read_text())
    assert record["command"] == "metaembed-build . --target agx-orin-64gb --flavour tensorrt && metaembed-check ."
    assert {"version": "6.2", "tensorrt": "10.3.0"} in record["jetpacks"]
    assert {"golden/query.safetensors", "golden/candidate.safetensors", LANGUAGE} <= set(bundle.manifest.files)
    assert not any(name.startswith("engines/") for name in bundle.manifest.files)
    recipe = (kit / "BUILD.md").read_text()
    assert record["command"] in recipe
    assert "JetPack 6.2: TensorRT 10.3.0" in recipe
    assert all("==" in line for line in (kit / "requirements.txt").read_text().splitlines())


def commands(kit, word):
    """The lines of BUILD.md's shell blocks that hold a word."""
    blocks = re.findall(r"```sh\n(.*?)```", (kit / "BUILD.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if word in line]


def test_the_first_command_finds_what_did_not_arrive_whole(kit, tmp_path):
    """The line of BUILD.md, run by a shell: silent on the kit, and it names each file that was damaged or lost."""
    blocks = re.findall(r"```sh\n(.*?)```", (kit / "BUILD.md").read_text(), flags=re.DOTALL)
    (line,) = commands(kit, "sha256sum")
    assert blocks[0] == line + "\n"
    done = subprocess.run(line, shell=True, cwd=kit, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    named = {text.split("  ", 1)[1] for text in (kit / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    copy = shutil.copytree(kit, tmp_path / "kit", copy_function=os.link)
    for name in ("BUILD.md", "scorer.onnx"):
        (copy / name).unlink()
    (copy / "BUILD.md").write_text("cut")
    done = subprocess.run(line, shell=True, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BUILD.md: FAILED\n" in done.stdout
    assert "scorer.onnx: FAILED open" in done.stdout


def test_requirements_are_all_that_a_device_imports(kit, tmp_path):
    """pip is told to install no others; huggingface_hub, which tokenizers names, and all else but these stay blocked."""
    names = {line.split("==")[0].replace("-", "_") for line in (kit / "requirements.txt").read_text().splitlines()}
    modules = {"pillow": "PIL"}
    own = {modules.get(name, name) for name in names} | {"metaembed"}
    (line,) = commands(kit, "pip install --no-deps -r requirements.txt")
    assert line == "pip install --no-deps -r requirements.txt"
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {sorted(own)!r} and name.split(".")[0] not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{{name}} is in no requirement")
sys.meta_path.insert(0, Blocked())
import metaembed.export.build, metaembed.export.engine, metaembed.runtime.encoder
from metaembed.runtime.cli_check import main
sys.exit(main([".", "--structure", "--quiet"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=kit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_recipe_says_how_to_prepare_each_jetpack_and_a_device_without_a_network(kit):
    """NVIDIA's migration page: 11.4.1 comes on top of JetPack 7.2.2, from the Linux SBSA package."""
    recipe = (kit / "BUILD.md").read_text()
    assert commands(kit, "python3-venv python3-libnvinfer")
    assert "JetPack 7.2.2: TensorRT 11.4.1 on top of its 10.16" in recipe
    assert commands(kit, "dpkg -i nv-tensorrt-local-repo-ubuntu2404-11.4.1")
    downloads = commands(kit, "pip download")
    assert [line.rpartition(" ")[2] for line in downloads] == ["3.10", "3.12"]
    assert all("manylinux2014_aarch64" in line for line in downloads)
    assert commands(kit, "--no-index --find-links wheelhouse")


def test_a_card_gets_its_tensorrt_from_the_requirements(demo_bundle, tmp_path):
    kit = tmp_path / "kit"
    assert build_command([str(demo_bundle), "--target", "h100", "-o", str(kit), "--quiet"]) == 0
    pins = (kit / "requirements.txt").read_text()
    assert all(f"tensorrt-cu12{part}==10.15.1.29\n" in pins for part in ("", "-libs", "-bindings"))
    assert commands(kit, "pip wheel --no-deps -w wheelhouse")
    assert "JetPack" not in (kit / "BUILD.md").read_text()


def test_the_kits_command_never_makes_a_kit_of_the_kit(kit, monkeypatch, capsys):
    """On a machine without a GPU it is refused; words of the recorded command, run as they are."""
    build, _, _ = json.loads((kit / "kit.json").read_text())["command"].partition(" && ")
    monkeypatch.setattr("metaembed.export.build.find_gpu", lambda: None)
    monkeypatch.chdir(kit)
    assert build_command(build.split()[1:]) == 2
    assert "this machine has no GPU" in capsys.readouterr().err
    assert not list(kit.parent.glob("*-kit-*"))


def test_a_kit_without_golden_vectors_says_that_nothing_was_verified(demo_bundle, tmp_path, capsys):
    bundle = copy_of(demo_bundle, tmp_path / "bundle")
    data = json.loads((bundle / MANIFEST).read_bytes())
    data.update(parity="unverified", files={n: r for n, r in data["files"].items() if not n.startswith("golden/")})
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).write_text(json.dumps(data))
    assert build_command([str(bundle), "--target", "orin"]) == 0
    kit = tmp_path / "bundle-kit-agx-orin-64gb"
    command = json.loads((kit / "kit.json").read_text())["command"]
    assert command.endswith(" && metaembed-check . --structure")
    assert command in capsys.readouterr().out
    recipe = (kit / "BUILD.md").read_text()
    assert "Nothing was verified" in recipe
    assert "golden vectors, and" not in recipe
    assert check_command([str(kit), "--structure", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "orin", "-f", "-o", "{}"], "is the bundle, or lies in it"),
        (["--target", "orin", "-o", "{}/weights/kit"], "is the bundle, or lies in it"),
        (["--target", "orin", "-o", "{}/../other"], "is no bundle, so it is not replaced"),
        (["--target", "orin", "-o", "{}/../earlier"], "give -f to replace it"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["build", "dry-run"])
def test_a_folder_that_a_kit_cannot_have_is_refused_by_a_dry_run_too(
    demo_bundle, tmp_path, capsys, arguments, reason, dry
):
    bundle = copy_of(demo_bundle, tmp_path / "bundle")
    copy_of(demo_bundle, tmp_path / "earlier")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert build_command([str(bundle), *(word.format(bundle) for word in arguments), *dry]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("budget", ["all", "ALL", " all"])
def test_all_budgets_may_be_spelled_as_for_the_export(demo_bundle, tmp_path, capsys, budget):
    """All of the bundle's, which here is one."""
    bundle = copy_of(demo_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text()) | {"budgets": [[8, 16]]}
    (bundle / "bundle.json").unlink()  # it is a link to the shared one
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert build_command([str(bundle), "--target", "orin", "--dry-run", "--budget", budget]) == 0
    assert "can be built for agx-orin-64gb" in capsys.readouterr().out


def test_a_kit_made_from_inside_the_bundle_lies_beside_it(demo_bundle, tmp_path, monkeypatch):
    bundle = copy_of(demo_bundle, tmp_path / "bundle")
    monkeypatch.chdir(bundle / "weights")
    assert build_command(["..", "--target", "orin", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle-kit-agx-orin-64gb"]


@pytest.mark.parametrize("version", ["0.1.0", "0.1.0+device", "0.1.0+abc"])
def test_a_kit_of_a_kit_has_a_wheel_that_pip_takes(tmp_path, monkeypatch, version):
    """Expected: the version as packaging, which pip judges by, reads it from the file's name."""
    monkeypatch.setattr(device_wheel, "package_version", lambda: version)
    wheel = device_wheel.write_device_wheel(tmp_path)
    assert str(parse_wheel_filename(wheel.name)[1]) == "0.1.0+device"


def test_the_wheel_of_a_bf16_kit_has_the_package_data_that_its_device_needs(narrow_demo, tmp_path):
    """Expected: what pyproject.toml packages beside the modules of metaembed.runtime."""
    assert build_command([str(narrow_demo("bf16")), "--target", "orin", "-o", str(tmp_path / "kit"), "--quiet"]) == 0
    (wheel,) = (tmp_path / "kit").glob("*.whl")
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")[2]
    patterns = re.findall('"([^"]+)"', re.search(r'"metaembed.runtime" = \[(.*)\]', lines)[1])
    data = {f"metaembed/runtime/{path.name}" for pattern in patterns for path in (ROOT / "runtime").glob(pattern)}
    assert "metaembed/runtime/_maxsim.ptx" in data
    with zipfile.ZipFile(wheel) as archive:
        assert data <= set(archive.namelist())


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
