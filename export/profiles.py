"""Which engines a target gets, and the shapes each is tuned for: profiles cut to the budgets and the limits.

Shapes: b items, t positions, r answer rows, i images, w windows, m image embeddings of one image (w * 16), d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import UsageError
from metaembed.runtime.layout import PATCHES, TEMPLATE_TOKENS, UNITS, most_windows, square_windows
from metaembed.runtime.manifest import SCORER, Manifest

Shape = tuple[int, ...]
TYPICAL_TEXT = 32  # positions of a template and a short text: what the opt shape of a profile is tuned for
LAYOUTS = ("shared", "separate")


@dataclass(frozen=True)
class Sizes:
    """What profiles are cut to; ``prompt_tokens`` is the longest prompt, template and image included."""

    hidden: int
    patch_values: int
    query_tokens: int
    image_tokens: int
    prompt_tokens: int

    @classmethod
    def of(cls, manifest: Manifest) -> Sizes:
        geometry, limits = manifest.geometry, manifest.limits
        return cls(
            hidden=geometry.text.hidden,
            patch_values=geometry.vision.patch_values,
            query_tokens=geometry.query_tokens,
            image_tokens=limits.image_tokens,
            prompt_tokens=limits.image_tokens + limits.text_tokens + TEMPLATE_TOKENS,
        )


@dataclass(frozen=True)
class Range:
    """TensorRT's min-opt-max of one input."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        if not all(low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"range {self.min} <= {self.opt} <= {self.max} is out of order")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: a name for people and logs, and a range per input."""

    name: str
    ranges: dict[str, Range]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "ranges": {name: asdict(span) for name, span in self.ranges.items()}}


@dataclass(frozen=True)
class EngineSpec:
    """One engine to build: ``<name>.plan`` from a graph of the bundle. ``tf32``: whether TensorRT may compute its float32
    products in TensorFloat-32."""

    name: str
    graph: str
    profiles: tuple[Profile, ...]
    tf32: bool = False


@dataclass(frozen=True)
class Side:
    """One side of retrieval: the numbers of answer rows asked of it, and the Meta Tokens that stand before them."""

    name: str
    rows: tuple[int, ...]
    meta: int
    batch: int
    with_image: bool


def plan_engines(
    sizes: Sizes,
    budgets: Iterable[Budget],
    *,
    layout: str = "shared",
    side: str | None = None,
    profile_per_budget: bool = False,
    query_batch: int = 8,
    candidate_batch: int = 4,
) -> tuple[EngineSpec, ...]:
    """The engines of a target.

    ``shared``: one language engine with the weights once, a profile for queries and one for candidates, each spanning
    the requested budgets, or with ``profile_per_budget`` one per distinct size and side. ``separate``: an engine per
    distinct size and side, each with its own weights, for a device that runs one side at one budget. ``side`` keeps
    the profiles of one side only.

    Raises:
        UsageError: an unknown layout, or a batch below 1.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if min(query_batch, candidate_batch) < 1:
        raise UsageError("a batch needs at least one item")
    sides = [
        found for found in _sides(sizes, tuple(budgets), query_batch, candidate_batch) if side in (None, found.name)
    ]
    split = profile_per_budget or layout == "separate"
    profiles = [language_profile(sizes, part) for found in sides for part in (_each_size(found) if split else [found])]
    vision = EngineSpec("vision", "vision.onnx", (vision_profile(sizes, max(found.batch for found in sides)),))
    if layout == "separate":
        return (vision, *(EngineSpec(profile.name, "language.onnx", (profile,)) for profile in profiles))
    return (vision, EngineSpec("language", "language.onnx", tuple(profiles)))


def _sides(sizes: Sizes, budgets: tuple[Budget, ...], query_batch: int, candidate_batch: int) -> tuple[Side, Side]:
    queries = tuple(sorted({budget.query for budget in budgets}))
    candidates = tuple(sorted({budget.candidate for budget in budgets}))
    return (
        Side("query", queries, 0, query_batch, with_image=False),
        Side("candidate", candidates, sizes.query_tokens, candidate_batch, with_image=True),
    )


def _each_size(side: Side) -> list[Side]:
    return [Side(f"{side.name}-{size}", (size,), side.meta, side.batch, side.with_image) for size in side.rows]


def language_profile(sizes: Sizes, side: Side) -> Profile:
    """Min covers one token at the smallest size, opt a typical item of this side at the largest, max the limits.

    Both sides may carry an image; opt assumes a text query and an image candidate, which is what most systems run.
    """
    small, large = side.rows[0], side.rows[-1]
    typical = min(TYPICAL_TEXT, sizes.prompt_tokens - sizes.image_tokens) + (
        sizes.image_tokens if side.with_image else 0
    )
    lengths = (1 + side.meta + small, typical + side.meta + large, sizes.prompt_tokens + side.meta + large)
    batches = (1, 1, side.batch)
    images = (1, 1, side.batch)
    slots = (
        1,
        UNITS * square_windows(sizes.image_tokens) if side.with_image else 1,
        UNITS * most_windows(sizes.image_tokens),
    )
    return Profile(
        side.name,
        {
            "token_ids": _range(batches, lengths),
            "image_rows": _range(batches, lengths),
            "image_embeddings": _range(images, slots, (sizes.hidden,) * 3),
            "positions": _range(batches, (3,) * 3, lengths),
            "mask": _range(batches, lengths),
            "rows": _range((small, large, large)),
        },
    )


def vision_profile(sizes: Sizes, images: int) -> Profile:
    """Opt is one square image at the limit; max covers ``images`` of the most wasteful aspect ratio."""
    batches = (1, 1, images)
    windows = (1, square_windows(sizes.image_tokens), most_windows(sizes.image_tokens))
    patches = (PATCHES,) * 3
    return Profile(
        "images",
        {
            "patches": _range(batches, windows, patches, (sizes.patch_values,) * 3),
            "patch_positions": _range(batches, windows, patches, (2,) * 3),
            "patch_mask": _range(batches, windows, patches),
        },
    )


def scorer_engine(dim: int, query: int, queries: int, chunks: Mapping[int, int], *, narrow: bool = False) -> EngineSpec:
    """The engine of a scorer: up to ``queries`` queries of up to ``query`` vectors, and a profile for each size of candidates.

    ``chunks``: vectors of a candidate -> candidates at once. One profile over all sizes would allow the chunk of the largest
    only: 3B's, of 64 vectors, is 291 candidates, which at one vector each are 1.2 MB, and a run is then all overhead.
    ``narrow``: the vectors are bf16 or fp16, which TensorFloat-32 holds exactly.
    """
    profiles = [
        Profile(
            f"chunks-{size}",
            {
                "queries": _range((1, 1, queries), (1, query, query), (dim,) * 3),
                "candidates": _range((1, chunk, chunk), (1, size, size), (dim,) * 3),
            },
        )
        for size, chunk in sorted(chunks.items())
    ]
    return EngineSpec("scorer", SCORER, tuple(profiles), tf32=narrow)


def _range(*axes: tuple[int, ...]) -> Range:
    """From (min, opt, max) of each axis to the three shapes."""
    low, best, high = zip(*axes, strict=True)
    return Range(low, best, high)
