"""What MODEL may be, and where its weights are looked for."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from metaembed.export.models import DEMO_FOLDER, resolve_model
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.known_models import KNOWN, KnownModel
from metaembed.runtime.plan import find_geometry


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch, tiny):
    """An empty hub cache, no METAEMBED_HOME, and a known model small enough to have weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("METAEMBED_HOME", raising=False)
    monkeypatch.setitem(KNOWN, "tiny", KnownModel("tiny", "Tiny/Base", tiny))
    monkeypatch.chdir(tmp_path)


def write_model(folder, config, **changes):
    return write_random_checkpoint({**config, **changes}, 0, folder)


def write_adapter(folder, tensors=None, **settings):
    folder.mkdir()
    save_file(tensors or {}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1} | settings))


def write_hub(root, hub_id, config):
    """The layout of a hub cache: refs/main names a snapshot."""
    repository = root / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    write_model(repository / "snapshots" / ("0" * 40), config)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", ["3b", "7b", "32b", "7B"])
def test_known_size_without_weights_has_its_geometry(name):
    found = resolve_model(name)
    assert found.base is None
    assert found.geometry == KNOWN[name.lower()].geometry


def test_weights_that_are_nowhere_say_where_they_were_sought(tmp_path):
    with pytest.raises(UsageError) as caught:
        resolve_model("7b").open(tmp_path / "merged")
    for words in (
        "--base",
        "METAEMBED_HOME (not set)",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        str(tmp_path / "hub"),
        "--random",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_base_outranks_home_and_home_the_hub(tmp_path, tiny, monkeypatch):
    hub = write_hub(tmp_path, "Tiny/Base", tiny)
    assert resolve_model("tiny").base == hub
    write_model(tmp_path / "home" / "tiny", tiny)
    monkeypatch.setenv("METAEMBED_HOME", str(tmp_path / "home"))
    assert resolve_model("tiny").base == tmp_path / "home" / "tiny"
    write_model(tmp_path / "mine", tiny)
    assert resolve_model("tiny", base="mine").base.resolve() == tmp_path / "mine"
    assert resolve_model("tiny", base="Tiny/Base").base == hub


def test_weights_of_another_size_are_refused(tmp_path, tiny):
    write_model(tmp_path / "mine", tiny, num_hidden_layers=3)
    with pytest.raises(UsageError, match="3 layers of 48 dims, tiny has 2 of 48"):
        resolve_model("tiny", base="mine")


def test_folder_and_hub_id_are_models(tmp_path, tiny):
    hub = write_hub(tmp_path, "some/model", tiny)
    assert resolve_model("some/model").base == hub
    checkpoint = resolve_model(str(hub)).open(tmp_path / "merged")
    assert checkpoint.geometry.meta_tokens == 10
    assert not (tmp_path / "merged").exists()


def test_adapter_folder_finds_the_base_that_it_names(tmp_path, tiny):
    hub = write_hub(tmp_path, "Tiny/Base", tiny)
    write_adapter(tmp_path / "lora", base_model_name_or_path="Tiny/Base")
    found = resolve_model("lora")
    assert (found.base, found.adapter.resolve()) == (hub, tmp_path / "lora")
    assert found.geometry.meta_tokens == 10
    assert resolve_model("tiny", adapter="lora").adapter.resolve() == tmp_path / "lora"


def test_the_adapter_s_metaembed_settings_outrank_the_base_s(tmp_path, tiny):
    """Expected: the tokens and dims written here; the base has 3, 7 and 48."""
    write_model(tmp_path / "mine", tiny)
    tensors = {
        "base_model.model.prompt_embed_tokens.weight": torch.ones(12, 48),
        "base_model.model.custom_text_proj.weight": torch.ones(5, 48),
        "base_model.model.custom_text_proj.bias": torch.ones(5),
    }
    write_adapter(tmp_path / "lora", tensors)
    (tmp_path / "lora" / "config.json").write_text('{"num_query_prompt_tokens": 4, "num_doc_prompt_tokens": 8}')
    for found in (
        resolve_model("lora", base="mine"),
        resolve_model("mine", adapter="lora"),
        resolve_model("tiny", base="mine", adapter="lora"),
        resolve_model("tiny", adapter="lora"),  # no weights at all
    ):
        geometry = found.geometry
        assert (geometry.query_tokens, geometry.candidate_tokens, geometry.dim) == (4, 8, 5)
    random = write_random_checkpoint(found.config, 0, tmp_path / "random")
    assert random.tensors["prompt_embed_tokens.weight"].shape == (12, 48)
    assert resolve_model("mine", adapter="lora").open(tmp_path / "merged").geometry == geometry


@pytest.mark.parametrize("layout", ["one file", "shards", "beside", "trained by PEFT"])
def test_projection_of_a_whole_checkpoint_whose_config_does_not_tell(tmp_path, tiny, layout):
    """Expected: 5 dims, as written here. Before weights are opened: for dry runs and rehearsals."""
    checkpoint = write_random_checkpoint(tiny | {"dim": 5}, 0, tmp_path / "mine")
    tensors = load_file(checkpoint.files[0])
    (tmp_path / "mine" / "config.json").write_text(json.dumps(tiny))
    projection = {name: tensors[name] for name in tensors if name.startswith("custom_text_proj")}
    if layout == "shards":
        shutil.rmtree(tmp_path / "mine")
        write_random_checkpoint(tiny | {"dim": 5}, 0, tmp_path / "mine", shard_bytes=60_000)
        (tmp_path / "mine" / "config.json").write_text(json.dumps(tiny))
    elif layout == "beside":
        save_file({n: t for n, t in tensors.items() if n not in projection}, tmp_path / "mine" / "model.safetensors")
        save_file(projection, tmp_path / "mine" / "custom_text_proj.safetensors")
    elif layout == "trained by PEFT":
        untrained = {
            f"{n[:16]}.original_module.{n[17:]}": torch.ones(9, 48)[: len(t) + 1] for n, t in projection.items()
        }
        trained = {f"{n[:16]}.modules_to_save.default.{n[17:]}": t for n, t in projection.items()}
        others = {n: t for n, t in tensors.items() if n not in projection}
        save_file(others | trained | untrained, tmp_path / "mine" / "model.safetensors")
    write_adapter(tmp_path / "lora", {"prompt_embed_tokens.weight": torch.ones(10, 48)})
    for found in (
        resolve_model("mine"),
        resolve_model("tiny", base="mine"),
        resolve_model("mine", adapter="lora"),
    ):
        assert found.geometry.dim == 5
        assert write_random_checkpoint(found.config, 0, tmp_path / "random").geometry.dim == 5
        shutil.rmtree(tmp_path / "random")
    assert find_geometry("mine").dim == 5
    assert resolve_model("mine").open(tmp_path / "none").geometry.dim == 5


def test_a_config_that_tells_the_width_outranks_the_weights_until_they_are_opened(tmp_path, tiny):
    write_model(tmp_path / "mine", tiny, dim=5)
    (tmp_path / "mine" / "config.json").write_text(json.dumps(tiny | {"dim": 6}))
    assert resolve_model("mine").geometry.dim == 6
    with pytest.raises(BundleError, match=r"custom_text_proj.weight \(5, 48\), not \(6, 48\)"):
        resolve_model("mine").open(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x08\0\0\0\0\0\0\0{'a': 1}"])
def test_weights_that_cannot_be_read_hinder_no_rehearsal(tmp_path, tiny, content):
    write_model(tmp_path / "mine", tiny)
    (tmp_path / "mine" / "model.safetensors").write_bytes(content)
    assert resolve_model("mine").geometry.dim == find_geometry("mine").dim == 48


def test_projection_of_an_adapter_for_a_known_size_without_weights(tmp_path):
    """Its config.json, as we ship it, says that there is none."""
    tensors = {"custom_text_proj.weight": torch.ones(6, 3584), "custom_text_proj.bias": torch.ones(6)}
    write_adapter(tmp_path / "lora", tensors)
    assert resolve_model("7b", adapter="lora").geometry.dim == 6


def test_an_adapter_that_cannot_be_exported_is_refused_before_anything_is_opened(tmp_path, tiny):
    write_model(tmp_path / "mine", tiny)
    write_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").write_text('{"use_bidirectional_attention": true}')
    with pytest.raises(UsageError, match="bidirectionally"):
        _ = resolve_model("mine", adapter="lora").geometry
    with pytest.raises(UsageError, match="no PEFT adapter"):
        resolve_model("tiny", adapter="mine")


@pytest.mark.parametrize("role", ["model", "base", "adapter"])
def test_a_folder_whose_name_is_not_unicode_is_refused_at_once(tmp_path, tiny, role):
    strange = os.fsdecode(b"na\xffme")
    write_model(tmp_path / "mine", tiny)
    (tmp_path / "mine").rename(tmp_path / strange)  # our own writer would refuse it
    with pytest.raises(UsageError, match="not valid Unicode"):
        resolve_model(**{"model": "tiny", role: strange})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "does not name its base"),
        ({"base_model_name_or_path": 7}, "does not name its base"),
        ({"base_model_name_or_path": "Not/Here"}, "Not/Here is neither a folder nor in"),
    ],
)
def test_adapter_whose_base_is_unknown_says_what_to_do(tmp_path, settings, words):
    write_adapter(tmp_path / "lora", **settings)
    with pytest.raises(UsageError, match=words):
        resolve_model("lora")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "7bb"}, "did you mean 7b?"),
        ({"model": "nothing/here"}, "hf download nothing/here"),
        ({"model": "a/b/c"}, "no model"),
        ({"model": "tiny", "base": "nowhere"}, "nowhere is neither"),
        ({"model": "tiny", "adapter": "nowhere"}, "nowhere is neither"),
        ({"model": "mine", "base": "mine"}, "whole checkpoint"),
    ],
)
def test_mistaken_models_are_explained(tmp_path, tiny, arguments, words):
    write_model(tmp_path / "mine", tiny)
    with pytest.raises(UsageError) as caught:
        resolve_model(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def both(folder, tiny):
    """A model and an adapter in one folder, as trainers leave them that save both."""
    write_model(folder, tiny)
    write_adapter(folder.with_name("lora"), {"prompt_embed_tokens.weight": torch.ones(10, 48)})
    for path in folder.with_name("lora").iterdir():
        shutil.copy(path, folder)


@pytest.mark.parametrize(
    "arguments",
    [{"model": "mine"}, {"model": "tiny", "base": "mine"}, {"model": "mine", "base": "other"}, {"model": "tiny"}],
    ids=str,
)
def test_a_model_and_an_adapter_in_one_folder_are_refused_unless_the_adapter_is_named(
    tmp_path, tiny, monkeypatch, arguments
):
    """Hugging Face would load the adapter onto the base that it names."""
    both(tmp_path / "mine", tiny)
    write_model(tmp_path / "other", tiny)
    if arguments == {"model": "tiny"}:  # METAEMBED_HOME/tiny
        (tmp_path / "home").mkdir()
        (tmp_path / "mine").rename(tmp_path / "home" / "tiny")
        monkeypatch.setenv("METAEMBED_HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="holds a model and an adapter; merge them with --adapter") as caught:
        resolve_model(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"model": "mine"}, {"model": "tiny", "base": "mine"}], ids=str)
