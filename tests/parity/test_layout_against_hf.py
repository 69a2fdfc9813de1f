"""Window order and M-RoPE positions against Hugging Face's own functions, on many grids."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from metaembed.runtime.layout import lay_out_images, prompt_positions, window_slots

IMAGE = 77
GRIDS = [(2 * rows, 2 * columns) for rows in (1, 3, 4, 5, 9, 33) for columns in (1, 2, 4, 7, 8, 31)]


@pytest.fixture(scope="module")
def hf() -> Qwen2_5_VLModel:
    """A model of no consequence: only its host-side functions are used."""
    text = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1} | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": 75, "vision_end_token_id": 76, "video_token_id": 78}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def hf_windows(hf: Qwen2_5_VLModel, grid_thw: torch.Tensor):
    """A method of the vision tower in early transformers 5, a function later."""
    if hasattr(hf.visual, "get_window_index"):
        return hf.visual.get_window_index(grid_thw)
    return modeling_qwen2_5_vl.get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=112, patch_size=14)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_order_equals_hf(hf: Qwen2_5_VLModel, grid: tuple[int, int]):
    """HF lists merged units in window order; ours says where each lands. Windows of ours are padded to 16 units."""
    order, boundaries = hf_windows(hf, torch.tensor([[1, *grid]]))
    lengths = np.diff(np.unique(boundaries)) // 4  # HF's boundaries count patches; empty windows repeat one
    slots = window_slots(grid)[np.asarray(order)]
    expected = np.concatenate([window * 16 + np.arange(length) for window, length in enumerate(lengths)])
    np.testing.assert_array_equal(slots, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("before", "after"), [(1, 0), (5, 9)])
def test_prompt_positions_equal_hf(hf: Qwen2_5_VLModel, grid: tuple[int, int], before: int, after: int):
    prompt = np.array([3] * before + [75] + [IMAGE] * (grid[0] * grid[1] // 4) + [76] + [4] * after)
    with_next = torch.from_numpy(np.append(prompt, 5))[None]
    expected, _ = hf.get_rope_index(with_next, (with_next == IMAGE).int(), torch.tensor([[1, *grid]]))
    np.testing.assert_array_equal(prompt_positions(prompt, IMAGE, grid), expected[:, 0])


def test_patch_positions_equal_the_place_of_each_patch():
    """Patches carry their own coordinates as pixels here; HF's processor orders them by merged unit, then inside it."""
    grid = (10, 14)
    rows, columns = np.indices(grid)
    tagged = np.stack([rows, columns], -1).reshape(5, 2, 7, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    pixels = np.zeros((len(tagged), 1176), np.float32)
    pixels[:, :2] = tagged
    inputs = lay_out_images([pixels], [grid])
    assert inputs.patch_mask.sum() == len(tagged)
    np.testing.assert_array_equal(inputs.patch_positions[inputs.patch_mask], inputs.patches[inputs.patch_mask][:, :2])
