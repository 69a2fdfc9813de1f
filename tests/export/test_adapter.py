"""LoRA adapters as PEFT writes them, merged as PEFT merges them (peft's merge_and_unload is the reference)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from metaembed.export.adapter import Adapter, merge_adapter, open_with_adapter
from metaembed.export.checkpoint import Checkpoint
from metaembed.export.checkpoint_names import canonical_name
from metaembed.runtime.errors import BundleError, UsageError

LINEARS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SAVED = ("prompt_embed_tokens", "custom_text_proj")
META, DIM = 10, 5


class TinyMetaEmbed(Qwen2_5_VLForConditionalGeneration):
    """The training-time model: Qwen2.5-VL with the two modules that MetaEmbed adds."""

    def __init__(self, config):
        super().__init__(config)
        self.prompt_embed_tokens = nn.Embedding(META, config.text_config.hidden_size)
        self.custom_text_proj = nn.Linear(config.text_config.hidden_size, DIM)


def train(config, tmp_path, dtype=torch.float32, lora_dtype=torch.float32, **lora):
    """Write base/ and adapter/; return the tensors that PEFT makes of them, by canonical name."""
    torch.manual_seed(0)
    model = TinyMetaEmbed(Qwen2_5_VLConfig(**config)).to(dtype)
    Qwen2_5_VLForConditionalGeneration.save_pretrained(model, tmp_path / "base")
    drop_meta(tmp_path / "base" / "model.safetensors")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, "modules_to_save": list(SAVED), **lora}
    peft_model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape)).to(lora_dtype)
    peft_model.save_pretrained(tmp_path / "adapter")
    merged = peft_model.merge_and_unload().state_dict()
    return {canonical_name(name): tensor for name, tensor in merged.items() if canonical_name(name)}


def drop_meta(path):
    """A base from the hub knows nothing of MetaEmbed."""
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(SAVED)}, path, {"format": "pt"})


def as_float(array):
    return torch.from_numpy(np.array(array, np.float32))


def settings_file(tmp_path):
    return tmp_path / "adapter" / "adapter_config.json"


def change_settings(tmp_path, **changes):
    settings_file(tmp_path).write_text(json.dumps(json.loads(settings_file(tmp_path).read_text()) | changes))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"visual\.blocks\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"gate_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"o_proj": 1}, "lora_alpha": 3},
    ],
    ids=["plain", "rslora", "patterns", "rslora and patterns"],
)
def test_merge_equals_peft(tmp_path, tiny_config, lora):
    """Expected: merge_and_unload in fp32; language and vision MLP targets are both changed."""
    expected = train(tiny_config, tmp_path, **lora)
    base = {canonical_name(name): t for name, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    merged = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert merged.geometry.dim == DIM
    for name in merged.tensors:
        torch.testing.assert_close(as_float(merged.read(name)), expected[name], rtol=0, atol=1e-6, msg=name)
    for changed in ("language_model.layers.1.self_attn.k_proj.weight", "visual.blocks.2.mlp.down_proj.weight"):
        assert (as_float(merged.read(changed)) - base[changed]).abs().max() > 0.01


def test_adapter_from_the_days_of_the_older_names_is_the_same(tmp_path, tiny_config):
    """transformers 4 had visual.* and model.layers.* where 5 has model.visual.* and model.language_model.layers.*."""
    train(tiny_config, tmp_path)
    new = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "new")
    rewrite_adapter(
        tmp_path,
        lambda tensors: {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
            for name, tensor in tensors.items()
        },
    )
    old = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "old")
    for name in new.tensors:
        np.testing.assert_array_equal(old.read(name), new.read(name), name)


def test_update_of_lm_head_is_left_out(tmp_path, tiny_config):
    """An embedding never reaches lm_head; an adapter that trained it is still an adapter for this model."""
    train(tiny_config, tmp_path, target_modules=["q_proj", "lm_head"])
    adapter = Adapter.open(tmp_path / "adapter")
    assert sorted(adapter.updates) == [f"language_model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1)]


def test_merge_into_bf16_rounds_once(tmp_path, tiny_config):
    """Expected: PEFT adds an fp32 change to bf16 weights in fp32 too; another order of sums may round the other way."""
    expected = train(tiny_config, tmp_path, dtype=torch.bfloat16)
    merged = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    name = "language_model.layers.0.mlp.gate_proj.weight"
    ours, theirs = as_float(merged.read(name)), expected[name].float()
    assert merged.tensors[name].dtype == "BF16"
    assert (ours == theirs).float().mean() > 0.995
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_merge_of_a_bf16_adapter_is_as_exact_as_its_numbers(tmp_path, tiny_config):
    """Expected: W + scale * B A in float64 on the stored numbers (PEFT rounds the change to bf16 before it adds it)."""
    train(tiny_config, tmp_path, lora_dtype=torch.bfloat16)
    merged = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.visual.blocks.0.mlp.up_proj"
    change = lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double() * 6 / 4
    base = load_file(tmp_path / "base" / "model.safetensors")
    weight = next(t for n, t in base.items() if canonical_name(n) == "visual.blocks.0.mlp.up_proj.weight")
    ours = as_float(merged.read("visual.blocks.0.mlp.up_proj.weight")).double()
    torch.testing.assert_close(ours, weight.double() + change, rtol=0, atol=1e-6)


def test_merge_in_small_pieces_and_shards_is_the_same(tmp_path, tiny_config, monkeypatch):
    train(tiny_config, tmp_path)
    whole = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("metaembed.export.adapter.MERGE_VALUES", 100)
    written: list[int] = []
    adapter = Adapter.open(tmp_path / "adapter")
    pieces = merge_adapter(tmp_path / "base", adapter, tmp_path / "pieces", shard_bytes=70_000, advance=written.append)
    assert len(pieces.files) > 3
    assert sum(written) == pieces.nbytes == whole.nbytes
    for name in whole.tensors:
        np.testing.assert_allclose(pieces.read(name), whole.read(name), rtol=0, atol=1e-7, err_msg=name)


def test_adapter_without_updates_writes_nothing(tmp_path, tiny_config):
    """Only modules_to_save: base and adapter are read where they lie."""
    train(tiny_config, tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lora_" not in name}, weights)
    checkpoint = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert checkpoint.tensors["prompt_embed_tokens.weight"].path == weights
    assert not (tmp_path / "merged").exists()


def test_adapter_may_carry_metaembed_settings(tmp_path, tiny_config):
    tiny_config.update(num_query_prompt_tokens=16, num_doc_prompt_tokens=64)
    train(tiny_config, tmp_path)
    with pytest.raises(BundleError, match=r"prompt_embed_tokens\.weight \(10, 48\), not \(80, 48\)"):
        open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    settings = {"num_query_prompt_tokens": 4, "num_doc_prompt_tokens": 6, "hidden_size": 999}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(settings))
    merged = open_with_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (merged.geometry.query_tokens, merged.geometry.candidate_tokens, merged.geometry.text.hidden) == (4, 6, 48)


REFUSED = {
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "IA3": {"peft_type": "IA3"},
    "pissa": {"init_lora_weights": "pissa"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "replicated": {"layer_replication": [[0, 1]]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "rank": {"r": 8},
    "lora_alpha": {"lora_alpha": None},
    "rank_pattern": {"rank_pattern": {"(": 4}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": "six"}},
    "finite lora_alpha": {"lora_alpha": float("inf")},
    "inf is not finite": {"alpha_pattern": {"q_proj": float("inf")}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("trained")
    train(tiny, folder)
    return folder


@pytest.fixture
def copied(tmp_path, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("word", REFUSED)
def test_other_adapters_are_refused_by_name(copied, word):
    change_settings(copied, **REFUSED[word])
    assert_refused(copied, word)


def assert_refused(folder, *words):
    with pytest.raises((UsageError, BundleError)) as caught:
        open_with_adapter(folder / "base", folder / "adapter", folder / "merged")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"], "something was left behind"


def rewrite_adapter(folder, change):
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def pick(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


WRONG = {
    "widened": (lambda t: t | {pick(t, "q_proj.lora_A.weight"): torch.zeros(4, 50)}, ("another model", "[48, 50]")),
    "renamed": (lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}, ("another model", "layers.9")),
    "half": (lambda t: {n: v for n, v in t.items() if n != pick(t, "lora_B.weight")}, ("other half",)),
    "no product": (lambda t: t | {pick(t, "k_proj.lora_B.weight"): torch.zeros(16, 3)}, ("no matrix product",)),
    "more": (lambda t: t | {"base_model.model.adapter.weight": torch.zeros(2)}, ("adapter.weight",)),
    "two updates": (
        lambda t: t | {n.replace("language_model.", ""): v.clone() for n, v in t.items() if "1.self_attn.q_proj" in n},
        ("self_attn.q_proj", "stored twice"),
    ),
    "two halves": (
        lambda t: t | {pick(t, "q_proj.lora_A.weight").replace("_A.", "_A.default."): torch.zeros(4, 48)},
        ("lora_A", "stored twice"),
    ),
    "two norms": (
        lambda t: t | {f"base_model.model.model.{part}norm.weight": torch.ones(48) for part in ("", "language_model.")},
        ("norm.weight", "stored twice"),
    ),
    "magnitude": (lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.zeros(2)}, ("lora_magnitude",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_adapter_for_another_model_is_one_sentence(copied, case):
    change, words = WRONG[case]
    rewrite_adapter(copied, change)
    assert_refused(copied, *words)


def spoil(path, ending, value=float("nan")):
    """One value of the tensor whose name ends so; the name."""
    tensors = load_file(path)
    name = pick(tensors, ending)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("ending", ["1.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight"])
def test_an_update_with_nan_is_named_while_it_is_merged(copied, ending):
    spoil(copied / "adapter" / "adapter_model.safetensors", ending)
    assert_refused(copied, "the LoRA update of language_model.layers.1.self_attn.q_proj.weight", "(1 of ")


@pytest.mark.parametrize("ending", ["1.self_attn.q_proj.weight", "1.self_attn.q_proj.bias"])
def test_a_base_with_nan_is_named_whether_updated_or_copied(copied, ending):
    spoil(copied / "base" / "model.safetensors", ending)
    assert_refused(copied, f"language_model.layers.{ending} in {copied / 'base'}", "(1 of ")


def test_a_sum_beyond_the_type_of_the_base_is_named(tmp_path, tiny_config):
    """65504 is float16's largest; the update adds 6 / 4 * 4 * 100 * 100."""
    train(tiny_config, tmp_path, dtype=torch.float16)
    spoil(tmp_path / "base" / "model.safetensors", "1.self_attn.q_proj.weight", 65504.0)
    rewrite_adapter(tmp_path, lambda t: {n: torch.full_like(v, 100) if "1.self" in n else v for n, v in t.items()})
    assert_refused(tmp_path, "language_model.layers.1.self_attn.q_proj.weight and its LoRA update", "than F16 holds")


