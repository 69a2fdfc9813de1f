"""A folder exists whole or not at all: failures at every step, kills at any moment, a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metaembed.runtime import staging
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import FORMAT, MANIFEST
from metaembed.runtime.staging import check_output, scratch_folder, staged_folder

NOBODY = 999_999_999  # above the largest process id of Linux


def write_bundle(folder: Path, text: str = "new") -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_text(text)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "text": text}))


def make_bundle(folder: Path, text: str = "old") -> None:
    folder.mkdir()
    write_bundle(folder, text)


def content(folder: Path) -> str:
    return (folder / "weights" / "a.bin").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_appears_only_at_the_end(tmp_path: Path):
    output = tmp_path / "deep" / "out"
    with staged_folder(output, force=False) as folder:
        write_bundle(folder)
        assert not output.exists()
        assert folder.parent == output.parent, "a rename within one folder is atomic"
    assert content(output) == "new"
    assert names(output.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("before", ["nothing", "empty", "bundle"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: str):
    output = tmp_path / "out"
    if before == "empty":
        output.mkdir()
    elif before == "bundle":
        make_bundle(output)
    with pytest.raises(error), staged_folder(output, force=True) as folder:
        write_bundle(folder)
        raise error
    assert names(tmp_path) == ([] if before == "nothing" else ["out"])
    if before == "bundle":
        assert content(output) == "old"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["_sync", "staging.rename", "output.rename"])
def test_a_failure_while_finishing_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
):
    output = tmp_path / "out"
    make_bundle(output)
    rename = Path.rename

    def fail(*_: object) -> None:
        raise error

    def rename_or_fail(self: Path, target: Path) -> Path:
        moving = "staging.rename" if "partial" in self.name else "output.rename" if self == output else ""
        return fail() if moving == step else rename(self, target)

    if step == "_sync":
        monkeypatch.setattr(staging, "_sync", fail)
    else:
        monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(error), staged_folder(output, force=True) as folder:
        write_bundle(folder)
    assert names(tmp_path) == ["out"]
    assert content(output) == "old"


def test_force_replaces_a_bundle_wholly(tmp_path: Path):
    output = tmp_path / "out"
    make_bundle(output)
    (output / "engines").mkdir()
    with staged_folder(output, force=True) as folder:
        write_bundle(folder)
        assert content(output) == "old"
    assert content(output) == "new"
    assert names(output) == [MANIFEST, "weights"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("stranger", ["notes.txt", "data/page.png", "weights/mine.bin", "checkpoint"])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_not_the_bundles_is_never_lost(tmp_path: Path, stranger: str, damaged: bool):
    """Found in review: -f deleted the checkpoint, the calibration images and the notes that lay inside the output."""
    output = tmp_path / "out"
    make_bundle(output)
    record = {"format": FORMAT} if damaged else {"format": FORMAT, "files": {"weights/a.bin": {}}}
    (output / MANIFEST).write_text(json.dumps(record))
    check_output(output, force=True)
    (output / stranger).parent.mkdir(exist_ok=True)
    (output / stranger).write_text("precious") if stranger != "checkpoint" else (output / stranger).symlink_to(tmp_path)
    if damaged and stranger.startswith("weights"):
        return  # nothing says what belongs there
    with (
        pytest.raises(UsageError, match=f"holds {stranger}, which is not the bundle's"),
        staged_folder(output, force=True),
    ):
        pytest.fail("the work began")
    assert os.path.lexists(output / stranger)


def test_an_existing_bundle_is_refused_without_force(tmp_path: Path):
    make_bundle(tmp_path / "out")
    with pytest.raises(UsageError, match="give -f"):
        check_output(tmp_path / "out", force=False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", [None, "{}", "[]", "not JSON", '{"format": "webpack"}', "[" * 100_000])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool, manifest: str | None):
    """Other tools write a bundle.json too, so the name alone does not make it ours to delete."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    if manifest is not None:
        (output / MANIFEST).write_text(manifest)
    with pytest.raises(UsageError, match="no bundle"), staged_folder(output, force=force):
        pytest.fail("the work must not begin")
    assert (output / "thesis.txt").read_text() == "precious"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "link to an empty folder"])
def test_files_and_links_are_never_replaced(tmp_path: Path, kind: str):
    output = tmp_path / "out"
    make_bundle(tmp_path / "real")
    if kind == "file":
        output.write_text("precious")
    else:
        (tmp_path / "empty").mkdir()
        output.symlink_to(tmp_path / {"link": "real", "dangling link": "nowhere"}.get(kind, "empty"))
    says = "exists and is not a folder" if kind == "file" else "is a link"
    with pytest.raises(UsageError, match=says), staged_folder(output, force=True):
        pytest.fail("the work must not begin")
    assert os.path.lexists(output)
    assert content(tmp_path / "real") == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_mount_point_is_refused_at_once(force: bool):
    """It cannot be renamed; /proc is one on every Linux."""
    with pytest.raises(UsageError, match="mount point"):
        check_output(Path("/proc"), force=force)


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_current_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder"):
        check_output(Path(name), force=True)


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(UsageError, match="give -f"), staged_folder(output, force=False) as folder:
        write_bundle(folder)
        make_bundle(output, "theirs")
    assert content(output) == "theirs"
    assert names(tmp_path) == ["out"]


