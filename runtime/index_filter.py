"""Conditions on payload fields, ``year>=2020``, as parametrised SQL: no text of a user ever becomes part of a statement."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from .errors import UsageError
from .unicode import is_unicode

OPERATORS = {"=": "=", "==": "=", "!=": "<>", "<=": "<=", ">=": ">=", "<": "<", ">": ">"}
# Names may hold anything that is neither an operator nor a sign of JSON paths: they are quoted in one.
_NAME = r'[^\s.=!<>"\\](?:[^.=!<>"\\]*[^\s.=!<>"\\])?'
_CONDITION = re.compile(rf"\s*({_NAME}(?:\.{_NAME})*)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*", re.DOTALL)


KINDS: dict[type | tuple[type, ...], str] = {
    bool: "'true', 'false'",
    str: "'text'",
    (int, float): "'integer', 'real'",
}  # what SQLite calls them in JSON
# SQLite 3.40 ends a text of JSON at its first NUL, which json.dumps writes as \u0000; one put back keeps it from equalling what
# stands before it, and in its order. Without pairs of backslashes, which stand for one, what is left before a u is an escape.
TEXT = r"""json_extract(payload, ?) || CASE WHEN instr(payload, '\u0000')
    AND instr(replace(json_extract(payload, ?, ?), '\\', ''), '\u0000') THEN char(0) ELSE '' END"""
ESCAPED = "json_extract(payload, ?, ?)"  # of two paths the list of both, as JSON: escaped as json.dumps left it
MOST_CONDITIONS = 100  # SQLite nests them, 1,000 deep at most
# SQLite's largest integer. A larger one in a payload becomes a float: it is above all of these, and its order is right. (Below
# -MOST - 1 it is not: those nearest to that number are equal to it.)
MOST = (1 << 63) - 1


def parse_filters(texts: Iterable[str]) -> tuple[str, list[object]]:
    """Read conditions that must all hold into an SQL expression and its values.

    A value that reads as a JSON number, string, true or false is one, anything else is text: ``year>=2020``, ``lang=en``,
    ``code="007"``. Nested fields are written ``author.name``. A field that is absent satisfies no condition.

    Raises:
        UsageError: no condition, a whole number beyond 64 bits, or text with a NUL that is to be smaller or larger.
    """
    texts = list(texts)
    if len(texts) > MOST_CONDITIONS:
        raise UsageError(f"{len(texts)} conditions were given; a search takes {MOST_CONDITIONS} at most")
    parts: list[str] = []
    values: list[object] = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if not match:
            raise UsageError(f"filter {text!r} is not of the form FIELD=VALUE (also != < <= > >=)")
        field, operator, value = match.groups()
        if value[:1] in ("=", "<", ">"):
            raise UsageError(
                f"filter {text!r} has no operator of = != < <= > >=; text that begins so is quoted, '{field}=\"...\"'"
            )
        # Names are compared as they are stored.
        path = "$" + "".join(f".{_escape(name)}" for name in field.split("."))
        # Types must agree: in SQL every text is larger than every number, and true is 1.
        read = _value(value)
        if not is_unicode(f"{field}{read}"):
            raise UsageError(f"filter {text!r} is not valid Unicode")
        kinds = next(kinds for kind, kinds in KINDS.items() if isinstance(read, kind))
        stored = TEXT if isinstance(read, str) else "json_extract(payload, ?)"
        if isinstance(read, str) and "\0" in read:
            if OPERATORS[operator] not in ("=", "<>"):
                raise UsageError(f"filter {text!r}: text that holds a NUL has no order here; only = and != compare it")
            stored, read = ESCAPED, f"[{_escape(read)},{_escape(read)}]"
        parts.append(f"json_type(payload, ?) IN ({kinds}) AND {stored} {OPERATORS[operator]} ?")
        values += [path] * (1 + stored.count("?")) + [read]
    return " AND ".join(parts) or "1", values


def _escape(text: str) -> str:
    """A text as payloads hold it."""
    return json.dumps(text, ensure_ascii=False)


def _value(text: str) -> bool | str | int | float:
    if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) and (len(text) > 20 or not -MOST - 1 <= int(text) <= MOST):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise UsageError(
            f"the whole number {shown} in a filter is beyond 64 bits, where numbers are compared as floats; "
            "write it as one (1e20) where that will do"
        )
    try:
        value = json.loads(text, parse_constant=str)  # NaN and the like are text: payloads hold no such numbers
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (int, float, str)) else text
