"""Locks that a forked child finds free: of its parent's threads it has one, and what the others held would stay held for ever."""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

_TURNS: WeakSet[Turn] = WeakSet()
_FORKING = threading.RLock()
_held: list[Turn] = []  # while the process forks


class Turn:
    """A lock that one thread may take several times; use it with ``with``.

    Args:
        awaited: forks wait until no other thread holds it, since a child could make nothing of what is half done.
    """

    def __init__(self, *, awaited: bool = False) -> None:
        self.awaited = awaited
        self.lock = threading.RLock()
        with _FORKING:
            _TURNS.add(self)

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def _before() -> None:
    _FORKING.acquire()
    for turn in _TURNS:
        if turn.awaited:
            turn.lock.acquire()
            _held.append(turn)


def _after() -> None:
    while _held:
        _held.pop().lock.release()
    _FORKING.release()


def _after_in_child() -> None:
    for turn in _TURNS:
        if turn.lock.acquire(blocking=False):  # free, or held by the thread that forked, which will let go of it
            turn.lock.release()
        else:
            turn.lock = threading.RLock()
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
