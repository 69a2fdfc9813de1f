"""A plan: what one model, some budgets and so many candidates need, worked out without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .budget import Budget
from .cost import BYTES, EncoderFlops, activation_bytes, encoder_flops, index_bytes, scoring_flops, weight_bytes
from .errors import BundleError, UsageError
from .geometry import Geometry
from .images import DEFAULT_SIZE, ImageRules, smart_resize
from .known_models import DEMO, KNOWN
from .layout import PATCHES, count_windows
from .manifest import MANIFEST, Bundle
from .projection import with_stored_projection
from .tensors import parameter_count

SIZES = {DEMO.name: DEMO, **KNOWN}
# Positions of a prompt that are neither image nor Meta Token, template and a query's ten end tokens included.
QUERY_TEXT, IMAGE_TEXT = 32, 12
IMAGE_TOKENS = (64, 256, 1024)
# Width x height in pixels; the page is A4 at 150 dpi.
TYPICAL_IMAGES = {
    "icon": (56, 56),
    "thumbnail": (224, 224),
    "photo": (640, 480),
    "screen": (1280, 720),
    "page": (1240, 1754),
    "banner": (1600, 100),
}


@dataclass(frozen=True)
class InputCost:
    """One input: its positions in the decoder, image tokens among them, and the operations of both graphs."""

    name: str
    positions: int
    image_tokens: int
    flops: EncoderFlops


@dataclass(frozen=True)
class BudgetCost:
    """One budget over all candidates: operations to score one query, bytes of the index."""

    budget: Budget
    scoring_flops: int
    index_bytes: int


@dataclass(frozen=True)
class WindowPadding:
    """Patches that the vision graph computes (windows of 64, whole) over those that the image has."""

    name: str
    width: int
    height: int
    image_tokens: int
    ratio: float


@dataclass(frozen=True)
class Plan:
    """Everything that metaembed-plan prints; bytes and operations, not measured."""

    model: str
    geometry: Geometry
    candidates: int
    max_image_tokens: int
    batch: int
    parameters: int
    weight_bytes: dict[str, int]
    activation_bytes: int
    inputs: tuple[InputCost, ...]
    budgets: tuple[BudgetCost, ...]
    padding: tuple[WindowPadding, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_geometry(model: str) -> Geometry:
    """The geometry of a known size, a bundle or a Hugging Face checkpoint folder; no weights are needed.

    Raises:
        UsageError: the model is none of them.
        BundleError: its config.json or bundle.json is damaged.
    """
    if model.lower() in SIZES:
        return SIZES[model.lower()].geometry
    if (Path(model) / MANIFEST).is_file():
        return Bundle.open(model, verify=False).manifest.geometry
    if not (Path(model) / "config.json").is_file():
        raise UsageError(f"{model!r} is none of {', '.join(SIZES)}, nor a bundle or checkpoint folder")
    try:
        config = json.loads((Path(model) / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{model}/config.json cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise BundleError(f"{model}/config.json does not hold a JSON object")
    return Geometry.from_config(with_stored_projection(config, Path(model)))


def make_plan(
    model: str,
    geometry: Geometry,
    budgets: Sequence[Budget],
    candidates: int,
    *,
    max_image_tokens: int = 1024,
    batch: int = 1,
) -> Plan:
    """Work out a plan; ``batch`` images of the largest size are encoded at a time.

    Raises:
        UsageError: a budget that the model does not have, or fewer than one candidate or item.
    """
    if min(candidates, batch, max_image_tokens) < 1:
        raise UsageError("a plan needs at least one candidate, one item a batch and one image token")
    for budget in budgets:
        budget.check_within(geometry.query_tokens, geometry.candidate_tokens)
    widest = Budget(max(budget.query for budget in budgets), max(budget.candidate for budget in budgets))
    inputs = cost_inputs(geometry, widest, max_image_tokens)
    return Plan(
        model=model,
        geometry=geometry,
        candidates=candidates,
        max_image_tokens=max_image_tokens,
        batch=batch,
        parameters=parameter_count(geometry),
        weight_bytes={precision: weight_bytes(geometry, precision) for precision in BYTES},
        activation_bytes=activation_bytes(geometry, batch * inputs[-1].positions, batch * 4 * max_image_tokens),
        inputs=inputs,
        budgets=tuple(_cost_budget(geometry, budget, candidates) for budget in budgets),
        padding=measure_padding(max_image_tokens),
    )


def cost_inputs(geometry: Geometry, budget: Budget, max_image_tokens: int) -> tuple[InputCost, ...]:
    """A text query, then image candidates up to the largest, all at one budget."""
    sizes = sorted({tokens for tokens in IMAGE_TOKENS if tokens < max_image_tokens} | {max_image_tokens})
    query = _cost_input(geometry, "text query", QUERY_TEXT, 0, budget.query, budget.query)
    meta = geometry.query_tokens + budget.candidate
    return (
        query,
        *(_cost_input(geometry, f"image of {m} tokens", IMAGE_TEXT, m, meta, budget.candidate) for m in sizes),
    )


def measure_padding(max_image_tokens: int) -> tuple[WindowPadding, ...]:
    """Padding of the window layout for those typical images that the limit allows, resized as the preprocessor does."""
    limit = max_image_tokens * 28 * 28
    rules = ImageRules(min_pixels=min(DEFAULT_SIZE["shortest_edge"], limit), max_pixels=limit)
    found = []
    for name, (width, height) in TYPICAL_IMAGES.items():
        try:
            resized = smart_resize(height, width, rules)
        except UsageError:  # too thin for so few tokens
            continue
        rows, columns = resized[0] // rules.patch_size, resized[1] // rules.patch_size
        ratio = count_windows((rows, columns)) * PATCHES / (rows * columns)
        found.append(WindowPadding(name, width, height, rows * columns // 4, ratio))
    return tuple(found)


def _cost_input(geometry: Geometry, name: str, text: int, image: int, meta: int, answers: int) -> InputCost:
    flops = encoder_flops(geometry, text_tokens=text, image_tokens=image, meta_tokens=meta, answers=answers)
    return InputCost(name, text + image + meta, image, flops)


def _cost_budget(geometry: Geometry, budget: Budget, candidates: int) -> BudgetCost:
    flops = scoring_flops(geometry, budget, candidates)
    return BudgetCost(budget, flops, index_bytes(geometry, budget.candidate, candidates))
