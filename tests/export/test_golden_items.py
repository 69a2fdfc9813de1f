"""The inputs of parity, at every limit: enough to compare, some of each kind, and none over the limit."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from metaembed.export.golden import TEXTS, golden_items, quick_items
from metaembed.export.parity import within_rules
from metaembed.runtime.golden import SIDES, GoldenItem
from metaembed.runtime.images import ImageRules
from metaembed.runtime.parity import RANKS


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("image_tokens", [1, 2, 4, 50, 1000, 1024])
@pytest.mark.parametrize("characters", [1, 20, 1000])
@pytest.mark.parametrize("choose", [golden_items, quick_items])
def test_there_is_enough_of_each_kind_within_the_limits(
    choose: Callable[..., list[GoldenItem]], side: str, image_tokens: int, characters: int
):
    """Counted by hand: one image token is 28 x 28 px; here one character stands for one text token."""
    items = choose(side, image_tokens, lambda text: len(text) <= characters)
    assert len(items) > (RANKS if side == "candidate" else 0), "a ranking needs more candidates than ranks"
    assert {item.kind for item in items} == {"text", "image", "image + text"}
    assert all(len(item.text) <= characters for item in items if item.text is not None)
    areas = [round(item.image.width / 28) * round(item.image.height / 28) for item in items if item.image is not None]
    assert max(areas) <= image_tokens
    if choose is golden_items:
        assert max(areas) >= int(np.sqrt(image_tokens)) ** 2, "the largest square that the limit allows"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("limit", [4, 5, 6, 7, 30])
@pytest.mark.parametrize("choose", [golden_items, quick_items])
def test_small_images_that_the_processor_enlarges_beyond_the_limit_are_left_out(
    choose: Callable[..., list[GoldenItem]], side: str, limit: int
):
    """Expected: transformers' smart_resize. 30 x 45 pixels, 2 tokens, become 6 where 56 x 56 is the least."""
    items = within_rules(choose(side, limit), ImageRules(min_pixels=56 * 56, max_pixels=limit * 28 * 28))
    for image in (item.image for item in items if item.image is not None):
        height, width = smart_resize(
            max(28, image.height), max(28, image.width), min_pixels=56 * 56, max_pixels=limit * 28 * 28
        )
        assert height * width <= limit * 28 * 28, image.size
    assert len(items) > (RANKS if side == "candidate" else 0)
    assert {item.kind for item in items} == {"text", "image", "image + text"}


def test_the_full_limits_leave_no_image_out():
    items = golden_items("query", 1024)
    assert within_rules(items, ImageRules(min_pixels=56 * 56, max_pixels=1024 * 28 * 28)) == items


def test_the_full_limits_take_every_text():
    assert [item.text for item in golden_items("query", 1024) if item.kind == "text"] == list(TEXTS)


def test_images_are_the_same_every_time_and_differ_between_sides():
    first, again = (golden_items("query", 50)[-1].image for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != golden_items("candidate", 50)[-1].image.tobytes()