@pytest.mark.parametrize("adapter", ["mine", "lora"])
def test_a_named_adapter_is_merged_whatever_lies_beside_the_model(tmp_path, tiny, arguments, adapter):
    """Expected: the ones of the adapter's Meta Tokens."""
    both(tmp_path / "mine", tiny)
    found = resolve_model(**arguments, adapter=adapter)
    assert found.adapter.name == adapter
    assert (found.open(tmp_path / "merged").read("prompt_embed_tokens.weight") == 1).all()


def test_plain_base_is_told_that_it_lacks_an_adapter(tmp_path, tiny):
    from safetensors.numpy import load_file, save_file

    from metaembed.export.checkpoint import Checkpoint

    checkpoint = write_model(tmp_path / "mine", tiny)
    path = checkpoint.files[0]
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("prompt_embed")}, path)
    with pytest.raises(BundleError, match="--adapter"):
        Checkpoint.open(tmp_path / "mine")


def test_demo_is_found_in_capitals():
    assert resolve_model("DEMO").name == "demo"


def test_demo_is_packaged(tmp_path):
    checkpoint = resolve_model("demo").open(tmp_path / "merged")
    assert checkpoint.files == [DEMO_FOLDER.resolve() / "model.safetensors"]
    checkpoint.check_finite()
