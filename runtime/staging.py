"""A folder that exists whole or not at all: written as a hidden sibling, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import FORMAT, MANIFEST, check_name
from metaembed.runtime.staged_file import sync

# What lies in a bundle or a device kit beside the files that its manifest names, and what it names at least: that of a damaged one.
BESIDE = {MANIFEST, "engines", "kit.json", "BUILD.md", "requirements.txt", "SHA256SUMS"}
PARTS = {"weights", "golden", "tokenizer.json", "processor.json", "recipe.json"}
_in_use: set[Path] = set()  # this process's scratch folders: an output may be staged beside them


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be written, before any work; ``force`` allows replacing a bundle.

    Raises:
        UsageError: the sentence says why and what to do.
    """
    _check_replaceable(output, force=force)
    _check_writable(output)


def _check_writable(output: Path) -> None:
    """Make a folder where the work would begin, and take it away: no permission bit tells as much (root, /proc, mounts)."""
    output = Path(os.path.abspath(output))
    place = next(folder for folder in output.parents if folder.exists())
    # A name as long as the longest of ours.
    probe = place / f".{output.name}.writable-{os.getpid()}"
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(
            f"{output} cannot be written ({place}: {error.strerror}); choose another output with -o"
        ) from None


def _check_replaceable(output: Path, *, force: bool) -> None:
    check_name(output)
    if output.is_symlink():
        raise UsageError(f"{output} is a link, which is not replaced; choose another output with -o")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} exists and is not a folder; choose another output with -o")
    if not output.exists():
        return
    if os.path.ismount(output):
        raise UsageError(f"{output} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    if os.path.samefile(output, "."):
        raise UsageError(f"{output} is the current folder, which would be replaced; choose another output with -o")
    if not any(output.iterdir()):
        return
    if not _is_bundle(output):
        raise UsageError(f"{output} exists and is no bundle, so it is not replaced; choose another output with -o")
    if not force:
        raise UsageError(f"{output} exists; give -f to replace it, or another output with -o")
    if stranger := _stranger(output):
        raise UsageError(
            f"{output} holds {stranger}, which is not the bundle's and would be lost; move it away, or choose another output"
        )


@contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``output``; rename it to ``output`` on success, remove it on any failure."""
    output = Path(os.path.abspath(output))
    check_output(output, force=force)
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    _check_replaceable(output, force=force)  # a bundle may have been put back
    staging = output.parent / f".{output.name}.partial-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        _sync(staging)
        _replace(staging, output, force=force)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Take back the folders that were made for an output, the innermost first; one that others use by now stays."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``output``, on the same disk, for what is not to stay; removed in any case."""
    output = Path(os.path.abspath(output))
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    scratch = output.parent / f".{output.name}.scratch-{os.getpid()}"
    scratch.mkdir()
    _in_use.add(scratch)
    try:
        yield scratch
    finally:
        _in_use.discard(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        _remove_empty(made)


def _replace(staging: Path, output: Path, *, force: bool) -> None:
    _check_replaceable(output, force=force)  # once more: the work may have taken minutes
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_bundle(folder: Path) -> bool:
    """Whether we wrote it: other tools have a bundle.json too. A damaged bundle counts, a stranger's file does not."""
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _stranger(folder: Path) -> str | None:
    """The first file in a bundle's folder that its manifest does not name and no command of ours puts there."""
    try:
        named = set(json.loads((folder / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, TypeError, KeyError):
        named = set()
    beside = BESIDE if named else BESIDE | PARTS
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return next((str(file) for file in files if file.as_posix() not in named and file.parts[0] not in beside
                 and not (len(file.parts) == 1 and file.suffix in (".whl", ".onnx"))), None)  # fmt: skip


def _remove_abandoned(output: Path) -> None:
    """What killed runs left: remove the unfinished, but put a bundle back that was moved aside and not yet replaced."""
    pattern = re.compile(re.escape(f".{output.name}.") + r"(partial|scratch|writable|replaced)-(\d{1,9})")
    for sibling in list(output.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if match is None or sibling in _in_use or _is_running(int(match[2])):
            continue
        if match[1] == "replaced" and not output.exists():
            sibling.rename(output)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether another process has this id. Our own is no other: in containers each run has the same."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _sync(folder: Path) -> None:
    """Flush a folder and all that is in it to disk, so that a rename never outlives its contents."""
    for path in (folder, *folder.rglob("*")):
        sync(path)