def test_folder_without_adapter_files_is_one_sentence(copied):
    (copied / "adapter" / "adapter_model.safetensors").unlink()
    assert_refused(copied, "no adapter_model.safetensors")


def test_pickled_adapter_is_told_how_to_be_saved(copied):
    (copied / "adapter" / "adapter_model.safetensors").rename(copied / "adapter" / "adapter_model.bin")
    assert_refused(copied, "has adapter_model.bin", "pickled weights are not read", "safe_serialization")


def test_lora_of_the_token_table_is_refused_by_name(tmp_path, tiny_config):
    """As PEFT writes it."""
    train(tiny_config, tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert_refused(tmp_path, "LoRA of an embedding", "embed_tokens.lora_embedding_", "merge_and_unload")


def test_meta_tokens_saved_as_a_bare_parameter_are_the_same(copied):
    """Expected: what the usual spelling, prompt_embed_tokens.weight, gives."""
    usual = open_with_adapter(copied / "base", copied / "adapter", copied / "usual")
    rewrite_adapter(
        copied, lambda t: {n.replace("prompt_embed_tokens.weight", "prompt_embed_tokens"): v for n, v in t.items()}
    )
    names = load_file(copied / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("prompt_embed_tokens") for name in names)
    bare = open_with_adapter(copied / "base", copied / "adapter", copied / "bare")
    assert list(bare.tensors) == list(usual.tensors)
    for name in usual.tensors:
        np.testing.assert_array_equal(bare.read(name), usual.read(name), name)


def test_a_null_dim_leaves_the_width_to_the_projection(copied):
    """Expected: DIM, the rows of the projection that was trained; by the base's config, the adapter's, or both."""
    config = json.loads((copied / "base" / "config.json").read_text())
    (copied / "base" / "config.json").write_text(json.dumps(config | {"dim": None}))
    assert open_with_adapter(copied / "base", copied / "adapter", copied / "one").geometry.dim == DIM
    (copied / "adapter" / "config.json").write_text('{"dim": null}')
    assert open_with_adapter(copied / "base", copied / "adapter", copied / "two").geometry.dim == DIM


def test_existing_output_is_kept(copied):
    (copied / "merged").mkdir()
    (copied / "merged" / "mine").touch()
    with pytest.raises(UsageError, match="exists"):
        open_with_adapter(copied / "base", copied / "adapter", copied / "merged")
    assert (copied / "merged" / "mine").exists()


def test_failure_while_writing_leaves_nothing_behind(copied):
    def fail(nbytes):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        merge_adapter(copied / "base", Adapter.open(copied / "adapter"), copied / "merged", advance=fail)
    assert sorted(path.name for path in copied.iterdir()) == ["adapter", "base"]


def test_merged_folder_is_a_checkpoint_for_transformers(copied):
    """Expected: HF loads it and finds every tensor of the model; the two extra modules are not its own."""
    open_with_adapter(copied / "base", copied / "adapter", copied / "merged")
    model, info = Qwen2_5_VLModel.from_pretrained(copied / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    weight = model.state_dict()["language_model.norm.weight"]
    torch.testing.assert_close(weight, as_float(Checkpoint.open(copied / "merged").read("language_model.norm.weight")))
