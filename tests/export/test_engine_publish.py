"""How finished engines get into a bundle: two builds at once, a bundle that changes meanwhile, what killed builds left.

The builder is a stand-in that writes a few bytes; test_engine.py has real ones.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metaembed.export import engine
from metaembed.export.cli_build import main
from metaembed.export.preflight import check_target
from metaembed.export.profiles import Sizes, plan_engines
from metaembed.runtime.devices import find_device
from metaembed.runtime.engines import read_engine_sets
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.manifest import MANIFEST, Bundle, FileRecord

KILLED_BUILD = """
import os, sys
from metaembed.export import engine
from metaembed.export.cli_build import main
from metaembed.export.cli_build import main
engine.build_engine = lambda *arguments: os.kill(os.getpid(), 9)
main([sys.argv[1], "--target", "a100", "--quiet"])
"""


@pytest.fixture
def folder(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "bundle", copy_function=os.link)


@pytest.fixture
def meanwhile(monkeypatch):
    """What happens, once, while an A100's engines are being built."""
    todo = []

    def build_engine(bundle, preflight, spec, folder, log, on_event):
        if preflight.device.name == "a100-80gb" and todo:
            todo.pop()()
        plan = folder / f"{spec.name}.plan"
        plan.write_bytes(preflight.device.name.encode())
        return engine.BuiltEngine(spec, FileRecord.of(plan), "1.7.1", 1.0, None, None, {"layers": 1, "tensors": {}})

    monkeypatch.setattr(engine, "build_engine", build_engine)
    return todo


def build(folder, target, **options):
    bundle = Bundle.open(folder, verify=False, ignore="engines/")
    specs = plan_engines(Sizes.of(bundle.manifest), bundle.manifest.budgets)
    preflight = check_target(bundle, find_device(target), specs, flavour="tensorrt_rtx", version="1.7.1.116")
    return engine.build_engines(bundle, preflight, **options)


def targets(folder):
    return [found.target for found in read_engine_sets(Bundle.open(folder))]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "a100", "--target", "l4"], "l4 exists already; -f builds it again"),
        (["--target", "a100", "--target", "orin"], "is no bundle, so it is not replaced"),
        (["--target", "a10", "--target", "t4", "--flavour", "tensorrt_rtx"], "does not build these graphs"),
    ],
    ids=["engines exist", "no room for a kit", "no kernels"],
)
def test_every_target_is_checked_before_the_first_is_built(folder, meanwhile, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr("metaembed.export.build.installed_versions", lambda: {"tensorrt_rtx": "1.7.1.116"})
    build(folder, "l4")
    (folder.parent / "bundle-kit-agx-orin-64gb").mkdir()
    (folder.parent / "bundle-kit-agx-orin-64gb" / "thesis.txt").touch()
    assert main([str(folder), *arguments, "--quiet"]) == 2
    assert reason in capsys.readouterr().err
    assert targets(folder) == ["l4"]


def test_two_builds_at_once_are_both_vouched_for(folder, meanwhile):
    meanwhile.append(lambda: build(folder, "l4"))
    build(folder, "a100")
    assert targets(folder) == ["a100-80gb", "l4"]
    meanwhile.append(lambda: build(folder, "l4", force=True))
    build(folder, "a100", force=True)
    assert targets(folder) == ["a100-80gb", "l4"]


def test_the_second_of_two_builds_of_one_target_is_told(folder, meanwhile):
    """Found in review: both said that all was well, and the second had replaced the first's engines without -f."""
    theirs = folder / "engines" / "a100-80gb" / "theirs"
    meanwhile.append(lambda: (theirs.parent.mkdir(), theirs.touch()))
    with pytest.raises(UsageError, match="built by another process meanwhile; -f builds it again"):
        build(folder, "a100")
    assert theirs.exists()


def test_a_second_build_of_one_target_is_refused_while_the_first_runs(folder, meanwhile):
    """Both wrote to one log; the lock of the first, which another process would hold, is seen through another opening."""
    log = folder / "engines" / "a100-80gb.log"

    def second():
        log.write_text("the first's lines")
        with pytest.raises(UsageError, match="is being built by another process"):
            build(folder, "a100", force=True)
        assert log.read_text() == "the first's lines"

    meanwhile.append(second)
    build(folder, "a100")
    assert targets(folder) == ["a100-80gb"]


def test_a_builder_ends_with_the_process_that_ordered_it(tmp_path):
    """Found in review: a killed command left its builder, of gigabytes, running to its end."""
    child = "from metaembed.export.engine_worker import end_with_parent; import time; "
    child += "end_with_parent(); print(1, flush=True); time.sleep(99)"
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True)
    status = Path(f"/proc/{int(killed.stdout)}/status")
    deadline = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_engines_of_a_bundle_that_changed_meanwhile_are_not_vouched_for(folder, meanwhile):
    def change():
        data = json.loads((folder / MANIFEST).read_bytes())
        data["limits"]["text_tokens"] -= 1
        (folder / MANIFEST).unlink()  # the link, not the file that other tests share
        (folder / MANIFEST).write_text(json.dumps(data))

    meanwhile.append(change)
    with pytest.raises(
        BundleError, match="another bundle while its engines were built; build again: metaembed-build .* -f"
    ):
        build(folder, "a100")
    assert targets(folder) == []
    assert not (folder / "engines" / "a100-80gb").exists()


def test_a_build_waits_while_another_rewrites_the_manifest(folder, meanwhile):
    (folder / "engines").mkdir()
    with (folder / "engines" / engine.LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=build, args=(folder, "a100"))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        assert targets(folder) == []
    thread.join(60)
    assert targets(folder) == ["a100-80gb"]


def test_what_a_killed_build_left_goes_with_the_next(folder, meanwhile):
    environment = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(folder)], env=environment, capture_output=True)
    assert killed.returncode == -9
    left = list((folder / "engines").glob(".a100*"))
    assert len(left) == 1
    running = folder / "engines" / left[0].name.replace(left[0].name.rpartition("-")[2], str(os.getppid()))
    running.mkdir()
    build(folder, "a100")
    assert list((folder / "engines").glob(".a100*")) == [running]
