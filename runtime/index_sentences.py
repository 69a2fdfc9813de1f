"""What SQLite reports against a catalogue, as one sentence each."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BundleError, MetaEmbedError, UsageError

BUSY_SECONDS = 30
# What SQLite says, what follows from it. A journal that a killed writer left is looked for first: see `_unfinished`.
TROUBLES = {
    "unable to open": "{path} cannot be opened; is {path.parent} an index, and readable?",
    "disk is full": "the disk is full; nothing of this batch was kept; free some space and run again",
    "disk I/O error": "{path} could not be read or written (disk I/O error): the disk fails, or a limit on the size of files "
    "(ulimit -f) is reached; nothing of this batch was kept",
    "readonly": "{path} cannot be written: the file or its disk is read-only",
    "locked": f"{{path}} stayed locked by another process for {BUSY_SECONDS} s; try again",
}
DAMAGED = ("no such", "malformed", "decode")  # of a schema that was checked, and of values that were valid when written


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn the errors of statements to the catalogue at `path` into ours."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise UsageError(f"the index {path.parent} is closed") from error
    except sqlite3.OperationalError as error:
        raise _trouble(path, on_one_line(error)) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damage(path, f"({on_one_line(error)})") from error


def on_one_line(said: object) -> str:
    """What SQLite says, which may quote a damaged schema, and breaks its reports into lines."""
    return " ".join(str(said).split())


def damage(path: Path, what: str) -> BundleError:
    """The sentence for a damaged catalogue."""
    return BundleError(f"{path} is damaged {what}; restore it, or index again")


def _trouble(path: Path, reason: str) -> MetaEmbedError:
    if reason == "malformed JSON":
        return BundleError(
            f"{path} holds a payload that conditions cannot read: it is nested too deep, or damaged; store it again"
        )
    if any(word in reason for word in DAMAGED):
        return damage(path, f"({reason})")
    if ("readonly" in reason or "unable to open" in reason) and (unfinished := _unfinished(path)):
        return unfinished
    for word, sentence in TROUBLES.items():
        if word in reason:
            return MetaEmbedError(sentence.format(path=path))
    return MetaEmbedError(f"{path} cannot be used ({reason}); restore it, or index again")


def _unfinished(path: Path) -> MetaEmbedError | None:
    journal = path.with_name(f"{path.name}-journal")
    if not journal.exists():
        return None
    return MetaEmbedError(
        f"{path.parent} cannot be read from where it may not be written: a writer was killed in a transaction, which "
        f"{journal.name} has to undo first; open the index once with its disk writable, or copy its folder to a disk that is"
    )
