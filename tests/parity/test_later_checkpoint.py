"""A checkpoint as transformers 5 and other trainings save it: exported by the command, judged by Hugging Face's model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metaembed.export.cli import main
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.manifest import Bundle

META = "prompt_embed_tokens"
OWN = {"max_pixels": 32 * 28 * 28, "image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]}


@pytest.fixture(scope="module")
def bundle(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with image rules of its own in processor_config.json alone, Meta Tokens as a bare parameter, a null dim."""
    root = tmp_path_factory.mktemp("later")
    folder = Path(shutil.copytree(demo_folder, root / "model"))
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    del rules["size"]
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": rules | OWN}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": None}))
    tensors = load_file(folder / "model.safetensors")
    tensors[META] = tensors.pop(f"{META}.weight")
    save_file(tensors, folder / "model.safetensors")
    command = ["--model", str(folder), "--budget", "8,16", "--parity", "quick", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    assert main([*command, "-o", str(root / "out")]) == 0
    return root / "out"


def test_image_rules_are_the_checkpoint_s_own(bundle: Path):
    """The export's gate has held the same images against Hugging Face's processor."""
    rules = json.loads((bundle / "processor.json").read_text())
    assert (rules["max_pixels"], rules["mean"], rules["std"]) == tuple(OWN.values())
    assert Bundle.open(bundle).manifest.parity is not None


def test_texts_have_the_vectors_of_the_usual_spelling(bundle: Path, demo_bundle: Path):
    """Expected: the demo's, whose weights these are."""
    texts = ["a red umbrella", "two anchors"]
    with Encoder.open(bundle) as later, Encoder.open(demo_bundle, verify=False) as usual:
        for side in ("encode_queries", "encode_candidates"):
            mine, wanted = (getattr(encoder, side)(texts, budget=8) for encoder in (later, usual))
            np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-6)
