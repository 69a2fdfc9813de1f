"""The traced modules against Hugging Face's Qwen2_5_VLModel with random weights: every expected value is HF's.

The geometry is not the demo's: head sizes, layers and vocabulary differ, and no two of its sizes coincide.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, normalize
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from metaembed.export.encoder import LanguageEncoder, VisionEncoder
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.layout import (
    VisionInputs,
    candidate_meta_tokens,
    lay_out_images,
    lay_out_prompts,
    query_meta_tokens,
    window_slots,
)

VOCAB, START, END, IMAGE, VIDEO = 600, 588, 589, 590, 591
QUERIES, CANDIDATES, DIM, PROJECTION = 16, 64, 96, 40
ROPE = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [2, 4, 6]}
TEXT = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": 160, "num_hidden_layers": 3} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": ROPE,
    "rms_norm_eps": 1e-6,
}
VISION = {"depth": 3, "hidden_size": 80, "intermediate_size": 136, "num_heads": 5, "out_hidden_size": DIM} | {
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
}

# (rows, columns) of patches: one merged unit, one whole window, strips, ragged windows, tall, wide.
GRIDS = [(2, 2), (8, 8), (6, 30), (28, 28), (2, 66), (66, 2), (18, 12), (10, 2)]
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Models:
    """HF's model, and ours with the same weights."""

    hf: Qwen2_5_VLModel
    meta: torch.Tensor
    projection: tuple[torch.Tensor, torch.Tensor] | None
    vision: VisionEncoder
    language: LanguageEncoder


def build(projection: bool, vision_config: dict[str, object] = VISION) -> Models:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=vision_config,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
    )
    hf = Qwen2_5_VLModel(config).eval().requires_grad_(False)
    for parameter in hf.parameters():
        noise = 0.1 * torch.randn_like(parameter)
        parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    extra = {"prompt_embed_tokens.weight": torch.randn(QUERIES + CANDIDATES, DIM)}
    if projection:
        extra |= {
            "custom_text_proj.weight": torch.randn(PROJECTION, DIM),
            "custom_text_proj.bias": torch.randn(PROJECTION),
        }
    geometry = Geometry.from_config(config.to_dict() | {"model_type": "qwen2_5_vl"})
    geometry = replace(geometry, projection=PROJECTION if projection else None)
    weights = {**hf.state_dict(), **extra}
    vision, language = VisionEncoder(geometry).eval(), LanguageEncoder(geometry).eval()
    # Strict: a parameter that HF does not have, or that we lack, is an error here.
    vision.load_state_dict({name: value for name, value in weights.items() if name.startswith("visual.")})
    language.load_state_dict({name: value for name, value in weights.items() if not name.startswith("visual.")})
    head = (extra["custom_text_proj.weight"], extra["custom_text_proj.bias"]) if projection else None
    return Models(hf, extra["prompt_embed_tokens.weight"], head, vision, language)


@pytest.fixture(scope="module", params=[False, True], ids=["hidden", "projected"])
def models(request: pytest.FixtureRequest) -> Models:
    with torch.inference_mode():
        return build(request.param)


@pytest.fixture(scope="module")
def large() -> Models:
    with torch.inference_mode():
        return build(False, VISION | {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 1})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def random_pixels(grids: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows * columns, 1176)).astype(np.float32) for rows, columns in grids]


def run_vision(models: Models, inputs: VisionInputs) -> torch.Tensor:
    return models.vision(*map(torch.from_numpy, inputs.feeds().values()))


