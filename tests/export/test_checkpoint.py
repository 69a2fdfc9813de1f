"""Checkpoints as transformers writes them, in every generation of names, read without being loaded."""

from __future__ import annotations

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.checkpoint_names import canonical_name
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.export.safetensors_header import read_header
from metaembed.runtime.errors import BundleError, UsageError

META, TABLE = "prompt_embed_tokens.weight", "language_model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path, tiny_config):
    write_random_checkpoint(tiny_config, 0, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the tensors of a single-file checkpoint in place."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def as_bits(tensor):
    return tensor.view(torch.int16).numpy()


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_what_transformers_saves_is_read_bit_by_bit(tmp_path, tiny_config, shard):
    """Expected: the tensors of the HF model that was saved, bf16."""
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tiny_config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    save_file({META: torch.ones(10, 48)}, tmp_path / "prompt_embed_tokens.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in model.model.state_dict().items():
        read = checkpoint.read(name)
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read.view(np.int16), as_bits(tensor), name)
    assert checkpoint.read(META).dtype == np.float32
    assert len(checkpoint.files) > (5 if shard == "60KB" else 1)


def test_transformers_loads_what_we_write(folder):
    """Expected: HF's own reader of safetensors."""
    model = Qwen2_5_VLModel.from_pretrained(folder, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(checkpoint.read(name).view(np.int16), as_bits(tensor), name)


GENERATIONS = {
    "bare": lambda name: name,
    "transformers 5": lambda name: f"model.{name}",
    "hub": lambda name: name.replace("language_model.", "model."),
    "peft": lambda name: f"base_model.model.{name.replace('language_model.', 'model.')}",
    "wrapped": lambda name: f"module.encoder.model.{name}",
    "modules_to_save": lambda name: f"base_model.model.{name}".replace("tokens.", "tokens.modules_to_save.default."),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_names_is_the_same_checkpoint(folder, generation):
    before = {name: np.array(Checkpoint.open(folder).read(name)) for name in Checkpoint.open(folder).tensors}
    unused = {"lm_head.weight": torch.zeros(2), "model.rotary_emb.inv_freq": torch.zeros(3, dtype=torch.int64)}
    rewrite(folder, lambda tensors: {GENERATIONS[generation](n): t for n, t in tensors.items()} | unused)
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == list(before)
    for name, values in before.items():
        np.testing.assert_array_equal(checkpoint.read(name), values, name)


@pytest.mark.parametrize("beside", [False, True])
def test_meta_tokens_saved_as_a_bare_parameter_are_the_same(folder, beside):
    """Expected: the values that were stored as prompt_embed_tokens.weight."""
    before = Checkpoint.open(folder).tensors
    values = np.array(Checkpoint.open(folder).read(META))
    meta = {"prompt_embed_tokens": load_file(folder / "model.safetensors")[META]}
    if beside:
        save_file(meta, folder / "meta.safetensors")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != META} | ({} if beside else meta))
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == list(before)
    np.testing.assert_array_equal(checkpoint.read(META), values)


def test_a_null_dim_is_none_at_all(folder):
    """Expected: 5 rows of the projection, as written here; without one, the 48 of the decoder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": None}))
    assert Checkpoint.open(folder).geometry.dim == 48
    extra = {"custom_text_proj.weight": torch.zeros(5, 48), "custom_text_proj.bias": torch.zeros(5)}
    rewrite(folder, lambda tensors: tensors | extra)
    assert Checkpoint.open(folder).geometry.dim == 5


def test_unused_tensors_have_no_name():
    names = ("lm_head.weight", "base_model.model.lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert [canonical_name(name) for name in names] == [None] * 3
    assert canonical_name("base_model.model.prompt_embed_tokens.original_module.weight") is None


def test_projection_is_read_from_its_tensor_when_the_config_is_the_base_s(folder):
    extra = {"custom_text_proj.weight": torch.zeros(5, 48), "custom_text_proj.bias": torch.zeros(5)}
    rewrite(folder, lambda tensors: tensors | extra)
    assert Checkpoint.open(folder).geometry.dim == 5


def test_projection_in_a_file_beside_a_model_that_holds_its_meta_tokens_is_found(folder):
    weight = torch.arange(240.0).reshape(5, 48)
    extra = {"custom_text_proj.weight": weight, "custom_text_proj.bias": torch.zeros(5)}
    save_file(extra, folder / "custom_text_proj.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.geometry.dim == 5
    np.testing.assert_array_equal(checkpoint.read("custom_text_proj.weight"), weight)


def test_what_the_model_holds_outranks_files_beside_it(folder):
    for copy in ("first", "second"):
        save_file({META: torch.ones(10, 48)}, folder / f"{copy}.safetensors")
    assert Checkpoint.open(folder).tensors[META].path == folder / "model.safetensors"


def test_one_file_outranks_an_index_beside_it(tmp_path, folder, tiny_config):
    """Expected: what transformers loads from such a folder."""
    write_random_checkpoint(tiny_config, 1, tmp_path / "sharded", shard_bytes=60_000)
    shutil.copy(folder / "model.safetensors", tmp_path / "sharded")
    model = Qwen2_5_VLModel.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    read = Checkpoint.open(tmp_path / "sharded").read(TABLE)
    np.testing.assert_array_equal(read.view(np.int16), as_bits(model.state_dict()[TABLE]))


def test_float_types_may_be_mixed(folder):
    rewrite(folder, lambda tensors: tensors | {TABLE: tensors[TABLE].half(), META: tensors[META].float()})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.read(TABLE).dtype == np.float16
    assert checkpoint.read(META).dtype == np.float32
    checkpoint.check_finite()


def test_links_of_a_hub_cache_are_resolved(tmp_path, folder):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert Checkpoint.open(snapshot).files == [blobs / "model.safetensors"]


def test_opening_reads_headers_only(folder):
    """A file whose data is a hole opens as well as any: nothing but headers was read."""
    path = folder / "model.safetensors"
    size, end = path.stat().st_size, min(ref.offset for ref in read_header(path).values())
    os.truncate(path, end)
    os.truncate(path, size)
    assert len(Checkpoint.open(folder).tensors) > 50


WRONG = {
    "missing": (
        lambda t: {n: v for n, v in t.items() if "up_proj" not in n},
        "lacks visual.blocks.0.mlp.up_proj",
    ),
    "no meta": (lambda t: {n: v for n, v in t.items() if n != META}, "--adapter"),
    "shape": (lambda t: t | {TABLE: t[TABLE][:-1]}, "(300, 48), not (301, 48)"),
    "left over": (lambda t: t | {"visual.blocks.3.norm1.weight": t["visual.merger.ln_q.weight"].clone()}, "blocks.3"),
    "integers": (lambda t: t | {TABLE: t[TABLE].to(torch.int16)}, "I16"),
    "twice": (lambda t: t | {"model.embed_tokens.weight": t[TABLE].clone()}, "twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_named(folder, case):
    change, words = WRONG[case]
    rewrite(folder, change)
    with pytest.raises(BundleError) as caught:
        Checkpoint.open(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(folder, dtype, value):
    def spoil(tensors):
        tensors[TABLE] = tensors[TABLE].to(dtype)
        tensors[TABLE][300, 47] = value
        return tensors

    rewrite(folder, spoil)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(BundleError, match=TABLE):
        checkpoint.check_finite()


def test_largest_finite_values_are_finite(folder):
    rewrite(folder, lambda tensors: tensors | {META: torch.full((10, 48), torch.finfo(torch.bfloat16).max)})
    Checkpoint.open(folder).check_finite()


def test_folders_that_are_no_checkpoint_are_explained(tmp_path, folder):
    with pytest.raises(UsageError, match="no folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled"):
        Checkpoint.open(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="--base"):
        Checkpoint.open(folder)


def test_config_that_is_not_json_is_one_sentence(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"})[:-3])
    with pytest.raises(BundleError, match="JSON"):
        Checkpoint.open(folder)
