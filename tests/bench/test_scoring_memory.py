"""What a call adds to this process's memory, against calls that take a known amount."""

import numpy as np
import pytest

from metaembed.bench.scoring import added_mib
from metaembed.bench.scoring_index import measure_search_memory


@pytest.mark.parametrize("blocks", [1, 1024])
def test_what_a_call_takes_is_seen_again_after_it_was_given_back(blocks):
    """32 MiB by hand, in one block or in many, which the allocator keeps for the next call below one that is still in use."""
    kept = []

    def take():
        several = [np.ones((4 << 20) // blocks) for _ in range(blocks)]
        kept.append(np.ones(4096))
        return len(several)

    take()
    assert [added_mib(take) for _ in range(2)] == pytest.approx([32, 32], abs=2)


def test_the_memory_of_a_search_is_said_per_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("metaembed.bench.scoring_index.MANY_ADDED", 2000)
    record = measure_search_memory(5000, tmp_path)
    assert record["items"] == 5000
    assert list(record["added_mib"]) == ["1,1", "default"]
    assert record["mib_per_thread"] == max(record["added_mib"].values()) / 2
    assert 0 <= record["mib_per_thread"] < 16
    assert list(tmp_path.iterdir()) == []
