"""The habits that commands share, and metaembed-check through its main()."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime.cli_check import main
from metaembed.runtime.command import Parser, run_command
from metaembed.runtime.errors import BundleError, ParityError, UsageError
from metaembed.runtime.golden import golden_path, read_golden, write_golden


def finish(error: BaseException | None, *argv: str) -> int:
    parser = Parser(prog="metaembed-x", description="x")
    parser.add_common()

    def work(_: object) -> None:
        if error is not None:
            raise error

    return run_command(parser, work, argv)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("wrong wish"), 2, "wrong wish"),
        (BundleError("broken file"), 1, "broken file"),
        (ParityError("too far"), 1, "too far"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), 1, "the disk is full (out/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied: out"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_failure_is_one_sentence_and_its_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
):
    assert finish(error) == code
    captured = capsys.readouterr()
    assert captured.err == f"metaembed-x: {captured.err.removeprefix('metaembed-x: ')}"
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""


def test_names_of_files_cannot_pass_for_output(capsys: pytest.CaptureFixture[str]):
    """Found in review: a line break and a terminal's control sign in a file's name reached the terminal as they were."""
    assert finish(UsageError("bad\n\x1b[31mrm -rf.jpg is missing")) == 2
    assert capsys.readouterr().err == "metaembed-x: bad\\n\\x1b[31mrm -rf.jpg is missing\n"


TERMINATED = """
import time
from metaembed.runtime.command import Parser, run_command
def work(args):
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
parser = Parser(prog="metaembed-x")
parser.add_common()
raise SystemExit(run_command(parser, work, []))
"""


def test_sigterm_cleans_up_as_an_interrupt_does():
    """Found in review: containers and time limits end commands so, and what was half-written stayed."""
    with subprocess.Popen([sys.executable, "-c", TERMINATED], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.terminate()
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "cleaned up\n")
    assert error == "metaembed-x: interrupted; nothing half-written was left\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_makes_an_error_of_is_one(
    capsys: pytest.CaptureFixture[str], number: int, code: int
):
    """As onnxruntime does, interrupted in its import: "onnxruntime cannot be loaded (initialization failed)"."""
    parser = Parser(prog="metaembed-x", description="x")
    parser.add_common()

    def work(_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise BundleError("the library cannot be loaded") from None

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    try:
        assert run_command(parser, work, []) == code
        assert capsys.readouterr().err == "metaembed-x: interrupted; nothing half-written was left\n"
        assert finish(BundleError("broken file")) == 1  # the next command's own
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_success_is_zero_and_silent(capsys: pytest.CaptureFixture[str]):
    assert finish(None) == 0
    assert capsys.readouterr() == ("", "")


def test_an_error_that_nobody_foresaw_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        finish(ZeroDivisionError())


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        finish(None, "--no-such-option")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def quick(edit_manifest: Callable[[Callable[[dict], object]], Path]) -> Path:
    """The bundle at its smallest budget only, which is quick to replay."""
    return edit_manifest(lambda data: data.update(budgets=[[1, 1]]))


def forge_goldens(
    quick: Path, replace_file: Callable[[str, bytes], Path], scratch: Path, change: Callable[[np.ndarray], None]
) -> None:
    """Small images only, a changed reference, and a manifest that vouches for both."""
    for side in ("query", "candidate"):
        items, reference = read_golden(quick / golden_path(side))
        kept = [place for place, item in enumerate(items) if item.image is None or max(item.image.size) <= 340]
        reference = reference[kept]
        if side == "candidate":
            change(reference)
        write_golden(scratch / "x.safetensors", [items[place] for place in kept], reference)
        replace_file(golden_path(side), (scratch / "x.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda reference: None, 0),
        (lambda reference: reference.__setitem__((2, 0, 5), reference[2, 0, 5] + 2e-4), 1),
        (lambda reference: reference.__setitem__((2, 0, 5), np.nan), 1),
        (lambda reference: np.negative(reference, out=reference), 1),
    ],
    ids=["untouched", "one value", "NaN", "negated"],
)
def test_a_tampered_golden_exits_with_1(
    quick: Path, replace_file: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, code: int
):
    forge_goldens(quick, replace_file, tmp_path, change)
    assert main([str(quick), "--quiet"]) == code
    captured = capsys.readouterr()
    assert ("OUT OF" in captured.out) == (code == 1)
    assert captured.err == ""


def test_json_holds_the_whole_record(
    quick: Path, replace_file: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    forge_goldens(quick, replace_file, tmp_path, lambda reference: None)
    assert main([str(quick), "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"] is True
    assert [row["budget"] for row in record["rankings"]] == [[1, 1]]
    assert {(row["side"], row["input"]) for row in record["vectors"]} == {
        (side, kind) for side in ("query", "candidate") for kind in ("text", "image", "image + text")
    }


def test_a_changed_golden_that_no_manifest_vouches_for_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]):
    path = bundle / golden_path("query")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert main([str(bundle)]) == 1
    assert "has changed" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert "holds no bundle" in capsys.readouterr().err


def test_the_check_runs_where_torch_cannot_be_imported(quick: Path, replace_file: Callable, tmp_path: Path):
    """In a process of its own, where importing torch or transformers or onnx raises."""
    forge_goldens(quick, replace_file, tmp_path, lambda reference: None)
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnxscript', 'onnx_ir'):\n"
        "    sys.modules[name] = None\n"
        "from metaembed.runtime.cli_check import main\n"
        f"sys.exit(main([{str(quick)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "within the fp32 tolerance" in result.stdout
