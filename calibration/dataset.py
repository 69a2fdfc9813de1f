"""Calibration sets: texts, images and both, for both sides, chosen by a seed and known by a hash."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metaembed.runtime.encoder import ImageSource
from metaembed.runtime.errors import UsageError
from metaembed.runtime.golden import SIDES
from metaembed.runtime.images import load_image
from metaembed.runtime.unicode import is_unicode

log = logging.getLogger(__name__)
MINIMUM = 8  # distinct items of each side, held-out ones included: below this a range is an accident
SAMPLES = 128
HELD_OUT = 4  # every fourth item is kept from calibration, to judge on
IMAGE_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
FIELDS = frozenset(("text", "image", "side"))
LONG_TEXT = 10  # characters per token of the limit, beyond which a text is surely cut


@dataclass(frozen=True, eq=False)
class CalibrationItem:
    """One input of one side; ``origin`` names it in messages, for example ``data.jsonl line 3``."""

    side: str
    text: str | None
    image: ImageSource | None
    origin: str

    @property
    def kind(self) -> tuple[str, bool, bool]:
        return self.side, self.text is not None, self.image is not None


@dataclass(frozen=True)
class CalibrationSet:
    """What ranges come from, and the part held out to judge them; ``sha256`` covers both."""

    items: tuple[CalibrationItem, ...]
    held_out: tuple[CalibrationItem, ...]
    source: str
    seed: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """For the manifest: which data, how much, and its hash."""
        counts = {side: sum(item.side == side for item in (*self.items, *self.held_out)) for side in SIDES}
        sizes = {"items": len(self.items), "held_out": len(self.held_out), **counts}
        return {"source": self.source, "seed": self.seed, "sha256": self.sha256, **sizes}


def read_items(path: Path) -> list[CalibrationItem]:
    """The items of a JSONL file, or of a folder of images, each of which stands on both sides.

    Raises:
        UsageError: there is no such file, a line is not of the documented form, or nothing is there.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing; calibration needs a folder of images or a JSONL file")
    with path.open("rb") as lines:
        items = [_read_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UsageError(f'{path} is empty; write one {{"text": ..., "image": ..., "side": ...}} a line')
    return items


def _read_folder(folder: Path) -> list[CalibrationItem]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    log.warning("%s holds images alone: no text of users is calibrated on; a JSONL file can hold both", folder)
    return [CalibrationItem(side, None, path, str(path)) for path in found for side in SIDES]


def _read_line(path: Path, number: int, line: bytes) -> CalibrationItem:
    origin = f"{path} line {number}"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{origin} is not JSON ({error})") from None
    if not isinstance(data, Mapping) or not data.keys() <= FIELDS:
        raise UsageError(f'{origin} is not of the form {{"text": ..., "image": ..., "side": "query"|"candidate"}}')
    text, image = data.get("text"), data.get("image")
    if data.get("side") not in SIDES:
        raise UsageError(f"{origin} has side {data.get('side')!r}; it is one of {', '.join(SIDES)}")
    if not all(value is None or isinstance(value, str) for value in (text, image)):
        raise UsageError(f"{origin}: text and image are strings, or null where absent")
    if text is not None and not is_unicode(text):
        raise UsageError(f"{origin}: the text holds half a surrogate pair, which is not valid Unicode")
    if not (text or "").strip() and not image:
        raise UsageError(f"{origin} has neither a text nor an image")
    return CalibrationItem(data["side"], text or None, path.parent / image if image else None, origin)


def choose(
    items: Sequence[CalibrationItem], source: str, *, samples: int = SAMPLES, seed: int = 0, text_tokens: int = 512
) -> CalibrationSet:
    """Draw up to ``samples`` distinct, readable items, evenly over sides and kinds of input; every fourth is held out.

    An unreadable image is left out with a warning that names it, and another item is drawn.

    Raises:
        UsageError: fewer than MINIMUM distinct items remain on a side.
    """
    if samples < 2 * MINIMUM:
        raise UsageError(f"{samples} samples are too few; calibration needs at least {2 * MINIMUM}")
    seen: dict[str, CalibrationItem] = {}
    warn = cache(log.warning)  # each sentence once: an image of a folder stands on both sides
    for item in _interleave(items, np.random.default_rng(seed)):
        digest = _digest(item, text_tokens, warn)
        if digest in seen:
            log.info("%s is the same input as %s", item.origin, seen[digest].origin)
        elif digest is not None:
            seen[digest] = item
        if len(seen) == samples:
            break
    kept = list(seen.values())
    _check_sides(kept, len(items), source)
    held_out = _held_out(kept)
    return CalibrationSet(
        items=tuple(item for item in kept if item not in held_out),
        held_out=tuple(held_out),
        source=source,
        seed=seed,
        sha256=hashlib.sha256("".join(seen).encode()).hexdigest(),
    )


def _interleave(items: Iterable[CalibrationItem], rng: np.random.Generator) -> Iterator[CalibrationItem]:
    """Items in random order, the sides by turns, and within a side its kinds by turns: a prefix of any length is even."""
    kinds: dict[tuple[str, bool, bool], list[CalibrationItem]] = {}
    for item in items:
        kinds.setdefault(item.kind, []).append(item)
    shuffled = {kind: [same[k] for k in rng.permutation(len(same))] for kind, same in sorted(kinds.items())}
    sides = ([same for kind, same in shuffled.items() if kind[0] == side] for side in SIDES)
    return _by_turns([list(_by_turns(queues)) for queues in sides])


def _by_turns(queues: Sequence[Sequence[CalibrationItem]]) -> Iterator[CalibrationItem]:
    """One of each queue in turn, until all are empty."""
    for turn in range(max(map(len, queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))


def _held_out(items: Sequence[CalibrationItem]) -> list[CalibrationItem]:
    """Every fourth item of each kind, and at least one of each side."""
    turns: dict[tuple[str, bool, bool], int] = {}
    chosen = []
    for item in items:
        turns[item.kind] = turns.get(item.kind, 0) + 1
        if turns[item.kind] % HELD_OUT == 0:
            chosen.append(item)
    for side in SIDES:
        if not any(item.side == side for item in chosen):
            chosen.append(next(item for item in items if item.side == side))
    return chosen


def _digest(item: CalibrationItem, text_tokens: int, warn: Callable[[str], None]) -> str | None:
    """SHA-256 of what the model will see, or None, with a warning, where the image cannot be read."""
    digest = hashlib.sha256(json.dumps([item.side, item.text]).encode())
    if item.text is not None and len(item.text) > LONG_TEXT * text_tokens:
        warn(f"{item.origin}: a text of {len(item.text)} characters is cut to {text_tokens} tokens")
    if item.image is not None:
        try:
            image = load_image(item.image)
        except UsageError as error:
            warn(f"{item.origin} is left out: {error}")
            return None
        if _is_blank(image):
            warn(f"{item.origin} is one plain colour; ranges from such images are narrow")
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _is_blank(image: Image.Image) -> bool:
    return all(low == high for low, high in image.getextrema())


def _check_sides(items: Sequence[CalibrationItem], given: int, source: str) -> None:
    for side in SIDES:
        count = sum(item.side == side for item in items)
        if count < MINIMUM:
            raise UsageError(
                f"{source} gives {count} distinct, readable {side} inputs ({given} were found in all); calibration needs "
                f"at least {MINIMUM} of each side"
            )
