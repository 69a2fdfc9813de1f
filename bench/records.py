"""Measurements as JSON lines: one object each, with what was measured, on which machine, with which tools, by which command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.manifest import MANIFEST, Bundle, FileRecord
from metaembed.runtime.maxsim_native import describe_kernels
from metaembed.runtime.memory import GIB

Record = dict[str, Any]

TOOLS = (
    "metaembed-export",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "tensorrt",
    "tensorrt-rtx",
)
ORIGIN = (
    "artefact",
    "sha256",
    "machine",
    "versions",
    "threads",
    "command",
    "at",
)  # the fields that say where it is from


class StoredRecord(dict[str, Any]):
    """A record that was read: a field that it lacks is damage, and named."""

    def __missing__(self, field: str) -> Any:
        raise BundleError(f"a record of kind {self.get('kind')!r} lacks {field!r}; was it written by another version?")


def make_record(kind: str, values: Record, artefact: Path | None = None) -> Record:
    """One measurement with its origin. ``artefact`` is a bundle, another file, or None for arithmetic and the machine itself."""
    return {"kind": kind, **values, **identify(artefact), **_origin()}


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a JSON lines file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def check_output(path: Path) -> None:
    """A UsageError where `append_records` will fail: better before hours of measuring than after them."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; -o takes a file of records, for example {path / 'records.jsonl'}")
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK) or not (place == path or place.is_dir()):
        raise UsageError(f"{path} cannot be written ({place} does not allow it); -o takes a file of records")


def read_records(paths: Sequence[Path]) -> list[Record]:
    """All records of JSON lines files, and of those in folders, in order; one without a kind has its file's name as kind.

    Raises:
        UsageError: a path is missing, or a folder has no .jsonl file.
        BundleError: a line is no JSON object.
    """
    files = [file for path in paths for file in _files(path)]
    return [
        StoredRecord({"kind": file.stem, **_parse(line, f"{file}, line {number}")})
        for file in files
        for number, line in _lines(file)
    ]


@contextmanager
def as_measured() -> Iterator[None]:
    """Turns what a record's value of a strange kind causes (null, a text for a number) into a sentence."""
    try:
        yield
    except MetaEmbedError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"a record holds a value that no measurement writes ({error}); --verbose says where"
        ) from error


def latest(records: Iterable[Record], *keys: str) -> list[Record]:
    """The last record of each combination of these fields: a measurement taken again replaces the first."""
    return list({tuple(str(record.get(key)) for key in keys): record for record in records}.values())


def of_kind(records: Iterable[Record], kind: str, *keys: str) -> list[Record]:
    """The latest records of one kind, told apart by these fields."""
    return latest((record for record in records if record["kind"] == kind), *keys)


def by_kernels(records: Iterable[Record], kind: str, *keys: str) -> list[Record]:
    """The latest records of one kind for each sort of processor, told apart by these fields; ``kernels`` names the sort."""
    named = (StoredRecord(record, kernels=record.get("machine", {}).get("kernels", "")) for record in records)
    return sorted(of_kind(named, kind, "kernels", *keys), key=lambda record: record["kernels"])


def group(records: Iterable[Record], *keys: str) -> dict[tuple[str, ...], list[Record]]:
    """Records by the values of these fields, in the order of their first appearance."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(str(record[key]) for key in keys), []).append(record)
    return found


@cache
def describe_machine() -> Record:
    """Processor, cores, what scoring uses of it, memory and system; a GPU by name where the driver tells one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "kernels": describe_kernels(),
        "memory_gib": round(memory / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": _gpu_name(),
    }


@cache
def tool_versions() -> dict[str, str]:
    """Versions of the tools that are installed here, Python among them."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identify(artefact: Path | None) -> Record:
    """What was measured: a name for people, and the fingerprint or hash that says which one exactly."""
    if artefact is None:
        return {"artefact": None, "sha256": None}
    if (artefact / MANIFEST).is_file():
        manifest = Bundle.open(artefact, verify=False).manifest
        kind = manifest.precision
        if manifest.quantization is not None:
            kind = f"{manifest.quantization['type']} from {kind}"
        return {"artefact": f"{manifest.model} bundle, {kind}", "sha256": manifest.fingerprint}
    return {"artefact": artefact.name, "sha256": FileRecord.of(artefact).sha256}


def _origin() -> Record:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    program = Path(sys.argv[0]).name
    command = shlex.join(
        ["metaembed-bench" if program == "cli.py" else program, *map(_without_folders, sys.argv[1:])]  # python -m
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "machine": describe_machine(),
        "versions": tool_versions(),
        "threads": int(threads) if threads and threads.isdigit() else os.cpu_count(),
        "command": command,
        "at": now,
    }


def _without_folders(word: str) -> str:
    """An absolute path by its last part: a record tells nothing of a machine's folders."""
    return re.sub(r"(^|=)/\S*/(?=[^/])", r"\1", word)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str | None:
    from metaembed.runtime.cuda import find_gpu

    gpu = find_gpu()
    return None if gpu is None else gpu.name


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if not found:
            raise UsageError(
                f"{path} holds no records (*.jsonl); the other metaembed-bench commands write them with -o"
            )
        return found
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a file of records (JSON lines) or a folder of them")
    return [path]


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 text ({error})") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BundleError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind", ""), str):
        raise BundleError(f"{where} is no record: an object is needed, and its kind a word")
    return record
