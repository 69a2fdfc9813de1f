"""The habits that all commands share: one sentence per mistake, exit codes 0, 1 and 2, logging, progress bars."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from .errors import MetaEmbedError, UsageError

T = TypeVar("T")
EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_INTERRUPTED = 130  # 128 and the signal's number
INTERRUPTED = "interrupted; nothing half-written was left"
# Numbers of the signals that ended the work. Not by the exception: some libraries make another one of it (onnxruntime, interrupted
# in its import, an ImportError: 2 of 20 interrupts).
_caught: list[int] = []


class Parser(argparse.ArgumentParser):
    """argparse with the project's habits: ``--quiet`` and ``--verbose``, and one-line errors that exit with 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def add_common(self) -> None:
        self.add_argument("--quiet", action="store_true", help="print results and errors only")
        self.add_argument("--verbose", action="store_true", help="log what is being done, and tracebacks")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def natural(text: str) -> int:
    """An argparse type: a whole number from 0 on, as seeds are."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


natural.__name__ = "number from 0 on"  # argparse prints it


def counted(number: int, noun: str) -> str:
    """``1 item``, ``2,000 items``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def run_command(
    parser: Parser, work: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parse, work, and turn every expected failure into one sentence on stderr and an exit code (0, 1 or 2)."""
    args = parser.parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    level = logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.WARNING
    logging.getLogger("metaembed").setLevel(level)  # not the root: Pillow and torch would flood --verbose
    _catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show is escaped, never a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return work(args) or EXIT_DONE
    except UsageError as error:
        return _fail(parser, args, str(error), EXIT_USAGE)
    except MetaEmbedError as error:
        return _fail(parser, args, str(error), EXIT_FAILED)
    except MemoryError:
        return _fail(parser, args, "out of memory; close other programs or use a machine with more", EXIT_FAILED)
    except BrokenPipeError:  # the reader (head, less) has left; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        return _fail(parser, args, _os_sentence(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail(parser, args, INTERRUPTED, EXIT_INTERRUPTED)


def _catch_signals() -> None:
    """Ctrl-C, and SIGTERM: of a container's end, a time limit, a cancelled job. What the one cleans up, the other does too."""
    _caught.clear()
    if threading.current_thread() is threading.main_thread():
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == default:
                signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    _caught.append(number)
    raise KeyboardInterrupt


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return on_one_line(super().formatMessage(record))


def _os_sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full{f' ({error.filename})' if error.filename else ''}; free some space and run again"
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _fail(parser: Parser, args: argparse.Namespace, sentence: str, code: int) -> int:
    if _caught:
        sentence, code = INTERRUPTED, 128 + _caught[-1]
    if args.verbose:
        logging.getLogger(parser.prog).exception("traceback follows")
    print(on_one_line(f"{parser.prog}: {sentence}"), file=sys.stderr)
    return code


def on_one_line(text: str) -> str:
    """A text of somebody's data for a terminal: line breaks and control signs as escapes, lest they pass for output."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def progress(items: Iterable[T], what: str, *, quiet: bool = False) -> Iterable[T]:
    """The items, with a progress bar on stderr while they are worked on; no bar where stderr is not a terminal."""
    return tqdm(items, desc=what, disable=True if quiet else None, leave=False)


def byte_bar(what: str, *, quiet: bool = False) -> tqdm[Any]:
    """A bar of bytes written; call ``update`` and ``close``. Silent where stderr is not a terminal."""
    return tqdm(desc=what, disable=True if quiet else None, leave=False, unit="B", unit_scale=True, unit_divisor=1024)
