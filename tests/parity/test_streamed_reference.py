"""The streamed reference against ``Qwen2_5_VLModel.from_pretrained``: equal to the bit, and without its weights in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLModel

from metaembed.export import streamed
from metaembed.export.golden import draw_page, quick_items
from metaembed.export.models import resolve_model
from metaembed.export.parity import _batches
from metaembed.export.reference import Reference
from metaembed.export.source import Source, open_source
from metaembed.runtime.golden import GoldenItem
from metaembed.runtime.images import ImageRules

RULES = ImageRules(min_pixels=56 * 56, max_pixels=1024 * 28 * 28)

ITEMS = [
    GoldenItem("a red umbrella and a blue anchor"),
    GoldenItem(image=draw_page(1, (84, 252))),
    GoldenItem("two anchors", draw_page(2, (150, 56))),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(resolve_model("demo"), tmp_path_factory.mktemp("demo") / "none")


@pytest.fixture(scope="module")
def loaded(source: Source) -> Reference:
    """As HF itself loads it."""
    reference = Reference(source)
    assert not reference.streamed
    reference.model = Qwen2_5_VLModel.from_pretrained(source.folder, dtype=torch.float32).eval()
    return reference


@pytest.fixture
def streaming(source: Source, monkeypatch: pytest.MonkeyPatch) -> Reference:
    monkeypatch.setattr(streamed, "available_memory", lambda: 1000)  # a machine with a kilobyte left
    reference = Reference(source)
    assert reference.streamed
    return reference


def test_streamed_embeddings_are_those_of_the_loaded_model(loaded: Reference, streaming: Reference):
    """Text, image and both in one batch, twice: dropping a layer's weights and reading them again changes no bit."""
    expected = loaded.encode("candidate", ITEMS)
    np.testing.assert_array_equal(streaming.encode("candidate", ITEMS), expected)
    np.testing.assert_array_equal(streaming.encode("candidate", ITEMS), expected)


def test_embeddings_with_all_weights_in_memory_are_those_of_the_loaded_model(source: Source, loaded: Reference):
    np.testing.assert_array_equal(Reference(source).encode("query", ITEMS), loaded.encode("query", ITEMS))


def test_no_weights_stay_in_memory(streaming: Reference):
    streaming.encode("query", ITEMS[:2])
    left = [name for name, parameter in streaming.model.named_parameters() if not parameter.is_meta]
    assert left == []


def test_weights_are_dropped_when_a_forward_fails(streaming: Reference):
    layer = streaming.model.language_model.layers[0]
    with pytest.raises(TypeError):
        layer()
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_memory_decides(source: Source, monkeypatch: pytest.MonkeyPatch):
    """Counted by hand: 4 bytes for each value against half of what is free."""
    need = 4 * sum(int(np.prod(ref.shape)) for ref in source.checkpoint.tensors.values())
    for free, streams in ((2 * need, False), (2 * need - 2, True), (None, False)):
        monkeypatch.setattr(streamed, "available_memory", lambda free=free: free)
        assert streamed.needs_streaming(source.checkpoint) is streams


@pytest.mark.parametrize("side", ["query", "candidate"])
def test_quick_inputs_are_of_every_kind_and_enough_for_a_ranking(side: str):
    items = quick_items(side, RULES)
    assert {item.kind for item in items} == {"text", "image", "image + text"}
    assert side == "query" or len(items) > 10


def test_small_inputs_share_a_pass_only_where_weights_are_streamed():
    items = quick_items("candidate", RULES)
    assert [len(batch) for batch in _batches(items, together=False)] == [1] * len(items)
    assert [len(batch) for batch in _batches(items, together=True)] == [len(items) - 1, 1]
