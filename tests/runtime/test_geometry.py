"""Geometry and tensor names against transformers' own classes on the meta device, which needs no memory."""

from __future__ import annotations

import json
from contextlib import suppress
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.tensors import META_TABLE, expected_tensors, parameter_count


def hf_model(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**config))


@pytest.mark.parametrize("name", KNOWN)
def test_tensors_are_those_of_the_hf_model_and_the_meta_table(name):
    """Expected: names, order and shapes of Qwen2_5_VLModel.state_dict()."""
    known = KNOWN[name]
    model = hf_model(known.config)
    ours = expected_tensors(known.geometry)
    assert ours.pop(META_TABLE) == (80, known.config["hidden_size"])
    assert list(ours.items()) == [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    assert (
        parameter_count(known.geometry)
        == sum(p.numel() for p in model.parameters()) + 80 * model.config.text_config.hidden_size
    )


@pytest.mark.parametrize(("name", "published"), [("3b", 3_754_622_976), ("7b", 8_292_166_656), ("32b", 33_452_718_336)])
def test_parameters_with_lm_head_are_the_published_count(name, published):
    """Expected: what the headers of the published safetensors files add up to; 3B ties lm_head to the token table."""
    geometry, config = KNOWN[name].geometry, KNOWN[name].config
    lm_head = 0 if config["tie_word_embeddings"] else geometry.text.vocab * geometry.text.hidden
    assert parameter_count(geometry) - prod((geometry.meta_tokens, geometry.text.hidden)) + lm_head == published


def test_flat_and_nested_configs_are_the_same_geometry():
    """Expected: the nested config that transformers 5 makes of the flat one."""
    transformers = pytest.importorskip("transformers")
    for known in KNOWN.values():
        nested = transformers.Qwen2_5_VLConfig(**known.config).to_dict()
        assert "text_config" in nested
        assert "hidden_size" not in nested
        assert Geometry.from_config(nested) == known.geometry


def test_geometry_reads_every_size():
    """Expected: the published configuration of 7B, by hand."""
    geometry = KNOWN["7b"].geometry
    text, vision = geometry.text, geometry.vision
    assert (text.hidden, text.layers, text.heads, text.kv_heads, text.head_dim) == (3584, 28, 28, 4, 128)
    assert (text.intermediate, text.vocab, text.rms_eps, text.rope_theta) == (18944, 152064, 1e-6, 1e6)
    assert text.mrope_section == (16, 24, 24)
    assert (vision.hidden, vision.depth, vision.heads, vision.head_dim) == (1280, 32, 16, 80)
    assert (vision.intermediate, vision.out_hidden, vision.full_attention_blocks) == (3420, 3584, (7, 15, 23, 31))
    assert (vision.patch_values, vision.window_patches) == (1176, 64)
    assert (geometry.query_tokens, geometry.candidate_tokens, geometry.projection, geometry.dim) == (16, 64, None, 3584)
    assert geometry.image_token_id == 151655


def test_projection_sets_the_dims_and_adds_two_tensors():
    geometry = Geometry.from_config({**KNOWN["3b"].config, "dim": 128})
    assert (geometry.projection, geometry.dim) == (128, 128)
    tensors = expected_tensors(geometry)
    assert tensors["custom_text_proj.weight"] == (128, 2048)
    assert tensors["custom_text_proj.bias"] == (128,)


@pytest.mark.parametrize("change", [{}, {"dim": 128, "num_query_prompt_tokens": 3}])
def test_geometry_survives_json(change):
    geometry = Geometry.from_config({**KNOWN["7b"].config, **change})
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


REFUSED = {
    "model_type": ("qwen2_vl", "qwen2_vl"),
    "use_bidirectional_attention": (True, "bidirectional"),
    "shared_query_doc_prompt": (True, "shared_query_doc_prompt"),
    "quantization_config": ({"bits": 4}, "quantised"),
    "hidden_act": ("gelu", "silu"),
    "use_sliding_window": (True, "sliding"),
    "layer_types": (["full_attention"] * 27 + ["sliding_attention"], "sliding_attention"),
    "rope_scaling": ({"type": "yarn", "mrope_section": [16, 24, 24]}, "yarn"),
    "head_dim": (64, "head_dim"),
    "num_attention_heads": (27, "27 heads"),
    "num_key_value_heads": (5, "5 key/value heads"),
    "hidden_size": ("3584", "whole number"),
    "rms_norm_eps": (float("nan"), "rms_eps"),
    "num_hidden_layers": (10**8, "layers"),
    "vocab_size": (0, "vocab"),
    "num_query_prompt_tokens": (-1, "query_tokens"),
    "dim": (0, "projection"),
    "text_config": (["a list"], "text_config"),
}


@pytest.mark.parametrize("kinds", [["full_attention"] * 27, "full_attention", 28])
def test_types_of_other_than_all_layers_are_refused(kinds):
    """Qwen2_5_VLTextConfig refuses them too, with a traceback; 7B has 28 layers."""
    with pytest.raises(UsageError, match="layer_types does not list its 28 layers"):
        Geometry.from_config({**KNOWN["7b"].config, "layer_types": kinds})


@pytest.mark.parametrize("change", [{"layer_types": ["full_attention"] * 28}, {"layer_types": None}, {"dim": None}])
def test_what_says_nothing_new_is_read(change):
    assert Geometry.from_config({**KNOWN["7b"].config, **change}) == KNOWN["7b"].geometry


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_sentence(key):
    value, word = REFUSED[key]
    with pytest.raises(UsageError) as caught:
        Geometry.from_config({**KNOWN["7b"].config, key: value})
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("patch_size", 16, "(16, 2, 2, 3, 112)"),
        ("window_size", 224, "224"),
        ("out_hidden_size", 1024, "1024"),
        ("fullatt_block_indexes", [7, 32], "fullatt_block_indexes"),
        ("fullatt_block_indexes", "7", "list"),
        ("num_heads", 3, "3 vision heads"),
        ("hidden_act", "gelu", "gelu"),
    ],
)
def test_other_vision_towers_are_refused(key, value, word):
    config = {**KNOWN["7b"].config, "vision_config": {**KNOWN["7b"].config["vision_config"], key: value}}
    with pytest.raises(UsageError) as caught:
        Geometry.from_config(config)
    assert word in str(caught.value)


@pytest.mark.parametrize("damage", [{"text": None}, {"dims": 7}, {"query_tokens": -1}])
def test_damaged_record_of_a_geometry_is_a_bundle_error(damage):
    with pytest.raises(BundleError, match="geometry"):
        Geometry.from_json({**KNOWN["7b"].geometry.to_json(), **damage})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
VISION_KEYS = sorted(KNOWN["7b"].config["vision_config"])
ROPE_KEYS = ("rope_type", "type", "mrope_section", "rope_theta")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_config_is_read_or_refused(data):
    """Whatever stands in a config.json: a geometry that lists its tensors, or one sentence; never another error."""
    config = json.loads(json.dumps(KNOWN["7b"].config))
    section, keys = data.draw(
        st.sampled_from(
            [(config, sorted(config)), (config["vision_config"], VISION_KEYS), (config["rope_scaling"], ROPE_KEYS)]
        )
    )
    section[data.draw(st.sampled_from(keys))] = data.draw(ANYTHING)
    with suppress(UsageError):
        assert parameter_count(Geometry.from_config(config)) > 0
