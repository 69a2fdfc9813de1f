"""How deep payloads may be nested. JSON sets no limit; what reads it does, each another."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any

from .errors import MetaEmbedError, UsageError

# What MongoDB and MySQL allow, too. Python's reader gives up where the stack ends, at 980 levels or so; SQLite's at 2,000, or
# at 1,000 (3.40 and 3.51), and then for every item that it is asked about.
MOST_LEVELS = 100
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[^][{}"]+')


def check_levels(text: str, whose: str) -> None:
    """Refuse JSON whose objects and lists lie deeper within each other than `MOST_LEVELS`."""
    if text.count("{") + text.count("[") > MOST_LEVELS:
        steps = (1 if sign in "[{" else -1 for sign in _NOT_BRACKETS.sub("", text))
        if max(accumulate(steps)) > MOST_LEVELS:
            raise too_deep(whose)


def too_deep(whose: str) -> UsageError:
    return UsageError(
        f"{whose} is nested too deep: objects and lists lie at most {MOST_LEVELS} levels within each other"
    )


def read_payload(text: str | None, whose: str) -> Any:
    """The payload of a row; before there was a limit, it may have been stored deeper than this stack can read it.

    Raises:
        MetaEmbedError: it was.
    """
    try:
        return None if text is None else json.loads(text)
    except RecursionError:
        raise MetaEmbedError(
            f"{whose} is nested too deep to be read here; store it again with at most {MOST_LEVELS} levels"
        ) from None
