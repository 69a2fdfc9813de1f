"""A base and a LoRA adapter, as PEFT writes them, exported to a bundle: its vectors are those of PEFT's merged HF model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metaembed.export.bundle import ExportRequest, export_bundle
from metaembed.export.golden import draw_page
from metaembed.export.models import resolve_model
from metaembed.export.reference import Reference
from metaembed.export.source import open_source
from metaembed.runtime.budget import Budget
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.golden import GoldenItem
from metaembed.runtime.manifest import Limits
from metaembed.runtime.parity import TOLERANCES, compare

META, DIM = 80, 37
ASSETS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
LINEARS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # the vision MLP's names match too
ITEMS = [
    GoldenItem("a red umbrella and a blue anchor"),
    GoldenItem(image=draw_page(1, (84, 252))),
    GoldenItem("two anchors", draw_page(2, (150, 56))),
]


class TrainedModel(Qwen2_5_VLForConditionalGeneration):
    """The training-time model: Qwen2.5-VL with the two modules that MetaEmbed adds."""

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__(config)
        self.prompt_embed_tokens = nn.Embedding(META, config.text_config.hidden_size)
        self.custom_text_proj = nn.Linear(config.text_config.hidden_size, DIM)


def tiny_config(demo_folder: Path) -> dict:
    """The demo's, so that its tokenizer fits, but smaller; a plain Qwen2.5-VL knows nothing of MetaEmbed."""
    config = json.loads((demo_folder / "config.json").read_text())
    del config["dim"], config["num_query_prompt_tokens"], config["num_doc_prompt_tokens"]
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config["text_config"]["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
    config["vision_config"] |= {"hidden_size": 48, "intermediate_size": 80, "depth": 2, "out_hidden_size": 64}
    config["vision_config"] |= {"fullatt_block_indexes": [1], "num_heads": 2}
    return config


@pytest.fixture(scope="module")
def folders(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/ for us, and merged/, written by ``merge_and_unload().save_pretrained`` for HF."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model = TrainedModel(Qwen2_5_VLConfig(**tiny_config(demo_folder)))
    plain = {name: value for name, value in model.state_dict().items() if not name.startswith(("prompt", "custom"))}
    model.save_pretrained(root / "base", state_dict=plain)
    saved = ["prompt_embed_tokens", "custom_text_proj"]
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, modules_to_save=saved)
    tuned = get_peft_model(model, settings)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    tuned.save_pretrained(root / "adapter")
    tuned.merge_and_unload().save_pretrained(root / "merged")
    for name in ASSETS:
        shutil.copy(demo_folder / name, root / "base")
        shutil.copy(demo_folder / name, root / "merged")
    return root


@pytest.fixture(scope="module")
def encoder(folders: Path) -> Iterator[Encoder]:
    model = resolve_model(str(folders / "adapter"), base=folders / "base")
    request = ExportRequest(model=model, budgets=[Budget(5, 7)], limits=Limits(64, 64), parity=False)
    export_bundle(request, folders / "bundle")
    with Encoder.open(folders / "bundle") as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    merged = resolve_model(str(folders / "merged"))
    return Reference(open_source(merged, tmp_path_factory.mktemp("source") / "none"), 64)


@pytest.mark.parametrize(("side", "budget"), [("query", 5), ("candidate", 7)])
def test_vectors_are_those_of_the_merged_model(encoder: Encoder, reference: Reference, side: str, budget: int):
    run = encoder.encode_queries if side == "query" else encoder.encode_candidates
    mine = run([item.text for item in ITEMS], images=[item.image for item in ITEMS], budget=budget)
    wanted = reference.encode(side, ITEMS)[:, :budget]
    assert wanted.shape == (3, budget, DIM)
    record = compare(wanted, mine, TOLERANCES["fp32"])
    assert record, record


def test_the_adapter_matters(folders: Path, encoder: Encoder, reference: Reference):
    """So that the vectors above are not those of the base: without LoRA's change they are far away."""
    weights = dict(reference.model.state_dict())
    mine = encoder.encode_queries([ITEMS[0].text], budget=5)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders / "base").model.state_dict()
    reference.model.load_state_dict(base)
    without = reference.encode("query", ITEMS[:1])[:, :5]
    reference.model.load_state_dict(weights)
    assert np.abs(without - mine).max() > 1e-2


def test_merged_weights_are_stored_once(folders: Path, encoder: Encoder):
    """The base stays as it is, and nothing of the merging is left beside the bundle."""
    files = encoder.bundle.manifest.files
    weights = sum(record.bytes for name, record in files.items() if name.startswith("weights/"))
    assert weights < 1.2 * (folders / "merged" / "model.safetensors").stat().st_size
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "base", "bundle", "merged"]
