"""A SQLite file as its users share it: threads take turns, and a forked child opens it for itself."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .fork import Turn
from .index_sentences import BUSY_SECONDS, sentences

_INHERITED: list[sqlite3.Connection] = []  # a parent's, which SQLite forbids a child even to close


class Database:
    """A connection with one transaction at a time.

    In a forked child SQLite would take its parent's locks on the file for its own. So forks wait until transactions end, and
    the child reads through another connection; what was opened for writing remains the parent's.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._write, self._closed = write, False
        self._turn = Turn(awaited=True)
        with sentences(path), self._turn:
            self._connect()

    def close(self) -> None:
        with self._turn:
            self._closed = True
            if self._pid == os.getpid():
                self._db.close()

    def version(self) -> tuple[int, int]:
        """Changes whenever another connection has committed, and in a forked child."""
        with self._sentences():
            return self._pid, int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _connect(self) -> None:
        # mode=rw also for readers: after a writer was killed, the first to open the file rolls its journal back.
        # SQLite itself falls back to reading where the file may not be written.
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, check_same_thread=False,
            isolation_level=None,
        )  # fmt: skip
        try:
            db.execute(f"PRAGMA query_only = {int(not self._write)}")
            db.execute("PRAGMA synchronous = EXTRA")  # the journal's removal is the commit: it must be durable too
        except BaseException:
            db.close()
            raise
        self._db, self._pid = db, os.getpid()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn what SQLite reports into one sentence; one thread at a time."""
        with sentences(self.path), self._turn:
            if self._closed:
                raise sqlite3.ProgrammingError("closed")
            if self._pid != os.getpid():
                if self._write:
                    raise UsageError(
                        f"{self.path.parent} was opened for writing before the process forked; open it anew"
                    )
                _INHERITED.append(self._db)
                self._connect()
            yield

    @contextmanager
    def _transaction(self, begin: str, end: str) -> Iterator[None]:
        self._db.execute(begin)
        try:
            yield
            self._db.execute(end)
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
