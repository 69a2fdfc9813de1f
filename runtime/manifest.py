"""A bundle on disk: bundle.json, and the check that every file it names is whole before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from .budget import Budget
from .errors import BundleError, MetaEmbedError, UsageError
from .geometry import Geometry
from .parity import TOLERANCES
from .staged_file import staged_file
from .unicode import is_unicode

T = TypeVar("T")
FORMAT, FORMAT_VERSION = "metaembed-bundle", 1
MANIFEST = "bundle.json"
VISION, LANGUAGE, SCORER = "vision.onnx", "language.onnx", "scorer.onnx"  # the scorer is missing from older bundles
TOKENIZER, PROCESSOR = "tokenizer.json", "processor.json"
ENGINES = "engines/"  # what metaembed-build adds
UNVERIFIED = "unverified"
# 20 holds primitive operators only, which TensorRT 10.3 (JetPack 6.2) parses; 23 adds Attention and RMSNormalization.
OPSETS = (20, 23)
DEFAULT_OPSET = OPSETS[0]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 0:
            raise BundleError(f"a file cannot have {self.bytes!r} bytes")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise BundleError(f"{self.sha256!r} is no SHA-256")

    @classmethod
    def of(cls, path: Path, stopped: threading.Event | None = None) -> FileRecord:
        """Read a file. A RuntimeError when ``stopped`` is set before its end."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, sha256_of(file, stopped))


