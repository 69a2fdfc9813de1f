"""Interleaving and summaries, counted by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from metaembed.bench.timing import Timing, percentiles, summarise, time_awake, time_interleaved


def test_contestants_take_turns_and_the_first_changes_every_round():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timed = time_interleaved(contestants, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {timing.count for timing in timed.values()} == {3}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test adds to them."""
    passed = [0.0]
    monkeypatch.setattr("metaembed.bench.timing.time.perf_counter", lambda: passed[0])
    return passed


def test_what_runs_before_each_run_is_not_timed(clock):
    calls = []

    def take(name, seconds):
        calls.append(name)
        clock[0] += seconds

    timed = time_interleaved(
        {"a": lambda: take("a", 1), "b": lambda: take("b", 2)}, rounds=1, warmup=1, before=lambda: take(".", 5)
    )
    assert "".join(calls) == ".a.b" + ".b.a"
    assert {name: timing.median_ms for name, timing in timed.items()} == {"a": 1000, "b": 2000}


@pytest.mark.parametrize(
    ("taken", "runs"),
    [(0.04, 3), (0.1, 1), (7.0, 1)],  # by hand: 0.04, 0.08, 0.12 s pass; the first is enough; so it is
)
def test_short_runs_wake_the_processor_first_and_long_ones_run_once(clock, monkeypatch, taken, runs):
    calls, slept = [], []
    monkeypatch.setattr("metaembed.bench.timing.time.sleep", slept.append)

    def run():
        calls.append(None)
        clock[0] += taken

    assert time_awake(run) == pytest.approx(taken)
    assert (len(calls), slept) == (runs, [0.1])


def test_percentiles_come_from_runs_after_the_warm_up(clock):
    """Expected by hand: of 100, 0, 1, .. 10 seconds the first does not count."""
    taken = iter([100, *range(11)])

    def run():
        clock[0] += next(taken)

    assert percentiles(run, rounds=11, warmup=1) == {"p50_ms": 5000, "p90_ms": 9000, "p99_ms": 9900}


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


GROW = """
from metaembed.bench.timing import peak_rss_mib
print(peak_rss_mib())
block = bytearray(b"x") * (64 << 20)
del block
print(peak_rss_mib())
"""


def test_peak_memory_grows_with_what_was_held():
    """In a process of its own: the peak of this one is that of the tests before."""
    shown = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True).stdout
    before, after = map(float, shown.split())
    assert after >= before + 0.9 * 64
