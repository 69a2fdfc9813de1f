"""Awkward inputs: what they are made of, and that the held-out ones are others."""

from __future__ import annotations

import numpy as np
from PIL import Image

from metaembed.calibration.awkward import COLOURED, SHAPES, TEXTS, awkward
from metaembed.calibration.dataset import CalibrationItem
from metaembed.export.golden import TEXTS as GOLDEN_TEXTS


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 50, 3), np.uint8))


def test_images_come_in_every_shape_with_their_own_text_and_side():
    items = [
        CalibrationItem("query", "text", noise(0), "a.png"),
        CalibrationItem("query", "words alone", None, "line 2"),
        CalibrationItem("candidate", None, noise(1), "b.png"),
    ]
    found = [item for item in awkward(items, held_out=False) if item.image is not None]
    assert [item.image.size for item in found] == [*SHAPES, *COLOURED * 3]
    assert [(item.side, item.text) for item in found[:2]] == [("query", "text"), ("candidate", None)]
    assert found[2].origin == f"a.png at {SHAPES[2][0]} x {SHAPES[2][1]}"


def test_images_come_in_other_colours():
    """One pale image, so that each awkward one is known: inverted, its channels turned, and stretched to the whole range."""
    pale = np.full((28, 28, 3), (200, 210, 220), np.uint8)
    pale[:9] = (180, 190, 250)
    item = CalibrationItem("candidate", None, Image.fromarray(pale), "pale.png")
    found = awkward([item], held_out=False)[len(SHAPES) :]
    inverted, turned, strong = (np.asarray(found[k * len(COLOURED)].image) for k in range(3))
    size = COLOURED[0]
    expected = np.asarray(Image.fromarray(pale).resize(size)).astype(int)
    np.testing.assert_array_equal(inverted, 255 - expected)
    np.testing.assert_array_equal(turned, expected[..., [2, 0, 1]])
    assert strong[0, 0].tolist() == [0, 0, 192]
    assert strong[-1, -1].tolist() == [192, 192, 0]
    assert {found[k].origin for k in range(3 * len(COLOURED))} == {
        f"pale.png at {width} x {height}, recoloured" for width, height in COLOURED
    }


def test_held_out_texts_set_no_range_and_are_not_what_the_final_check_replays():
    used, held_out = ({item.text for item in awkward((), held_out=held)} for held in (False, True))
    assert used
    assert held_out
    assert not used & held_out
    assert not (used | held_out) & set(GOLDEN_TEXTS)


def test_both_sides_get_every_text_even_without_images():
    found = awkward((), held_out=True)
    assert len(found) == 2 * len(TEXTS[1])
    assert {item.side for item in found} == {"query", "candidate"}
