"""Symbol scenes: pages with several coloured Unicode symbols, and queries that name or show some of them.

Everything follows from a seed. Three splits share the 64 symbols and 8 colours but not all their 512 pairs: each symbol
keeps one colour back, 48 such pairs for the test split and 16 for validation, and training sees neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A word of each symbol's Unicode name stands for it: "☂" is U+2602 UMBRELLA.
SYMBOLS = {
    "☀": "sun", "☁": "cloud", "☂": "umbrella", "☃": "snowman", "☄": "comet", "★": "star", "☎": "telephone",
    "☘": "shamrock", "☠": "skull", "☣": "biohazard", "☤": "caduceus", "☥": "ankh", "☾": "moon", "☸": "wheel",
    "☺": "face", "♚": "king", "♛": "queen", "♜": "rook", "♞": "knight", "♟": "pawn", "♠": "spade", "♣": "club",
    "♥": "heart", "♦": "diamond", "♪": "note", "♿": "wheelchair", "⚑": "flag", "⚓": "anchor", "⚗": "alembic",
    "⚘": "flower", "⚙": "gear", "⚛": "atom", "⚰": "coffin", "⚱": "urn", "✈": "airplane", "✉": "envelope",
    "✏": "pencil", "✒": "nib", "✱": "asterisk", "❄": "snowflake", "⌂": "house", "⌨": "keyboard", "■": "square",
    "▬": "rectangle", "▰": "parallelogram", "◉": "fisheye", "▲": "triangle", "⬟": "pentagon", "✌": "hand",
    "➤": "arrowhead", "☑": "ballot", "✔": "check", "✚": "cross", "♄": "saturn", "☿": "mercury", "♆": "neptune",
    "♈": "aries", "♉": "taurus", "♊": "gemini", "♌": "leo", "√": "root", "∫": "integral", "☕": "beverage",
    "⚒": "hammer",
}  # fmt: skip
COLOURS = {
    "red": (214, 30, 36),
    "orange": (244, 140, 16),
    "green": (22, 150, 52),
    "cyan": (16, 186, 206),
    "blue": (34, 70, 226),
    "purple": (132, 36, 190),
    "pink": (246, 112, 184),
    "black": (22, 22, 26),
}
GLYPHS, WORDS, COLOUR_WORDS = tuple(SYMBOLS), tuple(SYMBOLS.values()), tuple(COLOURS)

FIXED_SIDE = 112  # px: one attention window of Qwen2.5-VL
VARIED_SIDES = (84, 336)  # px, each side on its own
LARGEST_ASPECT = 3.0
CELL = 28  # px; a cell holds one symbol
SIZES = (0.7, 0.96)  # a symbol's longer side, in cells
ITEMS_PER_SCENE = (6, 9)  # the smallest page has 9 cells

SPLITS = ("train", "validation", "test")
_HELD_FOR_TEST = 48

Pair = tuple[int, int]  # (symbol, colour)


@dataclass(frozen=True)
class Item:
    """One symbol on a page: indices into GLYPHS and COLOURS, the box's top left corner and its longer side in px."""

    symbol: int
    colour: int
    left: int
    top: int
    size: int

    @property
    def pair(self) -> Pair:
        return self.symbol, self.colour


@dataclass(frozen=True)
class Scene:
    """A page in px: its size, its paper's grey level, and its items."""

    width: int
    height: int
    paper: int
    items: tuple[Item, ...]

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def pairs(self) -> frozenset[Pair]:
        return frozenset(item.pair for item in self.items)


def held_out_pairs(split: str) -> tuple[Pair, ...]:
    """The pairs that only this split may show: one colour of each symbol, the first 48 symbols' for the test split."""
    rows = {"train": range(0), "validation": range(_HELD_FOR_TEST, len(WORDS)), "test": range(_HELD_FOR_TEST)}[split]
    return tuple((symbol, (3 * symbol + symbol // len(COLOURS)) % len(COLOURS)) for symbol in rows)


def allowed_pairs(split: str) -> tuple[Pair, ...]:
    """Every pair that a split's pages may show: its own held-out pairs and those of no other split."""
    refused = {pair for other in SPLITS if other != split for pair in held_out_pairs(other)}
    every = ((symbol, colour) for symbol in range(len(WORDS)) for colour in range(len(COLOURS)))
    return tuple(pair for pair in every if pair not in refused)


def split_generator(split: str, seed: int) -> np.random.Generator:
    """The random numbers of one split: equal seeds of different splits share nothing."""
    return np.random.default_rng([SPLITS.index(split), seed])


def sample_scene(rng: np.random.Generator, pairs: Sequence[Pair], *, varied: bool = False) -> Scene:
    """A page of 6 to 9 of the given pairs: 112 x 112 px, or with varied=True 84 to 336 px a side, up to 1:3."""
    count = min(len(pairs), int(rng.integers(ITEMS_PER_SCENE[0], ITEMS_PER_SCENE[1] + 1)))
    chosen = [pairs[k] for k in rng.permutation(len(pairs))[:count]]
    width, height = _varied_size(rng) if varied else (FIXED_SIDE, FIXED_SIDE)
    return place_items(rng, chosen, width, height)


def place_items(rng: np.random.Generator, pairs: Sequence[Pair], width: int, height: int) -> Scene:
    """Put each pair into a cell of its own, at a random size and place within the cell.

    The page is cut evenly into rows and columns of about 28 px, so that an image embedding sees one cell.
    """
    rows, columns = round(height / CELL), round(width / CELL)
    tall, wide = height / rows, width / columns
    items = []
    for (symbol, colour), where in zip(pairs, rng.permutation(rows * columns), strict=False):
        row, column = divmod(int(where), columns)
        size = round(min(tall, wide) * rng.uniform(*SIZES))
        left, top = (
            int(corner + rng.uniform(0, side - size)) for corner, side in ((column * wide, wide), (row * tall, tall))
        )
        items.append(Item(symbol, colour, left, top, size))
    return Scene(width, height, int(rng.integers(228, 256)), tuple(items))


def _varied_size(rng: np.random.Generator) -> tuple[int, int]:
    low, high = np.log(VARIED_SIDES[0]), np.log(VARIED_SIDES[1])
    while True:
        width, height = (round(float(np.exp(side))) for side in rng.uniform(low, high, 2))
        if max(width, height) <= LARGEST_ASPECT * min(width, height):
            return width, height
