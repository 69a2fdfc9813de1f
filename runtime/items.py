"""What there is to encode: the lines of a JSONL file, or the images of a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .index_payload import check_levels, too_deep
from .search import find_images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A text, an image, or both; `payload` is any JSON object that searches return and filter by."""

    id: str
    text: str | None = None
    image: Path | None = None
    payload: Mapping[str, Any] | None = None


def read_data(path: Path) -> list[Item]:
    """The images of a folder (id: path within it), or the lines of a JSONL file.

    A line is an object with ``id``, ``text``, ``image`` (a path relative to the file), at least one of the two; its other
    fields become the payload. With ``_id`` instead it is BEIR's: its ``title`` stands before the text, and in the payload.

    Raises:
        UsageError: nothing there, a line that is not of this form, or an id that occurs twice.
    """
    if path.is_dir():
        if (corpus := path / "corpus.jsonl").is_file():
            log.warning("every image below %s is indexed; to index its corpus instead, give --data %s", path, corpus)
        return [Item(found.relative_to(path).as_posix(), image=found) for found in find_images(path)]
    if not path.is_file():
        raise UsageError(f"{path} is missing; --data takes a folder of images or a JSONL file")
    return _read_lines(path, number_them=False)


def read_queries(path: Path) -> list[Item]:
    """The lines of a JSONL file, as `read_data` reads them; one without an id has its line's number.

    Raises:
        UsageError: as `read_data`.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file; --queries takes a JSONL file")
    return _read_lines(path, number_them=True)


def _read_lines(path: Path, *, number_them: bool) -> list[Item]:
    with path.open("rb") as lines:
        items = [
            _read_line(path, number, line, str(number) if number_them else None)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UsageError(f"{path} gives the id {item.id!r} twice")
        seen.add(item.id)
    if not items:
        raise UsageError(f'{path} is empty; write one {{"id": ..., "text": ..., "image": ...}} a line')
    return items


def _read_line(path: Path, number: int, line: bytes, default_id: str | None) -> Item:
    try:
        data = json.loads(line, parse_constant=_refuse)
        written = json.dumps(data, ensure_ascii=False, allow_nan=False)  # 1e999 is infinite
        written.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path} line {number} holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise too_deep(f"{path} line {number}") from None
    except ValueError as error:
        raise UsageError(f"{path} line {number} is not JSON ({error})") from None
    check_levels(written, f"{path} line {number}")
    if not isinstance(data, dict):
        raise UsageError(f"{path} line {number} is no JSON object")
    own, beir, text, image = (data.pop(name, None) for name in ("id", "_id", "text", "image"))
    title = data.get("title") if own is None and beir is not None else None
    id_ = next((given for given in (own, beir, default_id) if given is not None), None)
    if id_ is None or id_ == "":
        raise UsageError(f"{path} line {number} has no id; give every item a distinct one")
    if isinstance(id_, bool) or not isinstance(id_, (str, int)):
        raise UsageError(f"{path} line {number}: the id {id_!r} is neither a text nor a whole number")
    if not all(value is None or isinstance(value, str) for value in (text, image, title)):
        raise UsageError(f"{path} line {number}: text, image and title are strings, or null where absent")
    if text is None and title is None and not image:
        raise UsageError(f"{path} line {number} has neither a text nor an image")
    return Item(str(id_), join_title(title, text), path.parent / image if image else None, data or None)


def join_title(title: str | None, text: str | None) -> str | None:
    """What of a document is encoded: its title and its text, as BEIR's own models read them; None where both are blank."""
    return " ".join(part for part in (title, text) if part and part.strip()) or None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON value")
