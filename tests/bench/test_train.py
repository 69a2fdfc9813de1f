"""The whole recipe at toy size: it runs, resumes, freezes what it says, and writes a checkpoint that opens."""

import json

import pytest
import torch
from safetensors.torch import load_file

from metaembed.bench import train, train_mmr, train_words
from metaembed.bench.train_model import DemoModel
from metaembed.runtime.errors import UsageError


@pytest.fixture
def toy_sizes(monkeypatch):
    for module, sizes in {
        train: {"WORD_STEPS": 2, "VALIDATION_SCENES": 12, "VALIDATION_QUERIES": (3, 2, 2)},
        train_words: {"FIXED": 3, "VARIED": 2, "PHRASES": 3, "VARIED_EVERY": 2},
        train_mmr: {"FIXED": 4, "VARIED": 2, "TEXTS": 5, "PAGES": 2, "GROUPS_OF_SCENES": 2},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def run(folder, groups="all", *, steps=3, resume=False):
    return train.train(folder, groups=train.parse_groups(groups), steps=steps, seed=5, resume=resume, quiet=True)


def test_the_recipe_writes_a_checkpoint_and_a_log(tmp_path, toy_sizes):
    weights = load_file(run(tmp_path) / "model.safetensors")
    model = DemoModel(6)
    model.load_checkpoint(weights)
    after_words = torch.load(tmp_path / "words.pt", weights_only=True)["model"]
    tower = "visual.patch_embed.proj.weight"
    assert torch.equal(weights[tower], after_words[f"vision.{tower}"])  # stage 2 left it alone
    assert not torch.equal(weights["prompt_embed_tokens.weight"], after_words["language.prompt_embed_tokens.weight"])
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert {"text 1,1", "text 16,64", "image 8,16", "image+text 2,4"} <= last.keys()


def test_the_twin_without_mmr_is_the_same_recipe_with_one_group(tmp_path, toy_sizes):
    run(tmp_path, "16,64")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert "text 16,64" in last
    assert "text 1,1" not in last


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, toy_sizes):
    run(tmp_path)
    with pytest.raises(UsageError, match="--resume"):
        run(tmp_path)
    with pytest.raises(UsageError, match="other groups"):
        run(tmp_path, "16,64", resume=True)
    run(tmp_path, resume=True)
