"""The console scripts, before and while the command behind them is imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

SCRIPTS = {
    "metaembed-bench": "metaembed.bench.cli",
    "metaembed-build": "metaembed.export.cli_build",
    "metaembed-calibrate": "metaembed.calibration.cli",
    "metaembed-check": "metaembed.runtime.cli_check",
    "metaembed-export": "metaembed.export.cli",
    "metaembed-index": "metaembed.runtime.cli_index",
    "metaembed-plan": "metaembed.runtime.cli_plan",
    "metaembed-search": "metaembed.runtime.cli_search",
}
# A real signal, in the middle of the import of one module.
INTERRUPTED = """
import signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            print("interrupted in", name, flush=True)
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.{handler})
sys.meta_path.insert(0, Interrupt())
sys.argv = ["/usr/bin/metaembed-index", "compact", "/nowhere"]
from metaembed.commands import index
sys.exit(index())
"""


def interrupted(module: str, handler: str = "default_int_handler") -> tuple[int, str]:
    """Exit code and stderr; tests may themselves run where interrupts are ignored."""
    code = INTERRUPTED.format(module=module, handler=handler)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == f"interrupted in {module}\n"
    return ended.returncode, ended.stderr


def test_every_script_starts_its_own_command():
    scripts = {point.name: point.load() for point in entry_points(group="console_scripts")
               if point.value.startswith("metaembed.")}  # fmt: skip
    assert {name: start.args for name, start in scripts.items()} == {name: (to,) for name, to in SCRIPTS.items()}


@pytest.mark.parametrize("module", ["metaembed.runtime", "numpy", "datetime", "tokenizers"])
def test_an_interrupt_during_the_imports_is_one_sentence(module: str):
    """``datetime`` is imported by numpy's compiled part, which makes an ImportError of any exception."""
    assert interrupted(module) == (130, "metaembed-index: interrupted; nothing half-written was left\n")


def test_an_interrupt_at_work_is_the_commands_own():
    """Its sentence names the verb. The module is one that the verb imports."""
    expected = (130, "metaembed-index compact: interrupted; nothing half-written was left\n")
    assert interrupted("metaembed.runtime.index_writer") == expected


def test_an_interrupt_that_is_to_be_ignored_is_ignored():
    """As nohup and a shell's & have it."""
    code, error = interrupted("numpy", handler="SIG_IGN")
    assert code == 2
    assert "/nowhere is no index" in error
