"""The traced modules in PyTorch behind the session interface: in fp32 they give what the exported graphs give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metaembed.bench.cli import main
from metaembed.bench.torch_session import open_in_torch
from metaembed.export.checkpoint import Checkpoint
from metaembed.export.golden import draw_page
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.parity import TOLERANCES, compare

TEXTS = ["a red umbrella", None, "two anchors"]
IMAGES = [None, draw_page(1, (84, 252)), draw_page(2, (56, 56))]


@pytest.fixture(scope="module")
def graphs(demo_bundle: Path) -> np.ndarray:
    with Encoder.open(demo_bundle, verify=False) as encoder:
        return encoder.encode_candidates(TEXTS, images=IMAGES, budget=16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_modules_compute_what_the_graphs_do_to_the_precisions_tolerance(
    demo_bundle: Path, demo_folder: Path, graphs: np.ndarray, precision: str
):
    bundle = Bundle.open(demo_bundle, verify=False)
    with open_in_torch(bundle, Checkpoint.open(demo_folder), precision) as encoder:
        assert encoder.description.endswith(f"(CPU), {precision}")
        record = compare(graphs, encoder.encode_candidates(TEXTS, images=IMAGES, budget=16), TOLERANCES[precision])
    assert record, record
    assert precision == "fp32" or record.max_abs > 1e-5, "it really computes in the narrow type"


def test_a_precision_needs_a_checkpoint(demo_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parity", str(demo_bundle), "--in-torch", "bf16"]) == 2
    assert "--checkpoint MODEL" in capsys.readouterr().err
