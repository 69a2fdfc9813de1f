"""Range observers: expected values from numpy over all values at once, and from searches by brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest

from metaembed.calibration.formats import FORMATS
from metaembed.calibration.observers import BINS, OBSERVERS, RESERVOIR_ROWS, Histogram, TensorObserver

INT8 = FORMATS["int8"]


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def heavy_tailed(count: int = 20_000) -> np.ndarray:
    """Normal values and one outlier of 40."""
    return np.append(np.random.default_rng(0).normal(0, 1, count), 40.0).astype(np.float32)


def test_a_grown_histogram_equals_numpy_on_all_values_at_once():
    rng = np.random.default_rng(1)
    parts = [rng.normal(0, size, (3, 5, 7)).astype(np.float32) for size in (0.01, 30.0, 1.0)]
    histogram = histogram_of(*parts)
    everything = np.abs(np.concatenate([part.reshape(-1) for part in parts]))
    expected, _ = np.histogram(everything, BINS, (0, histogram.limit))
    assert histogram.amax == everything.max()
    assert np.log2(histogram.limit) % 1 == 0
    assert histogram.limit / 2 < histogram.amax <= histogram.limit
    np.testing.assert_array_equal(histogram.counts, expected)


def test_the_order_of_samples_changes_nothing():
    parts = [np.float32([0.1, 0.2]), np.float32([0.0, 9.0]), np.float32([-3.0])]
    np.testing.assert_array_equal(histogram_of(*parts).counts, histogram_of(*reversed(parts)).counts)


def test_max_is_the_largest_magnitude():
    assert OBSERVERS["max"](histogram_of(np.float32([1.5, -2.5, 0.0])), INT8) == 2.5


def test_percentile_agrees_with_numpy_to_one_bin():
    values = np.random.default_rng(2).exponential(1.0, 50_000).astype(np.float32)
    histogram = histogram_of(values)
    expected = np.percentile(values, 99.99, method="inverted_cdf")
    assert OBSERVERS["percentile"](histogram, INT8) == pytest.approx(expected, abs=1.01 * histogram.limit / BINS)


def test_mse_finds_the_range_that_brute_force_over_the_values_finds():
    """Every candidate in float64 over the values themselves, not over bins."""
    values = heavy_tailed()
    found = OBSERVERS["mse"](histogram_of(values), INT8)

    def error(amax: float) -> float:
        scale = amax / 127
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values.astype(np.float64)) ** 2).sum())

    best = min(error(amax) for amax in np.linspace(0.5, 40, 400))
    assert error(found) <= 1.05 * best


def test_entropy_clips_a_lone_outlier_that_max_keeps():
    histogram = histogram_of(heavy_tailed())
    assert OBSERVERS["max"](histogram, INT8) == 40
    assert 2 < OBSERVERS["entropy"](histogram, INT8) < 20


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_tensor_of_zeros_has_range_zero(observer, form):
    assert OBSERVERS[observer](histogram_of(np.zeros(9, np.float32)), form) == 0


@pytest.mark.parametrize("observer", OBSERVERS)
def test_fp8_ranges_lie_within_what_was_seen(observer):
    assert 0 < OBSERVERS[observer](histogram_of(heavy_tailed()), FORMATS["fp8"]) <= 40


def test_memory_does_not_grow_with_the_samples():
    observer = TensorObserver(7, seed=0)
    for seed in range(20):
        observer.add(np.random.default_rng(seed).normal(size=(100, 7)).astype(np.float32))
    assert observer.rows_seen == 2000
    assert observer.sample.shape == (RESERVOIR_ROWS, 7)
    assert len(observer.histogram.counts) == BINS


def test_the_sample_of_rows_is_uniform_over_all_of_them():
    """Rows carry their number: the mean of a uniform sample of 256 of 0..1999 is within 5 standard errors of 999.5."""
    observer = TensorObserver(1, seed=3)
    for start in range(0, 2000, 50):
        observer.add(np.arange(start, start + 50, dtype=np.float32)[:, None])
    error = 2000 / np.sqrt(12) / np.sqrt(RESERVOIR_ROWS)
    assert len(np.unique(observer.sample)) == RESERVOIR_ROWS
    assert abs(observer.sample.mean() - 999.5) < 5 * error


def test_the_largest_magnitude_of_each_channel_is_kept():
    observer = TensorObserver(3, seed=0)
    observer.add(np.float32([[1, -5, 0], [2, 4, 0]]))
    observer.add(np.float32([[-3, 1, 0]]))
    assert observer.channel_amax.tolist() == [3, 5, 0]
