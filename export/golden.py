"""The inputs that parity is judged on: texts of several lengths and scripts, images of every awkward size, and both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from metaembed.runtime.golden import GoldenItem

TEXTS = (
    "a red umbrella and a blue anchor",
    "x",
    "What was the operating margin in the third quarter, and how did it compare with the year before?",
    "图表显示了每个季度的收入和成本",
    "Где находится ближайшая станция метро? ☂ ⚓ 🙂",
    "def maxsim(q, c):\n    return (q @ c.T).max(-1).sum()\n",
    "naïve café, e\u0301lan, 1,234.56 €;   three   spaces and a\ttab",
    " and ".join(["a red umbrella", "a blue anchor", "a green star"] * 8),
)

LETTERS = (
    "abcdefgh"  # one token each: they stand in for texts over the limit, so that there is always enough to compare
)

# (width, height) in pixels. 28 x 28 and the strips are the thinnest that Qwen makes; the rest are small, tall and wide,
# with sides that are and are not multiples of 28 and windows that are and are not full.
IMAGE_SIZES = (
    (28, 28),
    (56, 56),
    (112, 112),
    (30, 45),
    (1, 300),
    (28, 924),
    (924, 28),
    (84, 336),
    (336, 84),
    (224, 224),
    (333, 217),
    (100, 260),
    (420, 308),
)


def golden_items(
    side: str, max_image_tokens: int, text_fits: Callable[[str], bool] = lambda text: True
) -> list[GoldenItem]:
    """Texts, images and pairs for one side; the last image is the largest that the limit allows.

    Whatever the limits, there are more than ten items and some of each kind.
    """
    largest = int(np.sqrt(max_image_tokens)) * 28
    fitting = [size for size in IMAGE_SIZES if _units(size) <= max_image_tokens]
    seed = 0 if side == "query" else 1000
    images = [draw_page(seed + place, size) for place, size in enumerate([*fitting, (largest, largest)])]
    texts = [text for text in TEXTS if text_fits(text)]
    texts += LETTERS[: len(TEXTS) - len(texts)]
    pairs = [
        GoldenItem(texts[place % len(texts)], draw_page(seed + 500 + place, size))
        for place, size in enumerate(fitting[::3])
    ]
    return [*map(GoldenItem, texts), *(GoldenItem(image=image) for image in images), *pairs]


def draw_page(seed: int, size: tuple[int, int]) -> Image.Image:
    """A page of coloured boxes and ovals, which PNG keeps small."""
    rng = np.random.default_rng(seed)
    width, height = size
    page = Image.new("RGB", size, tuple(rng.integers(160, 256, 3).tolist()))
    draw = ImageDraw.Draw(page)
    for _ in range(12):
        x, y = sorted(rng.uniform(0, width, 2)), sorted(rng.uniform(0, height, 2))
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((x[0], y[0], x[1], y[1]), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return page


def _units(size: tuple[int, int]) -> int:
    return max(1, round(size[0] / 28)) * max(1, round(size[1] / 28))
