"""The export's own gate: golden inputs through Hugging Face's model, then through the new bundle, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import Check, check_bundle
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.golden import SIDES, GoldenItem, golden_path, write_golden
from metaembed.runtime.manifest import PROCESSOR, Limits
from metaembed.runtime.processor import read_image_rules

from .golden import golden_items, quick_items
from .reference import Reference

Batches = list[list[GoldenItem]]
Track = Callable[[Batches, str], Iterable[list[GoldenItem]]]
INPUTS = {"full": golden_items, "quick": quick_items}
SMALL = 4 * 28 * 28  # pixels: an image that adds no more positions than a few words do


def write_goldens(
    reference: Reference,
    folder: Path,
    budgets: Sequence[Budget],
    limits: Limits,
    track: Track = lambda batches, _: batches,
    *,
    inputs: str = "full",
) -> None:
    """Encode golden inputs (``full`` or ``quick``) with the reference; store them at the largest budget of each side."""
    rules = read_image_rules(folder / PROCESSOR)
    for side in SIDES:
        items = INPUTS[inputs](side, rules, lambda text: reference.count_tokens(text) <= limits.text_tokens)
        batches = _batches(items, together=reference.streamed)
        embeddings = [reference.encode(side, batch) for batch in track(batches, f"reference, {side}")]
        most = max(getattr(budget, side) for budget in budgets)
        write_golden(folder / golden_path(side), list(chain(*batches)), np.concatenate(embeddings)[:, :most])


def _batches(items: Sequence[GoldenItem], *, together: bool) -> Batches:
    """One by one, since a batch of large and small is mostly padding; but weights that are streamed make each batch dear."""
    small = [item for item in items if item.image is None or item.image.width * item.image.height <= SMALL]
    if not together or not small:
        return [[item] for item in items]
    return [small, *([item] for item in items if item not in small)]


def check_export(folder: Path) -> Check:
    """Replay the goldens of a bundle that is being written.

    Raises:
        ParityError: out of tolerance; it names every comparison that failed.
    """
    with Encoder.open(folder, verify=False) as encoder:
        check = check_bundle(encoder)
    check.require()
    return check
