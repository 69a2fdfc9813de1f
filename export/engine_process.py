"""Run one builder in a process of its own, watch its memory from outside, and say in one sentence why it failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaembed.runtime.errors import MetaEmbedError

from .memory import gib

Event = dict[str, Any]
POLL_SECONDS = 0.02
# glibc keeps freed blocks for later, of up to 32 MB once it has seen such, and a builder's copies of weights are of that size.
# With a fixed threshold they go back at once. Peaks of 3B in bf16, single runs: language 10.78 -> 10.45 GB, vision 2.40 ->
# 2.29 and 2.37 GB. mallopt(3).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def run_worker(order: Event, flavour: str, on_event: Callable[[Event], None]) -> tuple[dict[str, Event], int | None]:
    """Run one worker to its end: the last event of each kind, and the peak of its anonymous memory in bytes.

    Raises:
        MetaEmbedError: it failed; the sentence holds the builder's first error, or that memory ran out.
    """
    environment = {
        **MALLOC,
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
            f"or quantise to INT8 (metaembed-calibrate --quantize int8)"
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
