"""Smoothing: move outliers from activations into weights, exactly, before anything is quantised.

SmoothQuant (arXiv 2211.10438): for a Linear ``x W'``, divide channel j of x by s_j and multiply column j of W by s_j. The
division is folded into whatever makes x: an RMSNorm's weight, or, before ``down_proj``, the rows of ``up_proj``. Here every
s_j is a power of two, so that each product is scaled without rounding and the smoothed network is the same bit for bit, in
fp32 and in bf16. The strength alpha of ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)`` is searched for each place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.errors import UsageError

from .formats import Format
from .linears import Group
from .observers import TensorObserver

Array = NDArray[Any]
ReadWeight = Callable[[str], Array]
STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
LARGEST_EXPONENT = 8  # a factor of 256 between channels: beyond that the weights' own range suffers more

# The module whose output channels take the division, by the Linears that read it.
SOURCES = (
    (re.compile(r"(language_model\.layers\.\d+)\.self_attn\.[qkv]_proj"), r"\1.input_layernorm"),
    (re.compile(r"(language_model\.layers\.\d+)\.mlp\.(?:gate|up)_proj"), r"\1.post_attention_layernorm"),
    (re.compile(r"(visual\.blocks\.\d+)\.attn\.qkv"), r"\1.norm1"),
    (re.compile(r"(visual\.blocks\.\d+)\.mlp\.(?:gate|up)_proj"), r"\1.norm2"),
    (re.compile(r"(.*\.mlp)\.down_proj"), r"\1.up_proj"),
)


@dataclass(frozen=True)
class Smoothing:
    """One place of smoothing: ``source`` gives channels divided by ``2**exponents``, ``linears`` take them back."""

    source: str
    linears: tuple[str, ...]
    strength: float
    exponents: tuple[int, ...]

    @property
    def factors(self) -> Array:
        return np.exp2(np.array(self.exponents, np.float32))


def source_of(linear: str) -> str | None:
    """The module that a Linear's smoothing is folded into, or None where there is none to fold into."""
    for pattern, source in SOURCES:
        match = pattern.fullmatch(linear)
        if match:
            return match.expand(source)
    return None


def places(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Source to the groups that read it. In the last decoder layer two groups read one norm."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        source = source_of(group.linears[0].name)
        if source is not None:
            found.setdefault(source, []).append(group)
    return found


def search(
    groups: Sequence[Group], observers: Mapping[str, TensorObserver], read: ReadWeight, form: Format
) -> list[Smoothing]:
    """For each place the strength that gives the smallest squared error of the Linears' outputs, on the rows kept.

    Places where no smoothing is best are left out.
    """
    found = []
    for source, readers in places(groups).items():
        observer = observers[readers[0].name]
        names = tuple(linear.name for group in readers for linear in group.linears)
        weight = np.concatenate([np.asarray(read(f"{name}.weight"), np.float32) for name in names])
        exact = observer.sample @ weight.T
        trials = {alpha: exponents_for(observer.channel_amax, weight, alpha) for alpha in STRENGTHS}
        errors = {alpha: _output_error(observer, weight, exact, trial, form) for alpha, trial in trials.items()}
        best = min(errors, key=errors.__getitem__)
        if trials[best].any():
            found.append(Smoothing(source, names, best, tuple(trials[best].tolist())))
    return found


def exponents_for(channel_amax: Array, weight: Array, strength: float) -> NDArray[np.int64]:
    """Exponents (k,) of the powers of two nearest to SmoothQuant's factors, centred on their median; 0 for dead channels.

    Args:
        channel_amax: largest magnitude of each input channel (k,).
        weight: (out, k), of all Linears that read the input.
    """
    columns = np.abs(weight).max(axis=0)
    alive = (channel_amax > 0) & (columns > 0)
    if strength == 0 or not alive.any():
        return np.zeros(len(channel_amax), np.int64)
    logs = strength * np.log2(channel_amax, where=alive, out=np.zeros(len(alive)))
    logs -= (1 - strength) * np.log2(columns, where=alive, out=np.zeros(len(alive)))
    logs -= np.median(logs[alive])
    return np.where(alive, np.clip(np.rint(logs), -LARGEST_EXPONENT, LARGEST_EXPONENT), 0).astype(np.int64)


def _output_error(observer: TensorObserver, weight: Array, exact: Array, exponents: Array, form: Format) -> float:
    factors = np.exp2(exponents.astype(np.float32))
    single = np.dtype(np.float32)
    amax = (observer.channel_amax / factors).max()
    x = form.round_trip(observer.sample / factors, form.scale(amax, single))
    w = weight * factors
    scale = form.weight_scale(w, single)
    w = form.round_trip(w, scale[:, None] if form.per_channel else scale)
    return float(((x @ w.T - exact) ** 2).mean())


def check_fits(smoothings: Sequence[Smoothing], groups: Sequence[Group]) -> None:
    """Raise UsageError unless each smoothing, perhaps edited, names every Linear that reads its source, and each channel once."""
    readers = {source: [x for group in same for x in group.linears] for source, same in places(groups).items()}
    for place, smoothing in enumerate(smoothings):
        linears = readers.get(smoothing.source, [])
        if not linears or {linear.name for linear in linears} != set(smoothing.linears):
            raise UsageError(f"the recipe's smoothing of {smoothing.source} does not name the Linears that read it")
        (channels,) = {linear.stored.shape[1] for linear in linears}
        if channels != len(smoothing.exponents):
            found = f"{len(smoothing.exponents)} exponents, not {channels}"
            raise UsageError(f"the recipe's smoothing of {smoothing.source} has {found}")
        if any(other.source == smoothing.source for other in smoothings[:place]):
            raise UsageError(f"the recipe smooths {smoothing.source} twice")


Changes = Mapping[str, Sequence[tuple[int, Array]]]


def changes_of(smoothings: Iterable[Smoothing]) -> Changes:
    """Parameter name to the (axis, factors) that it is multiplied by."""
    changes: dict[str, list[tuple[int, Array]]] = {}
    for smoothing in smoothings:
        for linear in smoothing.linears:
            changes.setdefault(f"{linear}.weight", []).append((-1, smoothing.factors))
        for kind in ("weight", "bias"):
            changes.setdefault(f"{smoothing.source}.{kind}", []).append((0, 1 / smoothing.factors))
    return changes


def divisors_of(smoothings: Iterable[Smoothing], groups: Iterable[Group]) -> dict[str, Array]:
    """Group name to what smoothing divides the channels of its input by."""
    by_linear = {linear: smoothing.factors for smoothing in smoothings for linear in smoothing.linears}
    return {group.name: by_linear[group.linears[0].name] for group in groups if group.linears[0].name in by_linear}


def smooth(changes: Changes, name: str, values: Array) -> Array:
    """A parameter's values after smoothing, in the same type; those that no smoothing touches come back unchanged."""
    for axis, factors in changes.get(name, ()):
        shape = [1] * values.ndim
        shape[axis] = -1
        values = (np.asarray(values, np.float32) * factors.reshape(shape)).astype(values.dtype)
    return values
