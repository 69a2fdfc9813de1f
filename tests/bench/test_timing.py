"""Interleaving and summaries, counted by hand."""

from __future__ import annotations

import pytest

from metaembed.bench.timing import Timing, peak_rss_mib, summarise, time_interleaved


def test_contestants_take_turns_and_the_first_changes_every_round():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timed = time_interleaved(contestants, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {timing.count for timing in timed.values()} == {3}


def test_warm_up_rounds_do_not_count():
    """Expected by hand: of 9, 1, 2, 3 seconds the first is left out."""
    taken = iter([9.0, 1.0, 2.0, 3.0])
    (timing,) = summarise(["one"], lambda name: next(taken), rounds=3, warmup=1).values()
    assert (timing.median_ms, timing.min_ms, timing.count, timing.warmup) == (2000.0, 1000.0, 3, 1)


def test_p95_lies_between_the_two_slowest_of_twenty_one():
    """Expected by hand: of 0..20 ms, 95 % of the way is 19."""
    timing = Timing.of([k / 1000 for k in range(21)], warmup=0)
    assert timing.p95_ms == pytest.approx(19.0)
    assert timing.median_ms == pytest.approx(10.0)


def test_nothing_timed_is_an_error():
    with pytest.raises(ValueError, match="at least one round"):
        time_interleaved({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="nothing was timed"):
        Timing.of([], 0)


def test_peak_memory_grows_with_what_is_held():
    before = peak_rss_mib()
    block = bytearray(b"x") * (64 << 20)
    assert peak_rss_mib() >= before + 0.9 * len(block) / 2**20 or before > 1000  # an earlier peak may hide it
