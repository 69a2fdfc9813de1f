"""Inputs unlike the calibration set's own: its images in awkward shapes and other colours, and texts of other kinds and scripts.

Users bring some, and ranges do not fit what they never saw. The demo's pages are all 112 x 112 and its texts name symbols: with
ranges from those alone an image of 30 x 45 pixels lost 0.06 of cosine in INT8, and a text in another script 0.04; with ranges
from its pale pages alone, some vector of a page in strong colours lost 0.03.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from metaembed.runtime.golden import SIDES
from metaembed.runtime.images import load_image

from .dataset import CalibrationItem

# (width, height) in pixels: the thinnest that Qwen makes, strips, and small ones; none costs much to run.
SHAPES = ((28, 28), (28, 56), (56, 28), (28, 280), (280, 28), (56, 56), (84, 252), (252, 84), (196, 196), (28, 560),
          (560, 28), (84, 84))  # fmt: skip
COLOURED = ((56, 56), (84, 252), (196, 196), (252, 84))  # shapes that come in other colours too
TEXTS = (
    ("?", "ok", "How do I reset the password of my router, and where is it printed?", "昨日の会議の議事録を探しています",
     "Сколько стоит билет до центра города?", "for i in range(10):\n    print(i, i ** 2)", "Σύνοψη: 12.5 % ± 0.3",
     "the the the the the the the the the the the the the the the the the the the the", "😀🚀 #1 €99", "ÀÉÎÕÜ ñ ß ø"),
    ("!", "no", "Which of the two contracts ends first, and who may renew it?", "请比较去年和今年的销售额",
     "Последняя страница отчёта", "SELECT name FROM users WHERE id = 7;", "مرحبا بالعالم", "3.14159, -42, 1e-9, 100 %",
     "a b c d e f g h i j k l m n o p q r s t u v w x y z", "Zürich Ōsaka Łódź"),
)  # fmt: skip


def awkward(items: Sequence[CalibrationItem], *, held_out: bool) -> list[CalibrationItem]:
    """The items' images in turn, one in each shape and colouring, with their own sides and texts; and texts for both sides,
    of which the held-out ones are others than those that ranges come from."""
    with_image = [item for item in items if item.image is not None]
    wanted = [(size, _as_it_is) for size in SHAPES] + [(size, colour) for colour in COLOURS for size in COLOURED]
    images = [_changed(with_image[k % len(with_image)], *want) for k, want in enumerate(wanted) if with_image]
    texts = TEXTS[held_out]
    return images + [CalibrationItem(side, text, None, f"text {text!r}") for text in texts for side in SIDES]


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _turned(image: Image.Image) -> Image.Image:
    """Red to green, green to blue, blue to red."""
    return Image.fromarray(np.roll(np.asarray(image), 1, axis=2))


def _strong(image: Image.Image) -> Image.Image:
    """Every channel stretched over the whole range, then cut to four levels: 0, 64, 128 and 192."""
    return ImageOps.posterize(ImageOps.autocontrast(image), 2)


COLOURS = (ImageOps.invert, _turned, _strong)


def _changed(
    item: CalibrationItem, size: tuple[int, int], colour: Callable[[Image.Image], Image.Image]
) -> CalibrationItem:
    assert item.image is not None
    width, height = size
    what = f"{item.origin} at {width} x {height}" + ("" if colour is _as_it_is else ", recoloured")
    return replace(item, image=colour(load_image(item.image).resize(size)), origin=what)
