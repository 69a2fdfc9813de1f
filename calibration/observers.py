"""What calibration remembers of a tensor: memory does not grow with the number of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import Format

Floats = NDArray[np.floating[Any]]
BINS = 8192  # 64 per INT8 step when the whole range is used
RESERVOIR_ROWS = 256  # rows kept of each tensor, to judge smoothing on
PERCENTILE = 99.99
CANDIDATES = 128  # ranges that the MSE and entropy searches try
EMPTY = 1e-4  # counts; the same as in the entropy calibration of onnxruntime


class Histogram:
    """Counts of magnitudes in BINS equal bins over ``[0, limit)``; ``limit`` is a power of two that doubles as needed.

    Doubling merges neighbouring bins exactly, so the result does not depend on the order of the samples.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.amax = 0.0

    def add(self, values: Floats) -> None:
        """Count finite values of any shape."""
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1)
        largest = float(magnitudes.max(initial=0.0))
        if largest > 0:
            self.amax = max(self.amax, largest)
            self._reach(largest)
        places = (magnitudes * np.float32(BINS / self.limit if self.limit else 0.0)).astype(np.int32)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def _reach(self, largest: float) -> None:
        if not self.limit:
            self.limit = float(2.0 ** np.ceil(np.log2(largest)))
        while largest > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2

    @property
    def centres(self) -> Floats:
        return (np.arange(BINS) + 0.5) * (self.limit / BINS)

    def edges_to_try(self) -> NDArray[np.int64]:
        """Numbers of bins kept by each candidate range, the observed maximum last."""
        used = int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 1
        return np.unique(np.linspace(max(1, used // CANDIDATES), used, CANDIDATES).astype(np.int64))


class TensorObserver:
    """Histogram, largest magnitude per channel, and a uniform sample of rows of one tensor (..., channels)."""

    def __init__(self, channels: int, seed: int) -> None:
        self.histogram = Histogram()
        self.channel_amax = np.zeros(channels, np.float32)
        self.rows_seen = 0
        self.sample = np.empty((0, channels), np.float32)
        self._keys = np.empty(0)
        self._rng = np.random.default_rng(seed)

    def add(self, rows: Floats) -> None:
        """Take in rows (m, channels), all finite."""
        self.rows_seen += len(rows)
        self.histogram.add(rows)
        np.maximum(self.channel_amax, np.abs(rows).max(axis=0, initial=0.0), out=self.channel_amax)
        self._sample(rows)

    def _sample(self, rows: Floats) -> None:
        """Keep the rows with the smallest random keys (Vitter's reservoir in its sorting form): uniform over all seen."""
        keys = np.concatenate([self._keys, self._rng.random(len(rows))])
        kept = np.sort(np.argsort(keys, kind="stable")[:RESERVOIR_ROWS])
        old, new = kept[kept < len(self._keys)], kept[kept >= len(self._keys)] - len(self._keys)
        self.sample = np.concatenate([self.sample[old], np.asarray(rows[new], np.float32)])
        self._keys = keys[kept]


def range_max(histogram: Histogram, form: Format) -> float:
    """The largest magnitude seen: nothing is clipped."""
    return histogram.amax


def range_percentile(histogram: Histogram, form: Format) -> float:
    """The magnitude that PERCENTILE per cent of the values do not exceed, to one bin."""
    if not histogram.counts.any():
        return 0.0
    below = np.cumsum(histogram.counts)
    place = int(np.searchsorted(below, PERCENTILE / 100 * below[-1]))
    return min(histogram.amax, (place + 1) * histogram.limit / BINS)


def range_mse(histogram: Histogram, form: Format) -> float:
    """The range of least squared rounding and clipping error."""
    centres, counts = histogram.centres, histogram.counts

    def error(amax: float) -> float:
        rounded = form.round_trip(centres, form.scale(amax, np.dtype(np.float32)))
        return float((counts * (rounded - centres) ** 2).sum())

    return _best(histogram, error)


def range_entropy(histogram: Histogram, form: Format) -> float:
    """The range of least Kullback-Leibler divergence between the values and their rounded selves.

    Migacz, "8-bit inference with TensorRT" (GTC 2017): clipped counts fall into the last bin of the reference, and each
    code's count is spread evenly over its occupied bins. Codes come from the format itself, so it serves FP8 as well.
    """
    counts, centres = histogram.counts.astype(np.float64), histogram.centres

    def divergence(amax: float) -> float:
        kept = max(1, round(amax * BINS / histogram.limit)) if histogram.limit else 1
        reference = counts[:kept].copy()
        occupied = reference > 0
        codes = form.quantise(centres[:kept], form.scale(amax, np.dtype(np.float32)))
        _, member = np.unique(codes.astype(np.float32), return_inverse=True)
        totals = np.bincount(member, reference)
        holders = np.bincount(member, occupied)
        spread = np.where(occupied, (totals / np.maximum(holders, 1))[member], 0.0)
        reference[-1] += counts[kept:].sum()
        return _divergence(reference, spread)

    return _best(histogram, divergence)


def _best(histogram: Histogram, loss: Callable[[float], float]) -> float:
    if not histogram.amax:
        return 0.0
    ranges = [min(histogram.amax, kept * histogram.limit / BINS) for kept in histogram.edges_to_try()]
    return min(ranges, key=loss)


def _divergence(p: Floats, q: Floats) -> float:
    """KL(p || q) of two unnormalised histograms; a bin that only p occupies counts as EMPTY in q, not as impossible."""
    held = p > 0
    p, q = p[held] / p.sum(), np.maximum(q[held], EMPTY)
    return float((p * np.log(p / (q / q.sum()))).sum())


OBSERVERS: dict[str, Callable[[Histogram, Format], float]] = {
    "max": range_max,
    "percentile": range_percentile,
    "entropy": range_entropy,
    "mse": range_mse,
}
