"""Encoding many inputs of which some may be damaged: one of them never stops the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from .budget import Budget
from .encoder import Floats, ImageSource
from .errors import UsageError
from .unicode import is_unicode

log = logging.getLogger(__name__)


def encode_readable(
    encode: Callable[..., Floats],
    inputs: Sequence[tuple[str | None, ImageSource | None]],
    budget: Budget | int,
    *,
    names: Sequence[str],
) -> tuple[list[int], Floats]:
    """Embeddings (n, r, d) of those inputs that can be encoded, and their places among ``inputs``.

    The others (no readable image, too long and thin, no text at all, a file's name that is not Unicode and so no id) are left
    out, each with a warning that has its name. They are looked for one by one only when a batch fails.

    Args:
        encode: `Encoder.encode_queries` or `Encoder.encode_candidates`.
        budget: one that its bundle serves.
    """
    try:
        if not all(map(is_unicode, names)):
            raise UsageError("its name is not valid Unicode")
        texts, images = zip(*inputs, strict=True)
        return list(range(len(inputs))), encode(texts, images=images, budget=budget)
    except UsageError as error:
        if len(inputs) == 1:
            log.warning("%s is left out: %s", names[0].encode(errors="backslashreplace").decode(), error)
            return [], np.empty((0, 0, 0), np.float32)
    alone = [encode_readable(encode, [pair], budget, names=[name]) for pair, name in zip(inputs, names, strict=True)]
    kept = [place for place, (places, _) in enumerate(alone) if places]
    return kept, np.concatenate([alone[place][1] for place in kept] or [alone[0][1]])