def hf_vision(models: Models, pixels: list[np.ndarray], grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """HF's image embeddings of each image, in raster order, in float64 but where HF itself asks for float32.

    In float32 its own rounding (8.6e-6 where ours is 4.7e-6, values up to 9) would take nearly all of the tolerance.
    """
    thw = torch.tensor([[1, *grid] for grid in grids])
    exact = deepcopy(models.hf.visual).double()
    output = exact(torch.from_numpy(np.concatenate(pixels)).double(), grid_thw=thw).pooler_output
    return list(output.split([rows * columns // 4 for rows, columns in grids]))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.isfinite().all()
    return float((a - b).abs().max())


def test_vision_module_equals_hf_on_a_mixed_batch(models: Models):
    """Every grid in one batch, so that all but the largest image have windows that are nothing but padding."""
    pixels = random_pixels(GRIDS)
    mine = run_vision(models, lay_out_images(pixels, GRIDS))
    for image, (grid, wanted) in enumerate(zip(GRIDS, hf_vision(models, pixels, GRIDS), strict=True)):
        assert worst(mine[image][window_slots(grid)], wanted) <= TOLERANCE, grid


@pytest.mark.parametrize("grid", [(2, 2), (6, 30), (66, 2)])
def test_vision_module_equals_hf_on_one_image(models: Models, grid: tuple[int, int]):
    pixels = random_pixels([grid], seed=3)
    mine = run_vision(models, lay_out_images(pixels, [grid]))
    assert worst(mine[0][window_slots(grid)], hf_vision(models, pixels, [grid])[0]) <= TOLERANCE


UNITS = st.integers(1, 24)  # merged units of 2 x 2 patches along a side


@given(units=st.lists(st.tuples(UNITS, UNITS), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_grids_in_one_vision_batch_equal_hf(models: Models, units: list[tuple[int, int]]):
    grids = [(2 * rows, 2 * columns) for rows, columns in units]
    pixels = random_pixels(grids)
    mine = run_vision(models, lay_out_images(pixels, grids))
    for image, (grid, wanted) in enumerate(zip(grids, hf_vision(models, pixels, grids), strict=True)):
        assert worst(mine[image][window_slots(grid)], wanted) <= TOLERANCE, grid


@given(units=st.tuples(st.integers(20, 48), st.integers(20, 48)))
@example(units=(48, 48))  # 2,304 visual tokens
@example(units=(4, 576))
@settings(max_examples=2, deadline=None, derandomize=True)
def test_images_beyond_1024_tokens_equal_hf(large: Models, units: tuple[int, int]):
    """One head and one full block, since attention over a whole image takes memory with the square of its tokens."""
    grid = (2 * units[0], 2 * units[1])
    pixels = random_pixels([grid])
    mine = run_vision(large, lay_out_images(pixels, [grid]))
    assert worst(mine[0][window_slots(grid)], hf_vision(large, pixels, [grid])[0]) <= TOLERANCE


@pytest.mark.parametrize("filler", [1e4, -1e4])
def test_values_in_padded_patches_change_no_image(models: Models, filler: float):
    """Padding is masked, not merely zero: any finite value there gives the same embeddings (within 1e-6)."""
    grids = [(2, 2), (6, 10), (16, 24)]
    inputs = lay_out_images(random_pixels(grids), grids)
    patches = np.where(inputs.patch_mask[..., None], inputs.patches, np.float32(filler))
    before, after = run_vision(models, inputs), run_vision(models, replace(inputs, patches=patches))
    for image, grid in enumerate(grids):
        assert worst(after[image][window_slots(grid)], before[image][window_slots(grid)]) <= 1e-6


def test_fully_padded_windows_make_no_nan_anywhere(models: Models):
    """The trap of FACTS 2: a softmax over nothing but -inf is NaN, and 0 * NaN then poisons every real row."""
    grids = [(2, 2), (28, 28)]
    inputs = lay_out_images(random_pixels(grids), grids)
    assert not inputs.patch_mask[0, 1:].any()
    assert run_vision(models, inputs).isfinite().all()


@dataclass(frozen=True)
class Item:
    """A prompt, and the image that stands in it."""

    prompt: np.ndarray
    grid: tuple[int, int] | None
    pixels: np.ndarray | None


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Images of every grid and texts, of lengths that all differ; a text comes between images."""
    grids = [*GRIDS[:3], None, *GRIDS[4:], None]
    shown = random_pixels([grid for grid in grids if grid])
    made = []
    for place, grid in enumerate(grids):
        units = grid[0] * grid[1] // 4 if grid else 0
        picture = [START, *[IMAGE] * units, END] if grid else []
        words = np.random.default_rng(place).integers(3, 580, 2 + place).tolist()
        made.append(Item(np.array([1, 2, *picture, *words], np.int64), grid, shown.pop(0) if grid else None))
    return made


def encode(
    models: Models, batch: list[Item], meta: np.ndarray, answers: int, length: int | None = None
) -> torch.Tensor:
    seen = [item for item in batch if item.grid]
    embedded, windows = torch.zeros(1, 1, DIM), 0
    if seen:
        inputs = lay_out_images([item.pixels for item in seen], [item.grid for item in seen])
        embedded, windows = run_vision(models, inputs), inputs.patches.shape[1]
    prompts, grids = [item.prompt for item in batch], [item.grid for item in batch]
    laid = lay_out_prompts(prompts, grids, meta, answers, image_token=IMAGE, windows=windows, length=length)
    return models.language(
        **{name: torch.from_numpy(value) for name, value in laid.feeds().items()}, image_embeddings=embedded
    )


def hf_embeddings(models: Models, item: Item) -> torch.Tensor:
    """All 80 embeddings of one item, the official way: every Meta Token row appended, HF's own positions."""
    rows = len(models.meta)
    ids = torch.from_numpy(np.concatenate([item.prompt, np.full(rows, 3)]))[None]
    embeds = models.hf.get_input_embeddings()(ids)
    embeds[0, -rows:] = models.meta
    if item.grid:
        embeds[ids == IMAGE] = hf_vision(models, [item.pixels], [item.grid])[0].float()
    grid = torch.tensor([[1, *item.grid]]) if item.grid else None
    positions, _ = models.hf.get_rope_index(ids, (ids == IMAGE).int(), grid)
    hidden = models.hf.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones_like(ids)
    ).last_hidden_state[0, -rows:]
    return normalize(linear(hidden, *models.projection) if models.projection else hidden, dim=-1)


@pytest.fixture(scope="module")
def reference(models: Models, items: list[Item]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([hf_embeddings(models, item) for item in items])


@pytest.mark.parametrize("budget", [1, 7, 16])
def test_query_embeddings_equal_hf(models: Models, items: list[Item], reference: torch.Tensor, budget: int):
    mine = encode(models, items, query_meta_tokens(VOCAB, budget), budget)
    assert worst(mine, reference[:, :budget]) <= TOLERANCE


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_candidate_embeddings_equal_hf(models: Models, items: list[Item], reference: torch.Tensor, budget: int):
    mine = encode(models, items, candidate_meta_tokens(VOCAB, QUERIES, budget), budget)
    assert worst(mine, reference[:, QUERIES : QUERIES + budget]) <= TOLERANCE


@pytest.mark.parametrize("shown", [0, 8])
def test_a_candidate_without_all_query_rows_in_front_does_not_match(
    models: Models, items: list[Item], reference: torch.Tensor, shown: int
):
    """Candidate rows attend to the query rows before them (FACTS 1): leaving some out is a mistake, and is seen."""
    meta = np.concatenate([query_meta_tokens(VOCAB, shown), candidate_meta_tokens(VOCAB, QUERIES, 4)[QUERIES:]])
    mine = encode(models, items, meta, 4)
    assert float((mine - reference[:, QUERIES : QUERIES + 4]).abs().max()) > 1e-2


def test_order_and_batch_mates_change_nothing(models: Models, items: list[Item]):
    meta = candidate_meta_tokens(VOCAB, QUERIES, 5)
    together, backwards = encode(models, items, meta, 5), encode(models, items[::-1], meta, 5)
    alone = torch.cat([encode(models, [item], meta, 5) for item in items])
    assert worst(backwards.flip(0), together) <= TOLERANCE
    assert worst(alone, together) <= TOLERANCE


def test_longer_padding_changes_nothing(models: Models, items: list[Item]):
    meta = query_meta_tokens(VOCAB, 7)
    longest = max(len(item.prompt) for item in items)
    assert worst(encode(models, items, meta, 7, longest + 37), encode(models, items, meta, 7)) <= TOLERANCE


def test_token_ids_in_padding_change_nothing(models: Models, items: list[Item]):
    texts = [item for item in items if item.grid is None]
    prompts = [item.prompt for item in texts]
    laid = lay_out_prompts(prompts, [None] * len(texts), query_meta_tokens(VOCAB, 3), 3, image_token=IMAGE, length=29)

    def run(token_ids: np.ndarray) -> torch.Tensor:
        feeds = {**laid.feeds(), "token_ids": token_ids, "image_embeddings": np.zeros((1, 1, DIM), np.float32)}
        return models.language(**{name: torch.from_numpy(value) for name, value in feeds.items()})

    assert not laid.mask.all()
    assert worst(run(np.where(laid.mask, laid.token_ids, 77)), run(laid.token_ids)) <= 1e-6


def test_embeddings_are_float32_of_length_one(models: Models, items: list[Item]):
    mine = encode(models, items, candidate_meta_tokens(VOCAB, QUERIES, 5), 5)
    assert mine.dtype == torch.float32
    assert mine.shape == (len(items), 5, DIM if models.projection is None else PROJECTION)
    np.testing.assert_allclose(np.linalg.norm(mine.numpy().astype(np.float64), axis=-1), 1, atol=1e-6)
