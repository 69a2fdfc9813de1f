"""The way in of every console command: an interrupt is one sentence before the command has been imported, too.

This package is outside `metaembed.runtime` because that one's `__init__.py` imports numpy, Pillow and tokenizers (0.3 s and more).
"""

from __future__ import annotations

if __name__ != "metaembed.commands":
    raise ImportError(f"import metaembed.commands, not {__name__!r}: a second copy of every module would follow")

# No other modules: until these are imported an interrupt is a traceback, and all but signal are there when Python has started.
import os
import signal
import sys
from functools import partial

EXIT_INTERRUPTED = 130


def _start(module: str) -> int:
    """Import a command and run it; at work `metaembed.runtime.command.run_command` answers an interrupt."""
    # No exception would do: numpy, interrupted in its import, calls itself wrongly installed (2 of 40 interrupts).
    if heeds := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from importlib import import_module

    main = import_module(module).main
    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return int(main())


def _leave(*_: object) -> None:
    """Nothing has been opened or written yet, so there is nothing to clean up."""
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: interrupted; nothing half-written was left\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


bench = partial(_start, "metaembed.bench.cli")
build = partial(_start, "metaembed.export.cli_build")
calibrate = partial(_start, "metaembed.calibration.cli")
check = partial(_start, "metaembed.runtime.cli_check")
export = partial(_start, "metaembed.export.cli")
index = partial(_start, "metaembed.runtime.cli_index")
plan = partial(_start, "metaembed.runtime.cli_plan")
search = partial(_start, "metaembed.runtime.cli_search")
