"""The shipped demo checkpoint: a real Qwen2.5-VL for Hugging Face, and a retriever that works."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metaembed.bench import demo_model
from metaembed.bench.demo_quality import SplitImages, measure
from metaembed.bench.demo_tokenizer import build_tokenizer
from metaembed.bench.scenes_queries import make_split
from metaembed.bench.train_inputs import candidate_prompt, query_prompt, scene_grid, scene_patches
from metaembed.bench.train_model import DemoModel

DEMO = Path(demo_model.__file__).parents[1] / "export" / "demo"


@pytest.fixture(scope="module")
def model():
    model = DemoModel(1)
    model.load_checkpoint(load_file(DEMO / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def split():
    return make_split("validation", 77, scenes=60, queries=(20, 6, 6))


@pytest.fixture(scope="module")
def hugging_face():
    transformers = pytest.importorskip("transformers")
    reference, report = transformers.Qwen2_5_VLModel.from_pretrained(DEMO, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) == {"prompt_embed_tokens.weight"}
    return reference.eval()


@torch.no_grad()
def embed_with_hugging_face(reference, ids, scene):
    """All 80 rows appended the official way, explicit position ids, final norm, L2: the whole [80, d] answer."""
    table = load_file(DEMO / "model.safetensors")["prompt_embed_tokens.weight"]
    prompt = torch.from_numpy(ids)[None]
    pictures, grid = {}, None
    if scene is not None:
        rows, columns = scene_grid(scene)
        grid = torch.tensor([[1, rows, columns]])
        pictures = {"pixel_values": torch.from_numpy(scene_patches(scene)), "image_grid_thw": grid}
    extended = torch.cat([prompt, torch.zeros(1, len(table), dtype=torch.long)], 1)
    is_image = (extended == reference.config.image_token_id).int()
    positions, _ = reference.get_rope_index(extended, mm_token_type_ids=is_image, image_grid_thw=grid)
    embeds = reference.get_input_embeddings()(prompt)
    if pictures:
        seen = reference.get_image_features(**pictures)
        seen = torch.cat(list(seen.pooler_output if hasattr(seen, "pooler_output") else seen))
        embeds = embeds.masked_scatter((prompt == reference.config.image_token_id)[..., None], seen)
    embeds = torch.cat([embeds, table[None]], 1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    hidden = reference.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask
    ).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -len(table) :], dim=-1)


def test_embeddings_equal_hugging_faces(model, split, hugging_face):
    """Expected value: HF Qwen2_5_VLModel, eager, one input at a time; fixed and varied pages, all kinds of query."""
    queries, candidates = SplitImages(model, split).embed(model)
    for k in (0, 1, 7, 14, 15, 40):  # the first 15 pages vary in size
        scene = split.scenes[k]
        expected = embed_with_hugging_face(hugging_face, candidate_prompt(scene).ids, scene)[16:]
        np.testing.assert_allclose(candidates[k], expected, atol=1e-5)
    for k in (0, 1, 20, 26):
        query = split.queries[k]
        expected = embed_with_hugging_face(hugging_face, query_prompt(query).ids, query.page)[:16]
        np.testing.assert_allclose(queries[k], expected, atol=1e-5)


def test_the_trained_model_finds_pages_and_larger_budgets_find_more(model, split):
    """A retriever by chance would have nDCG@5 of about 0.05 on 60 pages."""
    records = measure(split, *SplitImages(model, split).embed(model))
    text = {record["budget"]: record["ndcg_at_5"] for record in records if record["queries"] == "text"}
    assert text["16,64"] > 0.8
    assert text["1,1"] > 0.3
    assert text["16,64"] > text["1,1"]


def test_the_checkpoint_is_small_and_has_every_mechanism():
    """Against the demands of the model card, read from the files."""
    weights = load_file(DEMO / "model.safetensors")
    config = json.loads((DEMO / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 12e6
    assert 2e6 <= sum(tensor.numel() for tensor in weights.values()) <= 6e6
    assert weights["prompt_embed_tokens.weight"].shape == (80, 128)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert len(vision["fullatt_block_indexes"]) == 1 < vision["depth"] - 1
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    head = text["hidden_size"] // text["num_attention_heads"]
    assert sum(text["rope_parameters"]["mrope_section"]) == head // 2


def test_the_files_are_those_that_the_recipe_writes(tmp_path):
    """Everything but the weights and the card follows from the code alone."""
    demo_model.write_checkpoint(tmp_path, {})
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (DEMO / name).read_text(), name


def test_config_ids_are_the_tokenizers():
    config = json.loads((DEMO / "config.json").read_text())
    named = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    for key, token in named.items():
        assert config[f"{key}_token_id"] == build_tokenizer().token_to_id(f"<|{token}|>")


def test_the_model_card_quotes_the_recorded_measurements():
    """Expected values: bench/results/demo_quality.jsonl, as `metaembed-bench demo-quality` wrote it."""
    lines = (Path(__file__).parents[2] / "bench/results/demo_quality.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if (record["model"], record["split"]) == ("MMR", "test")]
    measured = {(record["budget"], record["queries"]): record["ndcg_at_5"] for record in records}
    table = [line.strip("| ").split(" | ") for line in (DEMO / "README.md").read_text().splitlines() if line[:1] == "|"]
    start = next(k for k, row in enumerate(table) if row[0] == "nDCG@5")
    names = [cell.rpartition(" (")[0] for cell in table[start][1:]]
    for budget, *cells in table[start + 2 : start + 7]:
        for name, cell in zip(names, cells, strict=True):
            assert cell == f"{measured[budget, name]:.3f}", (budget, name)
