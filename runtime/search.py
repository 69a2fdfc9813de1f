"""Rank a folder of images for one query, without an index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .budget import Budget
from .encoder import Encoder
from .errors import UsageError
from .index import Hit
from .maxsim import maxsim
from .readable import encode_readable

BATCH = 64


def find_images(folder: Path) -> list[Path]:
    """Files of the folder and its subfolders with an image's suffix, sorted by path; links to folders are not followed.

    Broken links and names that are not Unicode are among them, for `encode_readable` to name.

    Raises:
        UsageError: there is none, or a subfolder cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; --images takes a folder of image files")
    Image.init()
    files = (Path(place, name) for place, _, names in os.walk(folder, onerror=_refuse) for name in names)
    found = sorted(path for path in files if path.suffix.lower() in Image.EXTENSION)
    if not found:
        raise UsageError(f"{folder} holds no image files")
    return found


def _refuse(error: OSError) -> None:
    raise UsageError(f"{error.filename} cannot be read ({error.strerror}); nothing of it would be found") from error


def rank_images(
    encoder: Encoder,
    paths: Sequence[Path],
    *,
    text: str | None,
    image: Path | None,
    budget: Budget,
    k: int,
    track: Callable[[Any], Iterable[Any]] = iter,
) -> tuple[list[Hit], int]:
    """The k best of the images for a text, an image or both, and how many are left out: no readable images, each named.

    Raises:
        UsageError: an empty query, k below 1, or no readable image.
    """
    if k < 1:
        raise UsageError(f"the best {k} were asked for; -k is at least 1")
    query = encoder.encode_queries([text], images=[image], budget=budget)
    scores: list[float] = []
    kept: list[Path] = []
    for start in track(range(0, len(paths), BATCH)):
        some = paths[start : start + BATCH]
        places, candidates = encode_readable(
            encoder.encode_candidates, [(None, path) for path in some], budget, names=list(map(str, some))
        )
        if places:
            scores += maxsim(query, candidates)[0].tolist()
            kept += [some[place] for place in places]
    if not kept:
        raise UsageError("none of the image files can be read")
    best = np.argsort(-np.array(scores), kind="stable")[:k]
    hits = [Hit(rank, str(kept[place]), scores[place]) for rank, place in enumerate(best, start=1)]
    return hits, len(paths) - len(kept)
