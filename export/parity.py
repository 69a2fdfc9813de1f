"""The export's own gate: golden inputs through Hugging Face's model, then through the new bundle, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from metaembed.runtime.budget import Budget
from metaembed.runtime.check import Check, check_bundle
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.golden import SIDES, GoldenItem, golden_path, write_golden
from metaembed.runtime.manifest import Limits

from .golden import golden_items
from .reference import Reference

Track = Callable[[Iterable[GoldenItem], str], Iterable[GoldenItem]]


def write_goldens(
    reference: Reference, folder: Path, budgets: Sequence[Budget], limits: Limits, track: Track = lambda items, _: items
) -> None:
    """Encode every golden input with the reference and store it in the bundle, at the largest budget of each side."""
    for side in SIDES:
        items = golden_items(side, limits.image_tokens, lambda text: reference.count_tokens(text) <= limits.text_tokens)
        # One by one: a batch of the largest and the smallest would be mostly padding.
        embeddings = np.concatenate([reference.encode(side, [item]) for item in track(items, f"reference, {side}")])
        most = max(getattr(budget, side) for budget in budgets)
        write_golden(folder / golden_path(side), items, embeddings[:, :most])


def check_export(folder: Path) -> Check:
    """Replay the goldens of a bundle that is being written.

    Raises:
        ParityError: out of tolerance; it names every comparison that failed.
    """
    with Encoder.open(folder, verify=False) as encoder:
        check = check_bundle(encoder)
    check.require()
    return check
