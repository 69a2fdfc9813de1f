"""The inputs of parity, at every limit: enough to compare, some of each kind, and none over the limit."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from metaembed.export.golden import IMAGE_SIZES, TEXTS, golden_items, largest_size, quick_items
from metaembed.runtime.errors import UsageError
from metaembed.runtime.golden import SIDES, GoldenItem
from metaembed.runtime.images import ImageRules
from metaembed.runtime.parity import RANKS

TOKEN = 28 * 28  # pixels


def limits(most: int, least: float = 0) -> ImageRules:
    """Of image tokens."""
    return ImageRules(min_pixels=max(1, int(least * TOKEN)), max_pixels=most * TOKEN)


def tokens_by_hugging_face(item: GoldenItem, rules: ImageRules) -> int:
    width, height = (max(28, side) for side in item.image.size)
    height, width = smart_resize(height, width, min_pixels=rules.min_pixels, max_pixels=rules.max_pixels)
    return height * width // TOKEN


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("image_tokens", [1, 2, 4, 50, 1000, 1024])
@pytest.mark.parametrize("characters", [1, 20, 1000])
@pytest.mark.parametrize("choose", [golden_items, quick_items])
def test_there_is_enough_of_each_kind_within_the_limits(
    choose: Callable[..., list[GoldenItem]], side: str, image_tokens: int, characters: int
):
    """Counted by hand: one image token is 28 x 28 px; here one character stands for one text token."""
    items = choose(side, limits(image_tokens), lambda text: len(text) <= characters)
    assert len(items) > (RANKS if side == "candidate" else 0), "a ranking needs more candidates than ranks"
    assert {item.kind for item in items} == {"text", "image", "image + text"}
    assert all(len(item.text) <= characters for item in items if item.text is not None)
    areas = [round(item.image.width / 28) * round(item.image.height / 28) for item in items if item.image is not None]
    assert max(areas) <= image_tokens
    if choose is golden_items:
        assert max(areas) >= int(np.sqrt(image_tokens)) ** 2, "the largest square that the limit allows"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("least", "most"),
    [
        *((4, most) for most in (4, 5, 6, 7, 30)),
        (5, 7),
        (6, 7),
        (7, 7),
        (255.5, 256),
        (257, 271),
        (1000, 1023),
        (16, 999),
    ],
)
@pytest.mark.parametrize("choose", [golden_items, quick_items])
def test_whatever_the_processor_enlarges_there_is_enough_of_each_kind(
    choose: Callable[..., list[GoldenItem]], side: str, least: float, most: int
):
    """Expected: transformers' smart_resize. 30 x 45 pixels, 2 tokens, become 6 where 56 x 56 is the least."""
    rules = limits(most, least)
    items = choose(side, rules)
    sizes = [tokens_by_hugging_face(item, rules) for item in items if item.image is not None]
    assert all(least <= size <= most for size in sizes)
    assert len(items) > (RANKS if side == "candidate" else 0)
    assert {item.kind for item in items} == {"text", "image", "image + text"}
    if choose is golden_items:
        assert max(sizes) >= max(least, int(np.sqrt(most)) ** 2), "the largest square, or what comes near"


@pytest.mark.parametrize(
    ("least", "most", "size"),
    [(4, 1024, (896, 896)), (4, 1000, (868, 868)), (5, 7, (84, 56)), (7, 7, (196, 28)), (1, 1, (28, 28))],
)
def test_the_largest_image_is_a_square_where_a_square_is_allowed(least: int, most: int, size: tuple[int, int]):
    """By hand: 32 x 32 = 1024 tokens; 31 x 31 below 1000; no square lies in 5..7, but 3 x 2 does; 7 is 7 x 1."""
    assert largest_size(limits(most, least)) == size


def test_limits_that_no_image_keeps_are_one_sentence():
    """401 is prime, and 401 x 1 is longer than the 200 times its width that Qwen takes."""
    with pytest.raises(UsageError, match="no image keeps to both limits"):
        golden_items("query", limits(401, 401))


def test_the_full_limits_leave_no_image_out():
    images = [item.image.size for item in golden_items("query", limits(1024, 4)) if item.kind == "image"]
    assert images == [*IMAGE_SIZES, (896, 896)]


def test_the_full_limits_take_every_text():
    assert [item.text for item in golden_items("query", limits(1024)) if item.kind == "text"] == list(TEXTS)


def test_images_are_the_same_every_time_and_differ_between_sides():
    first, again = (golden_items("query", limits(50))[-1].image for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != golden_items("candidate", limits(50))[-1].image.tobytes()
