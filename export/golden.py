"""The inputs that parity is judged on: texts of several lengths and scripts, images of every awkward size, and both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from metaembed.runtime.errors import UsageError
from metaembed.runtime.golden import GoldenItem
from metaembed.runtime.images import MIN_SIDE, ImageRules, smart_resize

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

# (width, height) in pixels. Sizes that Qwen resizes are judged with the Pillow at hand, whose bicubic filter changed by one level
# between 12.3 and 13.0 for 100 x 260 (and for none of these): such an image would fail the check on another machine.
# 28 x 28 and the strips are the thinnest that Qwen makes; the rest are small, tall and wide,
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
    (112, 252),
    (420, 308),
)
QUICK_TEXTS = ("a red umbrella", "x", "two anchors", "図", "1,234.56 €", "метро", "def f():", "naïve café", "🙂")
SMALL_SIZE = (56, 56)
QUICK_SIZES = [(side * 28, side * 28) for side in range(16, 0, -1)]  # the largest page that fits, up to 256 tokens


def any_text(text: str) -> bool:
    """No limit."""
    return True


def quick_items(side: str, rules: ImageRules, text_fits: Callable[[str], bool] = any_text) -> list[GoldenItem]:
    """The fewest inputs that say something of texts, images and pairs, small ones first: for models that take minutes.

    Two queries of a text; of candidates one more than the ten that a ranking compares.
    """
    seed, count = (0, 2) if side == "query" else (1000, len(QUICK_TEXTS))
    texts = _fitting(QUICK_TEXTS[:count], text_fits)
    page = next((size for size in QUICK_SIZES if _is_kept(size, rules)), None) or largest_size(rules)
    small = SMALL_SIZE if _fits(SMALL_SIZE, rules) else page
    return [
        *(GoldenItem(text=text) for text in texts),
        GoldenItem(texts[0], draw_page(seed, small)),
        GoldenItem(image=draw_page(seed + 1, page)),
    ]


def golden_items(side: str, rules: ImageRules, text_fits: Callable[[str], bool] = any_text) -> list[GoldenItem]:
    """Texts, images and pairs for one side; the last image is the largest that the rules allow.

    Sizes that the processor, which enlarges small images, cannot keep to its limit are left out. Whatever the rules,
    there are more than ten items and some of each kind.
    """
    largest = largest_size(rules)
    fitting = [size for size in IMAGE_SIZES if _fits(size, rules)] or [largest]
    seed = 0 if side == "query" else 1000
    images = [draw_page(seed + place, size) for place, size in enumerate([*fitting, largest])]
    texts = _fitting(TEXTS, text_fits)
    pairs = [
        GoldenItem(texts[place % len(texts)], draw_page(seed + 500 + place, size))
        for place, size in enumerate(fitting[::3])
    ]
    return [*map(GoldenItem, texts), *(GoldenItem(image=image) for image in images), *pairs]


def largest_size(rules: ImageRules) -> tuple[int, int]:
    """(width, height) of the largest square that the processor takes as it is; where there is none, of what is nearest.

    There is none where ``min_pixels`` is above the last square below ``max_pixels``: 6 of at most 7 tokens, say, which
    are 3 x 2.

    Raises:
        UsageError: no image at all keeps to these limits.
    """
    side = math.isqrt(rules.max_tokens)
    shapes = [(side, side), *((rules.max_tokens // rows, rows) for rows in range(side, 0, -1))]
    sizes = ((columns * rules.unit, rows * rules.unit) for columns, rows in shapes)
    found = next((size for size in sizes if _is_kept(size, rules)), None)
    if found is None:
        raise UsageError(
            f"no image keeps to both limits of the image processor, {rules.min_pixels} to {rules.max_pixels} pixels; "
            "widen them in the checkpoint, or give another --max-image-tokens"
        )
    return found


def _is_kept(size: tuple[int, int], rules: ImageRules) -> bool:
    """Whether the processor takes images of this size as they are."""
    width, height = size
    try:
        return smart_resize(height, width, rules) == (height, width)
    except UsageError:
        return False


def _fits(size: tuple[int, int], rules: ImageRules) -> bool:
    """Whether the processor takes images of this size, shrinks none, and enlarges none beyond its limit."""
    width, height = (max(MIN_SIDE, side) for side in size)
    try:
        smart_resize(height, width, rules)
    except UsageError:
        return False
    return _units(size) <= rules.max_tokens


def _fitting(texts: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    kept = [text for text in texts if fits(text)]
    return [*kept, *LETTERS[: len(texts) - len(kept)]]


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
