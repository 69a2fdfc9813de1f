"""Build a bundle's engines for one target: order each from a worker, record what it took, vouch for the result.

No torch, no TensorRT in this process. Engines appear whole or not at all: they are built in a folder beside theirs,
which is renamed when every one is done, and bundle.json vouches for them last.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaembed.runtime.devices import Device
from metaembed.runtime.engines import BUILD_RECORD, ENGINES_FORMAT, ENGINES_VERSION, engines_folder
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.manifest import ENGINES, Bundle, FileRecord, Manifest, record_files, remedy, save_manifest
from metaembed.runtime.staging import scratch_folder
from metaembed.runtime.user_cache import user_cache

from .engine_commands import polygraphy_command, trtexec_command
from .engine_process import Event, run_worker
from .preflight import Preflight
from .profiles import EngineSpec

LOCK = ".lock"  # in engines/, for the moment in which bundle.json is rewritten


@dataclass(frozen=True)
class BuiltEngine:
    """One finished plan and what building it took. In bytes, None where unknown: ``peak_memory`` (anonymous)
    of the builder, ``activations`` as the builder states them for its largest profile."""

    spec: EngineSpec
    record: FileRecord
    version: str
    seconds: float
    peak_memory: int | None
    activations: int | None
    details: Event

    def to_json(self, preflight: Preflight) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "graph": self.spec.graph,
            "plan": f"{self.spec.name}.plan",
            "tf32": self.spec.tf32,
            "bytes": self.record.bytes,
            "sha256": self.record.sha256,
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory,
            "activation_bytes": self.activations,
            "layers": self.details["layers"],
            "tensors": self.details["tensors"],
            "profiles": [profile.to_json() for profile in self.spec.profiles],
            "commands": {
                "polygraphy": polygraphy_command(self.spec, preflight.flavour, preflight.device.capability),
                "trtexec": trtexec_command(self.spec, preflight.flavour, preflight.device.capability, self.version),
            },
        }


def build_engines(
    bundle: Bundle,
    preflight: Preflight,
    *,
    force: bool = False,
    on_event: Callable[[str, Event], None] = lambda engine, event: None,
) -> dict[str, Any]:
    """Build every engine of a checked target into ``engines/<target>/`` of the bundle; returns its build.json.

    ``on_event`` hears of each engine's progress: events of kind ``phase`` and ``step``, with TensorRT's names.

    Raises:
        UsageError: the bundle has engines for this target already, and ``force`` is off; another process is building them.
        MetaEmbedError: the builder refused the graph, crashed, or ran out of memory.
    """
    place = check_place(bundle, preflight.device, force=force)
    log = place.with_name(f"{place.name}.log")
    with _only_builder(place, log), scratch_folder(place) as scratch:
        built = [build_engine(bundle, preflight, spec, scratch, log, on_event) for spec in preflight.engines]
        record = _describe(bundle.manifest, preflight, built)
        (scratch / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _publish(bundle, scratch, place, force=force)
    return record


def check_place(bundle: Bundle, device: Device, *, force: bool) -> Path:
    """Where a device's engines go in the bundle.

    Raises:
        UsageError: it leads out of the bundle, or there are engines already and ``force`` is off.
    """
    place = bundle.folder / engines_folder(device.name)
    if place.is_symlink() or place.parent.is_symlink():
        raise UsageError(f"{place} is a link, and engines are built inside the bundle; remove it first")
    if place.exists() and not force:
        raise UsageError(f"{place} exists already; -f builds it again")
    return place


def build_engine(
    bundle: Bundle,
    preflight: Preflight,
    spec: EngineSpec,
    folder: Path,
    log: Path,
    on_event: Callable[[str, Event], None] = lambda engine, event: None,
) -> BuiltEngine:
    """Build one engine of a checked target into ``folder``; the builder adds its lines to ``log``, which exists."""
    plan = folder / f"{spec.name}.plan"
    order = {
        "onnx": str(bundle.path(spec.graph).resolve()),
        "plan": str(plan.resolve()),
        "capability": preflight.device.capability,
        "profiles": [profile.to_json() for profile in spec.profiles],
        "timing_cache": (cache := timing_cache_path(preflight)) and str(cache),
        "tf32": spec.tf32,
        "log": str(log.resolve()),
    }
    start, read_from = time.monotonic(), log.stat().st_size
    events, peak = run_worker(order, preflight.flavour, lambda event: on_event(spec.name, event))
    seconds = time.monotonic() - start
    activations = read_activations(log.read_bytes()[read_from:].decode(errors="replace"))
    return BuiltEngine(
        spec, FileRecord.of(plan), events["started"]["version"], seconds, peak, activations, events["done"]
    )


def timing_cache_path(preflight: Preflight) -> Path | None:
    """Where tactic timings of this TensorRT and GPU are kept between builds, if anywhere."""
    folder = user_cache()
    return folder and folder / f"{preflight.flavour}-{preflight.version}-sm{preflight.device.capability_text}.timing"


def read_activations(lines: str) -> int | None:
    """The largest activation memory that the builder's log states, in bytes: one line for each profile."""
    found = re.findall(r"Total Activation Memory: (\d+) bytes", lines)
    return max(map(int, found), default=None)


def _describe(manifest: Manifest, preflight: Preflight, built: list[BuiltEngine]) -> dict[str, Any]:
    device = preflight.device
    return {
        "format": ENGINES_FORMAT,
        "format_version": ENGINES_VERSION,
        "target": device.name,
        "compute_capability": list(device.capability),
        "flavour": preflight.flavour,
        "version": built[0].version,
        "strongly_typed": True,
        "built_on_device": preflight.flavour == "tensorrt",
        "bundle": manifest.fingerprint,
        "precision": manifest.precision,
        "quantization": (manifest.quantization or {}).get("type"),
        "estimate": preflight.estimate.to_json(),
        "engines": [engine.to_json(preflight) for engine in built],
    }


def _publish(bundle: Bundle, scratch: Path, place: Path, *, force: bool) -> None:
    """Put the new engines in their place. bundle.json never vouches for a file that is not there: it forgets the old
    engines first and learns of the new ones last. It is read again: other builds may have added theirs meanwhile."""
    prefix = place.relative_to(bundle.folder).as_posix()
    with _only_writer(place.parent):
        if place.exists() and not force:
            raise UsageError(f"{place} was built by another process meanwhile; -f builds it again")
        manifest = Bundle.open(bundle.folder, verify=False, ignore=ENGINES).manifest
        if manifest.fingerprint != bundle.manifest.fingerprint:
            found = f"{bundle.folder} became another bundle while its engines were built"
            raise BundleError(f"{found}; {remedy(bundle.folder, f'{prefix}/{BUILD_RECORD}')}")
        kept = {name: record for name, record in manifest.files.items() if not name.startswith(prefix + "/")}
        if place.exists():
            save_manifest(bundle.folder, replace(manifest, files=kept))
            shutil.rmtree(place)
        scratch.rename(place)
        names = sorted(f"{prefix}/{path.name}" for path in place.iterdir())
        save_manifest(bundle.folder, replace(manifest, files={**kept, **record_files(bundle.folder, names)}))


@contextmanager
def _only_builder(place: Path, log: Path) -> Iterator[None]:
    """An empty log that no other build of this target writes to; the lock goes with the process, however that ends."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{place} is being built by another process; wait for it, or end it first") from None
        file.truncate(0)
        yield


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other build rewrites this bundle's manifest."""
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
