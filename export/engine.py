"""Build a bundle's engines for one target: order each from a worker, record what it took, vouch for the result.

No torch, no TensorRT in this process. Engines appear whole or not at all: they are built in a folder beside theirs,
which is renamed when every one is done, and bundle.json vouches for them last.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaembed.runtime.engines import BUILD_RECORD, ENGINES_FORMAT, ENGINES_VERSION, engines_folder
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.manifest import Bundle, FileRecord, Manifest, record_files, save_manifest

from .engine_commands import polygraphy_command, trtexec_command
from .preflight import Preflight, gib
from .profiles import SCORER, EngineSpec

Event = dict[str, Any]
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class BuiltEngine:
    """One finished plan and what building it took. ``peak_memory`` is anonymous, in bytes, None where it is unknown."""

    spec: EngineSpec
    record: FileRecord
    version: str
    seconds: float
    peak_memory: int | None
    details: Event

    def to_json(self, preflight: Preflight) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "graph": self.spec.graph,
            "plan": f"{self.spec.name}.plan",
            "bytes": self.record.bytes,
            "sha256": self.record.sha256,
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory,
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
        UsageError: the bundle has engines for this target already, and ``force`` is off.
        MetaEmbedError: the builder refused the graph, crashed, or ran out of memory.
    """
    name = preflight.device.name
    place = bundle.folder / engines_folder(name)
    if place.exists() and not force:
        raise UsageError(f"{place} exists already; -f builds it again")
    log = place.with_name(f"{name}.log")
    with _scratch(place) as scratch:
        log.write_text("", encoding="utf-8")
        built = [_build(bundle, preflight, spec, scratch, log, on_event) for spec in preflight.engines]
        record = _describe(bundle.manifest, preflight, built)
        (scratch / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _publish(bundle, scratch, place)
    return record


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    scratch = place.with_name(f".{place.name}.{os.getpid()}.part")
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(
    bundle: Bundle,
    preflight: Preflight,
    spec: EngineSpec,
    folder: Path,
    log: Path,
    on_event: Callable[[str, Event], None],
) -> BuiltEngine:
    plan = folder / f"{spec.name}.plan"
    order = {
        "onnx": str(bundle.path(spec.graph).resolve()),
        "plan": str(plan.resolve()),
        "capability": preflight.device.capability,
        "profiles": [profile.to_json() for profile in spec.profiles],
        "timing_cache": str(timing_cache_path(preflight)),
        "tf32": spec.graph == SCORER,  # it widens bf16, which TensorFloat-32 holds exactly
        "log": str(log.resolve()),
    }
    start = time.monotonic()
    events, peak = run_worker(order, preflight.flavour, lambda event: on_event(spec.name, event))
    done = events["done"]
    return BuiltEngine(
        spec, FileRecord.of(plan), events["started"]["version"], time.monotonic() - start, peak, details=done
    )


def timing_cache_path(preflight: Preflight) -> Path:
    """Where tactic timings of this TensorRT and GPU are kept between builds (XDG cache folder)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "metaembed"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{preflight.flavour}-{preflight.version}-sm{preflight.device.capability_text}.timing"


def run_worker(order: Event, flavour: str, on_event: Callable[[Event], None]) -> tuple[dict[str, Event], int | None]:
    """Run one worker to its end: the last event of each kind, and the peak of its anonymous memory in bytes.

    Raises:
        MetaEmbedError: it failed; the sentence holds the builder's first error, or that memory ran out.
    """
    environment = {
        **os.environ,
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if flavour == "tensorrt_rtx" else "0",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "metaembed.export.engine_worker"],
        cwd=Path(order["plan"]).parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    last: dict[str, Event] = {}
    try:
        with MemoryWatch(worker.pid) as watch:
            worker.stdin.write(json.dumps(order))
            worker.stdin.close()
            for line in worker.stdout:
                event = json.loads(line)
                last[event["event"]] = event
                on_event(event)
            code = worker.wait()
    finally:
        worker.kill()
        early = worker.stderr.read()  # only what failed before the log took over: an import
        worker.wait()
    if code != 0 or "done" not in last:
        raise MetaEmbedError(_failure(code, last, early, Path(order["log"]), watch.peak))
    return last, watch.peak


class MemoryWatch:
    """The peak of a process's anonymous memory, sampled from outside while it runs (Linux; elsewhere None).

    Anonymous, because mapped weight files can be dropped by the system at any time and what must fit is the rest.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak: int | None = None

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                status = self._status.read_text(encoding="ascii")
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak or 0, int(line.split()[1]) * 1024)


def _failure(code: int, events: dict[str, Event], early: str, log: Path, peak: int | None) -> str:
    """One sentence about why a worker did not deliver."""
    if code == -signal.SIGKILL:
        used = f" at {gib(peak)}" if peak else ""
        return (
            f"the builder was killed{used}, most likely because memory ran out; close other programs, add swap, "
            f"or export with fewer --max-image-tokens"
        )
    if code < 0:
        return f"the builder crashed ({signal.Signals(-code).name}); its log is {log}"
    if early and "failed" not in events and "started" not in events:
        return f"the builder could not start: {early.strip().splitlines()[-1]}"
    return f"the builder refused the graph: {_first_error(log) or events.get('failed', {}).get('reason')}; log: {log}"


NODE_DUMP = ("Begin node", "End node", "While parsing")  # the parser prints the node that it failed at, line by line


def _first_error(log: Path) -> str | None:
    """The first error of a Polygraphy log that says something, without its marker."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip()
        if text.startswith("[E]") and not any(part in text for part in NODE_DUMP):
            return text.removeprefix("[E]").strip().rstrip(".!")
    return None


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


def _publish(bundle: Bundle, scratch: Path, place: Path) -> None:
    """Put the new engines in their place. bundle.json never vouches for a file that is not there: it forgets the old
    engines first and learns of the new ones last."""
    prefix = place.relative_to(bundle.folder).as_posix()
    kept = {name: record for name, record in bundle.manifest.files.items() if not name.startswith(prefix + "/")}
    if place.exists():
        save_manifest(bundle.folder, replace(bundle.manifest, files=kept))
        shutil.rmtree(place)
    scratch.rename(place)
    names = sorted(f"{prefix}/{path.name}" for path in place.iterdir())
    save_manifest(bundle.folder, replace(bundle.manifest, files={**kept, **record_files(bundle.folder, names)}))
