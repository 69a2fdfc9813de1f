"""What an export costs, seen from outside: processes of known cost, checkpoints of known size, records of a known gate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metaembed.bench.export import model_config, run_measured, write_sparse_checkpoint
from metaembed.bench.export_parity import summarise
from metaembed.export.checkpoint import Checkpoint
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.tensors import parameter_count


def run(code: str):
    return run_measured([sys.executable, "-S", "-c", code])


def test_memory_and_processor_time_of_a_process_are_its_own():
    held = run("import time; a = bytearray(200 << 20); time.sleep(0.3)")
    assert 200 <= held.peak_anonymous_mib < 260
    assert held.peak_rss_mib >= held.peak_anonymous_mib
    busy = run("import time\nwhile time.process_time() < 0.5: pass")
    assert busy.cpu_seconds >= 0.5
    assert held.seconds >= 0.3
    assert run("import time; time.sleep(0.3)").cpu_seconds < busy.cpu_seconds


def test_a_process_that_fails_is_told_with_its_last_words():
    with pytest.raises(MetaEmbedError, match=r"failed \(3\): no such model"):
        run("import sys; print('no such model', file=sys.stderr); sys.exit(3)")


def test_a_sparse_checkpoint_has_the_real_size_and_takes_no_disk(tmp_path: Path):
    config = model_config("3b", layers=2)
    write_sparse_checkpoint(config, tmp_path / "3b")
    checkpoint = Checkpoint.open(tmp_path / "3b")
    assert sum(ref.nbytes for ref in checkpoint.tensors.values()) == 2 * parameter_count(checkpoint.geometry)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "3b").glob("*.safetensors")) < 1 << 20


def test_the_summary_of_a_gate_is_the_worst_of_each_kind(demo_bundle: Path):
    """Expected: read off the manifest's records one by one."""
    parity = Bundle.open(demo_bundle, verify=False).manifest.parity
    found = summarise(parity)
    images = [record for record in parity["vectors"] if record["input"] == "image"]
    assert len(images) == 10, "five budgets, two sides"
    assert found["min_cosine"]["image"] == sorted(record["min_cosine"] for record in images)[0]
    assert found["max_abs"]["image"] == sorted(record["max_abs"] for record in images)[-1]
    assert set(found["max_abs"]) == {"text", "image", "image + text"}
    assert (found["passed"], found["top10_overlap"], found["tolerance"]["max_abs"]) == (True, 1.0, 1e-5)
