"""The Encoder as its users call it: order, shapes, defaults, and one sentence for every mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed.runtime.budget import Budget
from metaembed.runtime.encoder import Encoder, align_inputs
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.manifest import PROCESSOR, TOKENIZER

TEXTS = ["a red umbrella", "x", "a blue anchor and a green star " * 3]


@pytest.fixture(scope="module")
def encoder(demo_bundle: Path) -> Iterator[Encoder]:
    with Encoder.open(demo_bundle, verify=False) as opened:
        yield opened


def page(colour: str, size: tuple[int, int] = (56, 84)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_shapes_types_and_lengths(encoder: Encoder):
    queries = encoder.encode_queries(TEXTS, budget=8)
    candidates = encoder.encode_candidates(images=[page("red"), page("blue")], budget=Budget(8, 16))
    assert (queries.shape, candidates.shape) == ((3, 8, 128), (2, 16, 128))
    assert queries.dtype == candidates.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(queries.astype(np.float64), axis=-1), 1, atol=1e-6)


def test_without_a_budget_the_largest_is_used(encoder: Encoder):
    assert encoder.encode_queries(["x"]).shape == (1, 16, 128)
    assert encoder.encode_candidates(["x"]).shape == (1, 64, 128)


@pytest.mark.parametrize("budget", [3, np.int64(3), np.uint8(3), Budget(3, 5)], ids=repr)
def test_a_budget_is_any_whole_number_or_a_budget(encoder: Encoder, budget: object):
    assert encoder.encode_queries(["x"], budget=budget).shape == (1, 3, 128)


@pytest.mark.parametrize("budget", [0, -1, 17, Budget(17, 64), "8", 8.0, True, (8, 16)], ids=repr)
def test_other_budgets_are_refused(encoder: Encoder, budget: object):
    with pytest.raises(UsageError, match="budget"):
        encoder.encode_queries(["x"], budget=budget)


def test_the_side_decides_which_half_of_a_budget_counts(encoder: Encoder):
    with pytest.raises(UsageError, match="candidate"):
        encoder.encode_candidates(["x"], budget=65)
    assert encoder.encode_candidates(["x"], budget=17).shape == (1, 17, 128)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing(encoder: Encoder, batch_size: int):
    images = [page("red"), None, page("blue", (200, 30)), page("green", (300, 300)), None]
    texts = [None, "x", "a blue anchor", None, "a red umbrella"]
    expected = encoder.encode_candidates(texts, images=images, budget=4)
    found = encoder.encode_candidates(texts, images=images, budget=4, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_equal_items_give_equal_rows_and_different_ones_do_not(encoder: Encoder):
    rows = encoder.encode_queries(["a", "b", "a"], budget=2)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-6)
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_nothing_gives_nothing(encoder: Encoder):
    assert encoder.encode_queries([], budget=3).shape == (0, 3, 128)
    assert encoder.encode_candidates(images=[]).shape == (0, 64, 128)


def test_image_files_and_pil_images_are_the_same(encoder: Encoder, tmp_path: Path):
    page("red").save(tmp_path / "page.png")
    sources = [tmp_path / "page.png", str(tmp_path / "page.png"), page("red")]
    rows = encoder.encode_candidates(images=sources, budget=2)
    np.testing.assert_allclose(rows, rows[[0, 0, 0]], atol=1e-6)


MISTAKES: dict[str, tuple[dict, str]] = {
    "nothing": ({}, "nothing to encode"),
    "a string": ({"texts": "abc"}, "lists"),
    "one image": ({"images": Image.new("RGB", (9, 9))}, "lists"),
    "one path": ({"images": Path("page.png")}, "lists"),
    "lengths": ({"texts": ["a", "b"], "images": [None]}, "cannot be paired"),
    "an item of nothing": ({"texts": ["a", None]}, "empty text"),
    "empty text": ({"texts": [""]}, "empty text"),
    "blank text": ({"texts": [" \n\t"]}, "empty text"),
    "a number": ({"texts": [5]}, "not int"),
    "half a character": ({"texts": ["\ud83d"]}, "Unicode"),
    "a missing image": ({"images": ["nowhere.png"]}, "missing"),
    "an array": ({"images": [np.zeros((9, 9, 3))]}, "not ndarray"),
    "a generator": ({"texts": (text for text in "ab")}, "list"),
    "a set": ({"texts": {"a", "b"}}, "list"),
    "half a batch": ({"texts": ["a"], "batch_size": 2.5}, "whole number"),
    "no batch": ({"texts": ["a"], "batch_size": 0}, "at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence(encoder: Encoder, name: str):
    arguments, words = MISTAKES[name]
    with pytest.raises(UsageError, match=words) as error:
        encoder.encode_queries(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(encoder: Encoder, tmp_path: Path, content: bytes):
    (tmp_path / "page.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"page\.png") as error:
        encoder.encode_candidates(images=[tmp_path / "page.png"])
    assert "\n" not in str(error.value)


def test_text_over_the_limit_is_cut_with_a_warning(encoder: Encoder, caplog: pytest.LogCaptureFixture):
    """The demo's limit is 512 tokens: what follows changes nothing."""
    long = "a red umbrella and " * 600
    with caplog.at_level("WARNING", logger="metaembed"):
        rows = encoder.encode_queries([long, long + "a blue anchor"], budget=2)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert "cut to 512" in caplog.text


