"""Drawing symbol scenes: glyphs of the DejaVu font that matplotlib ships, as pictures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import COLOURS, GLYPHS, Item, Scene

_DRAWN_AT = 96  # px; every size is scaled down from one careful drawing
_RGB = tuple(COLOURS.values())


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture."""
    page = Image.new("RGB", (scene.width, scene.height), (scene.paper,) * 3)
    for item in scene.items:
        mask = _mask(item.symbol, item.size)
        left = item.left + (item.size - mask.width) // 2
        top = item.top + (item.size - mask.height) // 2
        page.paste(_ink(item), (left, top), mask)
    return page


def _ink(item: Item) -> tuple[int, int, int]:
    """The item's colour, each channel off by up to 16 levels as its place on the page decides."""
    wobble = np.random.default_rng([item.left, item.top, item.size]).integers(-16, 17, 3)
    red, green, blue = np.clip(np.add(_RGB[item.colour], wobble), 0, 255).tolist()
    return red, green, blue


@lru_cache(maxsize=8192)
def _mask(symbol: int, size: int) -> Image.Image:
    glyph = _glyph(symbol)
    scale = size / max(glyph.size)
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)


@lru_cache(maxsize=len(GLYPHS))
def _glyph(symbol: int) -> Image.Image:
    """The symbol's coverage, cropped to its ink."""
    canvas = Image.new("L", (3 * _DRAWN_AT, 3 * _DRAWN_AT))
    ImageDraw.Draw(canvas).text((_DRAWN_AT, _DRAWN_AT // 2), GLYPHS[symbol], fill=255, font=_font())
    return canvas.crop(canvas.getbbox())


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _DRAWN_AT)
