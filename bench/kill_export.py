"""Kill exports at random moments: each must leave a whole bundle or none, and the next run must clean up and succeed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.manifest import Bundle

from .export import COMMAND


@dataclass(frozen=True)
class KillRecord:
    """What was found after each kill: whole bundles, and no bundle. Anything else raises."""

    kills: int
    whole: int
    none: int
    seconds_of_one_export: float


def kill_exports(work: Path, kills: int, seed: int = 0) -> KillRecord:
    """SIGKILL ``kills`` exports of the demo at uniformly random moments of their life.

    Raises:
        MetaEmbedError: a kill left a bundle that is not whole, or the last, undisturbed run left anything beside its bundle.
    """
    output, chance = work / "bundle", random.Random(seed)
    start = time.perf_counter()
    if _export(output).wait() != 0:
        raise MetaEmbedError("the undisturbed export failed")
    seconds = time.perf_counter() - start
    whole = 0
    for _ in range(kills):
        process = _export(output)
        time.sleep(chance.uniform(0, 1.05 * seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole += _is_whole(output)
    _export(output).wait()
    left = sorted(path.name for path in work.iterdir())
    if left != [output.name] or not _is_whole(output):
        raise MetaEmbedError(f"after an undisturbed export there is {left}")
    return KillRecord(kills, whole, kills - whole, round(seconds, 1))


def _export(output: Path) -> subprocess.Popen[bytes]:
    arguments = ["--model", "demo", "--budget", "8,16", "--no-parity", "--quiet", "-f", "-o", str(output)]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments])


def _is_whole(output: Path) -> bool:
    """Whether there is a bundle; one that is not whole raises BundleError. Every hash is checked."""
    if not output.exists():
        return False
    Bundle.open(output)
    return True