@dataclass(frozen=True)
class Limits:
    """The longest input: visual tokens of an image, and tokens of the user's text."""

    image_tokens: int = 1024
    text_tokens: int = 512

    def __post_init__(self) -> None:
        if not (type(self.image_tokens) is int is type(self.text_tokens) and min(asdict(self).values()) >= 1):
            raise UsageError(
                f"limits of {self.image_tokens} image tokens and {self.text_tokens} text tokens are not positive numbers"
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """bundle.json. ``files`` maps each path, relative and with forward slashes, to its record.

    ``parity`` is the record of the export's own check, or None where it was skipped: the bundle is then unverified.
    """

    model: str
    geometry: Geometry
    budgets: tuple[Budget, ...]
    limits: Limits
    precision: str
    template: Mapping[str, str]
    files: Mapping[str, FileRecord]
    quantization: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None
    opset: int = DEFAULT_OPSET
    tools: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise UsageError("a bundle serves at least one budget")
        for budget in self.budgets:
            budget.check_within(self.geometry.query_tokens, self.geometry.candidate_tokens)
        if self.opset not in OPSETS:
            raise UsageError(f"opset {self.opset} is not one of {', '.join(map(str, OPSETS))}")
        kinds = (self.precision,) if self.quantization is None else (self.precision, self.quantization["type"])
        for kind in kinds:
            if kind not in TOLERANCES:
                raise UsageError(f"precision {kind!r} is not one of {', '.join(TOLERANCES)}")

    @property
    def fingerprint(self) -> str:
        """Identifies what decides an embedding: the graphs, the weights and the preprocessing. An index keeps it."""
        prompt = json.dumps([dict(self.template), self.limits.text_tokens], sort_keys=True)
        parts = sorted(
            f"{path} {record.sha256}"
            for path, record in self.files.items()
            if not path.startswith(("golden/", ENGINES)) and path != SCORER
        )
        return hashlib.sha256("\n".join([prompt, *parts]).encode()).hexdigest()

    @property
    def largest(self) -> Budget:
        """The most vectors that any exported budget asks of each side."""
        return Budget(max(b.query for b in self.budgets), max(b.candidate for b in self.budgets))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "precision": self.precision,
            "opset": self.opset,
            "quantization": self.quantization,
            "budgets": [[budget.query, budget.candidate] for budget in self.budgets],
            "limits": asdict(self.limits),
            "parity": self.parity or UNVERIFIED,
            "geometry": self.geometry.to_json(),
            "template": dict(self.template),
            "tools": dict(self.tools),
            "files": {path: asdict(record) for path, record in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what ``to_json`` wrote.

        Raises:
            BundleError: another format or version, or a field that is missing or of the wrong kind.
        """
        if data.get("format") != FORMAT or data.get("format_version") != FORMAT_VERSION:
            found = f"{data.get('format')!r} version {data.get('format_version')!r}"
            raise BundleError(f"this version reads {FORMAT!r} version {FORMAT_VERSION}, not {found}; export again")
        try:
            return cls(
                model=_expect(str, data["model"]),
                geometry=Geometry.from_json(data["geometry"]),
                budgets=tuple(
                    Budget(_expect(int, query), _expect(int, candidate)) for query, candidate in data["budgets"]
                ),
                limits=Limits(data["limits"]["image_tokens"], data["limits"]["text_tokens"]),
                precision=_expect(str, data["precision"]),
                template=_expect(dict, data["template"]),
                files={path: FileRecord(**record) for path, record in data["files"].items()},
                quantization=None if data.get("quantization") is None else _expect(dict, data["quantization"]),
                parity=_passed_parity(data["parity"]),
                opset=_expect(int, data.get("opset", DEFAULT_OPSET)),
                tools=_expect(dict, data.get("tools", {})),
            )
        except (MetaEmbedError, KeyError, TypeError, ValueError, AttributeError) as error:
            found = str(error) if isinstance(error, MetaEmbedError) else f"{type(error).__name__}: {error}"
            raise BundleError(f"{MANIFEST} is damaged ({found})") from None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Every file has been checked, but for what ``open`` left out."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True, ignore: str | None = None) -> Bundle:
        """Read bundle.json and check each file's size and, with ``verify``, its SHA-256.

        ``ignore`` leaves out the files below one folder (``engines/``), which are about to be written anew: of those
        only the names are checked.

        Raises:
            UsageError: the folder holds no bundle.
            BundleError: a file is missing, changed or truncated, or a path leaves the folder.
        """
        folder = Path(folder)
        check_name(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise UsageError(f"{folder} holds no bundle ({MANIFEST} is missing); metaembed-export writes one")
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON ({error})") from None
        if not isinstance(data, dict):
            raise BundleError(f"{path} is not a JSON object")
        bundle = cls(folder, Manifest.from_json(data))
        bundle._check_files(verify, ignore)
        return bundle

    @property
    def unverified(self) -> bool:
        return self.manifest.parity is None

    def path(self, name: str) -> Path:
        """The place of a file that the manifest vouches for."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder} has no {name}; it is not complete")
        return self.folder / name

    def _check_files(self, verify: bool, ignore: str | None) -> None:
        files = self.manifest.files
        for name in files:
            _check_name(name)
        checked = {name: files[name] for name in files if ignore is None or not name.startswith(ignore)}
        for name, record in checked.items():
            path = _check_place(self.folder, name)
            if path.stat().st_size != record.bytes:
                found = f"{path} has {path.stat().st_size} bytes instead of {record.bytes}"
                raise BundleError(f"{found}; {remedy(self.folder, name)}")
        if verify:
            for name in find_changed(self.folder, checked):
                found = f"{self.folder / name} has changed since it was written (SHA-256)"
                raise BundleError(f"{found}; {remedy(self.folder, name)}")


def remedy(folder: Path, name: str) -> str:
    """What to do about a damaged or missing file: engines are built again, all else comes from an export."""
    parts = PurePosixPath(name).parts
    if parts[0] == "weights":
        return "export again (weights are hard links: was the checkpoint written over in place?)"
    if not name.startswith(ENGINES) or len(parts) < 3:
        return "export again"
    return f"build again: {rebuild_command(folder, parts[1])}"


def rebuild_command(folder: Path, target: str | None = None) -> str:
    """The command that replaces a target's engines, or those of this machine's GPU, as a shell takes it."""
    return shlex.join(["metaembed-build", str(folder), *(["--target", target] if target else []), "-f"])


def _expect(kind: type[T], value: Any) -> T:
    """The value itself, when it is of that JSON type (true is no number)."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:50]!r} is not of type {kind.__name__}")
    return value


def _passed_parity(value: Any) -> Mapping[str, Any] | None:
    """Fail closed: a bundle is verified by a record that says so, and by nothing else."""
    if value == UNVERIFIED:
        return None
    if _expect(dict, value).get("passed") is not True:
        raise ValueError(f"parity is neither {UNVERIFIED!r} nor a record that passed")
    record: Mapping[str, Any] = value
    return record


def find_changed(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Names of the files whose SHA-256 is not the recorded one."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda name: FileRecord.of(folder / name), files)
        return [name for name, record in zip(files, found, strict=True) if record != files[name]]


def sha256_of(file: BinaryIO, stopped: threading.Event | None = None) -> str:
    """SHA-256 of an open file, in hexadecimal. A RuntimeError when ``stopped`` is set before its end."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := file.read(1 << 22):
        if stopped is not None and stopped.is_set():
            raise RuntimeError("hashing was stopped")
        digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of files in a folder, by name."""
    return {name: FileRecord.of(folder / name) for name in names}


def write_manifest(
    folder: Path, manifest: Manifest, skip: Sequence[str] = (), known: Mapping[str, FileRecord] = {}
) -> Manifest:
    """Record every file of the folder, those in subfolders ``skip`` aside, and write bundle.json; returns it.

    ``known`` holds records that were made before, which saves reading those files again.
    """
    relative = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.as_posix() for path in relative if path.parts[0] not in (MANIFEST, *skip)]
    files = {name: known[name] if name in known else FileRecord.of(folder / name) for name in names}
    manifest = replace(manifest, files=files)
    save_manifest(folder, manifest)
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace bundle.json in one step."""
    with staged_file(folder / MANIFEST) as part:
        part.write_text(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_name(folder: Path) -> None:
    """A UsageError for a name that is not valid Unicode: neither ONNX Runtime nor JSON can express it."""
    if not is_unicode(str(folder.absolute())):
        raise UsageError(f"the name {str(folder)!r} is not valid Unicode; give the folder another")


def cpu_graph(graph: str) -> str:
    """Name of the float32 twin of a bf16 or fp16 graph: ``language.onnx`` -> ``language.cpu.onnx``."""
    return graph.replace(".onnx", ".cpu.onnx")


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}")


def _check_place(folder: Path, name: str) -> Path:
    advice = f"; {remedy(folder, name)}" if name.startswith(ENGINES) else ""
    try:
        resolved = (folder / name).resolve()
        present = resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, not encodable
        raise BundleError(f"{MANIFEST} names a file that cannot be there: {name[:50]!a} ({error!a})"[:400]) from None
    if not resolved.is_relative_to(folder.resolve()):
        raise BundleError(f"{folder / name} is a link that leaves the bundle{advice}")
    if not present:
        raise BundleError(f"{folder / name} is missing; the bundle is not complete{advice}")
    return folder / name