def test_control_tokens_in_text_are_plain_text(encoder: Encoder):
    hostile = ["<|image_pad|>", "<|im_end|><|endoftext|>", "<|vision_start|><|image_pad|><|vision_end|>"]
    rows = encoder.encode_candidates(hostile, images=[page("red"), None, page("blue")], budget=2)
    assert np.isfinite(rows).all()


def test_a_batch_holds_no_image_that_is_mostly_padding(encoder: Encoder):
    """One 28 x 28 page beside one of 896 x 896 would be padded 64-fold in the vision graph."""
    images = [page("red", (28, 28)), page("blue", (448, 448)), page("green", (448, 400)), page("white", (56, 56))]
    items = [encoder._prepare("candidate", place, None, image) for place, image in enumerate(images)]
    batches = [[item.place for item in batch] for batch in encoder._batches(items, 16)]
    assert sorted(place for batch in batches for place in batch) == [0, 1, 2, 3]
    assert {frozenset(batch) for batch in batches} == {frozenset({0, 3}), frozenset({1, 2})}


def test_align_inputs_pairs_item_by_item():
    assert align_inputs(["a", None], [None, "b.png"]) == [("a", None), (None, "b.png")]
    assert align_inputs(["a"], None) == [("a", None)]


def test_a_closed_encoder_says_so(demo_bundle: Path):
    with Encoder.open(demo_bundle, verify=False) as encoder:
        pass
    encoder.close()
    with pytest.raises(UsageError, match="closed"):
        encoder.encode_queries(["x"])


@pytest.mark.parametrize("name", [PROCESSOR, TOKENIZER])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"{}", b"\xff", b"[" * 100_000], ids=lambda c: str(c[:9])
)
def test_a_forged_part_is_one_sentence(replace_file: Callable[[str, bytes], Path], name: str, content: bytes):
    """The manifest vouches for it, and it is still not what it should be."""
    with pytest.raises(BundleError) as error:
        Encoder.open(replace_file(name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vision.onnx", "language.onnx"])
@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_forged_graph_is_one_sentence(replace_file: Callable[[str, bytes], Path], name: str, content: bytes):
    with pytest.raises(BundleError, match="cannot load") as error:
        Encoder.open(replace_file(name, content))
    assert "\n" not in str(error.value)


def test_a_graph_in_the_place_of_the_other_is_refused(bundle: Path, replace_file: Callable[[str, bytes], Path]):
    vision = (bundle / "vision.onnx").read_bytes()
    with pytest.raises(MetaEmbedError), Encoder.open(replace_file("language.onnx", vision)) as encoder:
        encoder.encode_queries(["x"])


def test_a_bundle_that_names_no_files_is_not_complete(edit_manifest: Callable[[Callable[[dict], object]], Path]):
    with pytest.raises(BundleError, match="not complete"):
        Encoder.open(edit_manifest(lambda data: data.update(files={})))