def test_the_next_run_removes_what_killed_runs_left(tmp_path: Path):
    """Process ids: one that cannot exist, our own (containers reuse it), and a live one, whose work is left alone."""
    left = [f".out.partial-{NOBODY}", f".out.replaced-{NOBODY}", f".out.partial-{os.getpid()}"]
    kept = [f".out.partial-{os.getppid()}", f".other.partial-{NOBODY}", ".out.partial-x"]
    make_bundle(tmp_path / "out")
    for name in left + kept:
        make_bundle(tmp_path / name)
    with staged_folder(tmp_path / "out", force=True) as folder:
        write_bundle(folder)
    assert names(tmp_path) == sorted(["out", *kept])


def test_a_bundle_that_a_killed_run_had_moved_aside_comes_back(tmp_path: Path):
    """Killed between the two renames of a replacement: the old bundle is the only whole one."""
    make_bundle(tmp_path / f".out.replaced-{NOBODY}")
    with pytest.raises(UsageError, match="give -f"), staged_folder(tmp_path / "out", force=False):
        pytest.fail("the work must not begin")
    assert content(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


WRITER = """
import json, sys
from pathlib import Path
from metaembed.runtime.staging import staged_folder
output = Path(sys.argv[1])
print("ready", flush=True)
for round in range(100_000):
    with staged_folder(output, force=True) as folder:
        for place in range(3):
            (folder / f"{place}.bin").write_bytes(bytes([round % 256]) * 20_000)
        (folder / "bundle.json").write_text(json.dumps({
            "format": "metaembed-bundle", "files": {f"{place}.bin": {} for place in range(3)}, "round": round % 256
        }))
"""


@pytest.fixture
def writer(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("seed", range(8))
def test_a_kill_at_any_moment_leaves_a_whole_bundle_or_none(tmp_path: Path, writer: subprocess.Popen[bytes], seed: int):
    """The writer replaces one bundle over and over; it is killed without warning at a random moment."""
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).uniform(0, 0.15))
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    output = tmp_path / "out"
    if output.exists():
        number = json.loads((output / MANIFEST).read_bytes())["round"]
        for place in range(3):
            assert (output / f"{place}.bin").read_bytes() == bytes([number]) * 20_000
    with staged_folder(output, force=True) as folder:
        write_bundle(folder)
    assert names(tmp_path) == ["out"], "the next run cleans up"


def test_parents_that_were_made_for_a_failed_output_go_with_it(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), staged_folder(tmp_path / "there" / "a" / "b" / "out", force=False):
        raise KeyError
    assert names(tmp_path / "there") == []


def test_a_parent_that_somebody_else_uses_by_now_stays(tmp_path: Path):
    with pytest.raises(KeyError), staged_folder(tmp_path / "a" / "b" / "out", force=False):
        (tmp_path / "a" / "note").touch()
        raise KeyError
    assert names(tmp_path / "a") == ["note"]


def test_scratch_is_beside_the_output_and_gone_whatever_happens(tmp_path: Path):
    with pytest.raises(KeyError), scratch_folder(tmp_path / "out") as scratch:
        assert scratch.parent == tmp_path
        (scratch / "file").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_output_staged_beside_its_scratch_leaves_it_alone(tmp_path: Path):
    with scratch_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        with staged_folder(tmp_path / "out", force=False) as staging:
            (staging / "copy").write_text((scratch / "file").read_text())
    assert names(tmp_path) == ["out"]


def test_scratch_that_a_killed_run_left_is_removed(tmp_path: Path):
    dead = tmp_path / ".out.scratch-999999999"
    dead.mkdir()
    with scratch_folder(tmp_path / "out"):
        assert not dead.exists()


@pytest.mark.parametrize("place", ["/proc/{name}/out", "/proc/{name}", "{folder}/file/out", "{folder}/" + "x" * 245])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, place: str):
    """The kernel takes no folder in /proc, below a file, or of a name that leaves no room for the hidden one's."""
    (tmp_path / "file").write_text("precious")
    output = Path(place.format(name="metaembed", folder=tmp_path))
    with pytest.raises(UsageError, match="cannot be written .*choose another output with -o"):
        check_output(output, force=True)
    assert names(tmp_path) == ["file"]


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path):
    before = names(tmp_path)
    check_output(tmp_path / "deep" / "er" / "out", force=False)
    assert names(tmp_path) == before
