"""Layouts counted by hand. The comparison with Hugging Face is in tests/parity/."""

import numpy as np
import pytest

from metaembed.runtime.layout import (
    candidate_meta_tokens,
    count_windows,
    lay_out_images,
    lay_out_prompts,
    patch_coordinates,
    prompt_positions,
    query_meta_tokens,
    window_slots,
)

IMAGE = 9


@pytest.mark.parametrize(
    ("grid", "windows"), [((2, 2), 1), ((8, 8), 1), ((8, 10), 2), ((10, 10), 4), ((2, 66), 9), ((64, 64), 64)]
)
def test_windows_are_eight_patches_a_side(grid: tuple[int, int], windows: int):
    assert count_windows(grid) == windows


def test_slots_of_a_ragged_grid_by_hand():
    """5 x 6 merged units: windows of 4 x 4, 4 x 2, 1 x 4 and 1 x 2 units, real units first in each."""
    expected = [
        [0, 1, 2, 3, 16, 17],
        [4, 5, 6, 7, 18, 19],
        [8, 9, 10, 11, 20, 21],
        [12, 13, 14, 15, 22, 23],
        [32, 33, 34, 35, 48, 49],
    ]
    assert window_slots((10, 12)).reshape(5, 6).tolist() == expected


def test_patches_come_by_merged_unit():
    assert patch_coordinates((2, 4)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


def test_images_of_different_sizes_share_a_batch_with_zeros_elsewhere():
    grids = [(2, 4), (10, 10)]
    pixels = [np.full((8, 3), 1, np.float32), np.full((100, 3), 2, np.float32)]
    inputs = lay_out_images(pixels, grids)
    assert inputs.patches.shape == (2, 4, 64, 3)
    assert inputs.patch_mask.sum(2).tolist() == [[8, 0, 0, 0], [64, 16, 16, 4]]
    assert inputs.patches[0].sum() == 8 * 3
    assert (inputs.patches[~inputs.patch_mask] == 0).all()
    assert inputs.patch_mask[1, 3].tolist() == [True] * 4 + [False] * 60


def test_positions_of_text_alone_count_up():
    assert prompt_positions(np.array([5, 6, 7]), IMAGE, None).tolist() == [[0, 1, 2, 3]] * 3


def test_positions_of_an_image_by_hand():
    """Two tokens, an image of 2 x 3 merged units, one token: the text goes on at 2 + max(2, 3)."""
    prompt = np.array([5, 6, *[IMAGE] * 6, 7])
    assert prompt_positions(prompt, IMAGE, (4, 6)).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_padding_stands_between_prompt_and_meta_tokens():
    prompts = [np.array([5, 6, 7]), np.array([8])]
    laid = lay_out_prompts(prompts, [None, None], np.array([20, 21]), 2, image_token=IMAGE)
    assert laid.token_ids[:, -2:].tolist() == [[20, 21], [20, 21]]
    assert laid.mask.tolist() == [[True] * 5, [True, False, False, True, True]]
    assert laid.positions[1, 0, [0, 3, 4]].tolist() == [0, 1, 2], "padding shifts no position"
    assert laid.rows.tolist() == [3, 4]
    assert (laid.image_rows == -1).all()


def test_a_bucket_lengthens_the_padding_only():
    laid = lay_out_prompts([np.array([5, 6])], [None], np.array([20, 21, 22]), 1, image_token=IMAGE, length=6)
    assert laid.token_ids.shape == (1, 9)
    assert laid.mask[0].tolist() == [True, True, *[False] * 4, True, True, True]
    assert laid.rows.tolist() == [8]


def test_images_are_counted_past_items_without_one():
    """Image k starts at row k * w * 16 of the vision output, whatever texts stand between."""
    picture = np.array([1, IMAGE, IMAGE, 2])
    prompts, grids = [picture, np.array([5, 6]), picture], [(2, 4), None, (4, 2)]
    laid = lay_out_prompts(prompts, grids, np.array([20]), 1, image_token=IMAGE, windows=3)
    assert laid.image_rows.tolist() == [[-1, 0, 1, -1, -1], [-1] * 5, [-1, 48, 49, -1, -1]]


def test_a_candidate_keeps_every_query_row_in_front():
    """FACTS 1: [prompt][query x 16][candidate x r_c]; a query needs its own rows only."""
    assert query_meta_tokens(100, 3).tolist() == [100, 101, 102]
    assert candidate_meta_tokens(100, 16, 2).tolist() == [*range(100, 116), 116, 117]
