"""Awkward inputs: what they are made of, and that the held-out ones are others."""

from __future__ import annotations

import numpy as np
from PIL import Image

from metaembed.calibration.awkward import SHAPES, TEXTS, awkward
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
    assert [item.image.size for item in found] == list(SHAPES)
    assert [(item.side, item.text) for item in found[:2]] == [("query", "text"), ("candidate", None)]
    assert found[2].origin == f"a.png at {SHAPES[2][0]} x {SHAPES[2][1]}"


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
