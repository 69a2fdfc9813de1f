"""Everything data-dependent about an input, computed on the host: window order, positions, masks, answer rows.

The traced graphs hold no data-dependent control flow; these arrays carry it. PyTorch (tracing, training, tests) and the
torch-free runtime share this file. Shapes: i images, w windows, b items, t positions, r vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isqrt

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
WINDOW = 4  # a window is 4 x 4 merged units (window_size 112 = 4 x 2 x 14 px)
MERGE = 2  # a merged unit is 2 x 2 patches
UNITS = WINDOW * WINDOW  # merged units, that is image embeddings, in a window
PATCHES = UNITS * MERGE * MERGE  # patches in a window
NOT_IMAGE = -1
LARGEST_ASPECT = 200  # Qwen's smart_resize refuses thinner images
TEMPLATE_TOKENS = 40  # room for what a template adds to text and image: 26 at most in the released configuration


class _Feeds:
    """A dataclass of arrays that can be handed to a session by name."""

    def feeds(self) -> dict[str, NDArray[np.generic]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class VisionInputs(_Feeds):
    """Feeds of the vision graph: patches [i, w, 64, 1176], patch_positions [i, w, 64, 2], patch_mask [i, w, 64]."""

    patches: NDArray[np.float32]
    patch_positions: Ints
    patch_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class LanguageInputs(_Feeds):
    """Feeds of the language graph but for the image embeddings (see CONTRIBUTING.md for each shape)."""

    token_ids: Ints
    image_rows: Ints
    positions: Ints
    mask: NDArray[np.bool_]
    rows: Ints


def count_windows(grid: tuple[int, int]) -> int:
    """Windows that an image of ``grid`` = (rows, columns) of patches occupies."""
    down, across = (-(-side // (MERGE * WINDOW)) for side in grid)
    return down * across


def square_windows(image_tokens: int) -> int:
    """Windows of a square image with about ``image_tokens`` merged units."""
    side = max(1, int(image_tokens**0.5))
    return (-(-side // WINDOW)) ** 2


def most_windows(image_tokens: int) -> int:
    """The most windows that an image within the limit occupies; thin ones waste the most (2 x 452 units: 113 windows).

    A side is at most sqrt(200 * tokens) units long: smart_resize refuses aspect ratios above 200, then scales the area.
    """
    longest = isqrt(LARGEST_ASPECT * image_tokens)
    found = 1
    for height in range(1, min(image_tokens, longest) + 1):
        width = min(image_tokens // height, longest)
        found = max(found, -(-height // WINDOW) * -(-width // WINDOW))
    return found


def window_slots(grid: tuple[int, int]) -> Ints:
    """For each merged unit in raster order, its row in the vision graph's output (window order, real units first)."""
    height, width = grid[0] // MERGE, grid[1] // MERGE
    down, across = np.indices((height, width)).reshape(2, -1)
    window = (down // WINDOW) * -(-width // WINDOW) + across // WINDOW
    real_width = np.minimum(WINDOW, width - across // WINDOW * WINDOW)  # windows at the right edge are narrower
    return np.asarray(window * UNITS + down % WINDOW * real_width + across % WINDOW, np.int64)


def patch_coordinates(grid: tuple[int, int]) -> Ints:
    """(row, column) of each patch in Qwen's order, the four patches of a merged unit in sequence: [p, 2]."""
    units = np.indices((grid[0] // MERGE, grid[1] // MERGE)).reshape(2, -1, 1)
    inside = np.indices((MERGE, MERGE)).reshape(2, 1, -1)
    coordinates: Ints = (units * MERGE + inside).reshape(2, -1).T
    return coordinates


def lay_out_images(pixels: Sequence[NDArray[np.float32]], grids: Sequence[tuple[int, int]]) -> VisionInputs:
    """Place the patches of each image (``pixels[k]``: [p, 1176]) into windows padded to 64 patches."""
    shape = (len(grids), max(map(count_windows, grids)), PATCHES)
    patches = np.zeros((*shape, pixels[0].shape[1]), np.float32)  # zeros: a NaN in padding would poison every image
    positions = np.zeros((*shape, 2), np.int64)
    mask = np.zeros(shape, np.bool_)
    for image, (values, grid) in enumerate(zip(pixels, grids, strict=True)):
        slots = (window_slots(grid)[:, None] * MERGE**2 + np.arange(MERGE**2)).reshape(-1)
        patches[image].reshape(-1, values.shape[1])[slots] = values
        positions[image].reshape(-1, 2)[slots] = patch_coordinates(grid)
        mask[image].reshape(-1)[slots] = True
    return VisionInputs(patches, positions, mask)


def prompt_positions(prompt: Ints, image_token: int, grid: tuple[int, int] | None) -> Ints:
    """M-RoPE positions (temporal, height, width) of a prompt, and of the position that follows it: [3, len + 1].

    Text advances all three together; an image of H x W merged units holds the time still, spans rows and columns, and
    the text after it continues at max(H, W) (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    is_image = prompt == image_token
    positions = np.tile(np.arange(len(prompt) + 1), (3, 1))
    if grid is None:
        return positions
    height, width = grid[0] // MERGE, grid[1] // MERGE
    start = int(np.argmax(is_image))
    stop = start + height * width
    down, across = np.indices((height, width)).reshape(2, -1)
    positions[:, start:stop] = start + np.stack([np.zeros_like(down), down, across])
    positions[:, stop:] += max(height, width) - height * width
    return positions


def lay_out_prompts(
    prompts: Sequence[Ints],
    grids: Sequence[tuple[int, int] | None],
    meta_tokens: Ints,
    answers: int,
    *,
    image_token: int,
    windows: int = 0,
    length: int | None = None,
) -> LanguageInputs:
    """Pad prompts on the right, append the Meta Tokens, and point every image position at its embedding.

    Args:
        prompts: token ids of each item, image tokens repeated, without Meta Tokens.
        grids: the image's (rows, columns) of patches of each item, or None. The images stand in the vision batch in
            the order of the items that have one.
        meta_tokens: ids of the Meta Tokens to append; the last ``answers`` of them are the answer.
        windows: w of the vision batch, so that image k starts at row k * w * 16.
        length: pad prompts to this many positions (a bucket); by default to the longest.
    """
    longest = max(len(prompt) for prompt in prompts)
    padded = longest if length is None else length
    shape = (len(prompts), padded + len(meta_tokens))
    token_ids = np.zeros(shape, np.int64)
    image_rows = np.full(shape, NOT_IMAGE, np.int64)
    positions = np.zeros((shape[0], 3, shape[1]), np.int64)
    mask = np.zeros(shape, np.bool_)
    image = 0
    for item, (prompt, grid) in enumerate(zip(prompts, grids, strict=True)):
        here = prompt_positions(prompt, image_token, grid)
        token_ids[item, : len(prompt)] = prompt
        positions[item, :, : len(prompt)] = here[:, :-1]
        positions[item, :, padded:] = here[:, -1:] + np.arange(len(meta_tokens))
        mask[item, : len(prompt)] = mask[item, padded:] = True
        if grid is not None:
            image_rows[item, : len(prompt)][prompt == image_token] = image * windows * UNITS + window_slots(grid)
            image += 1
    token_ids[:, padded:] = meta_tokens
    rows = np.arange(shape[1] - answers, shape[1], dtype=np.int64)
    return LanguageInputs(token_ids, image_rows, positions, mask, rows)


def query_meta_tokens(vocabulary: int, budget: int) -> Ints:
    """A query of budget r_q appends ``query[:r_q]``; all of them are the answer. Ids follow the token table."""
    return vocabulary + np.arange(budget, dtype=np.int64)


def candidate_meta_tokens(vocabulary: int, query_tokens: int, budget: int) -> Ints:
    """A candidate of budget r_c appends **all** query rows, then ``candidate[:r_c]``; the last r_c are the answer."""
    return vocabulary + np.arange(query_tokens + budget, dtype=np.int64)
