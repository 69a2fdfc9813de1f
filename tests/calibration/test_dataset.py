"""Calibration sets, hostile ones included: each is refused in a sentence, or reported by the file's name."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from metaembed.calibration.dataset import MINIMUM, CalibrationItem, choose, read_items
from metaembed.runtime.errors import UsageError


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    """A command run with --quiet by an earlier test has turned them off."""
    caplog.set_level(logging.WARNING, logger="metaembed")


def texts(count: int, side: str = "query", start: int = 0) -> list[CalibrationItem]:
    return [CalibrationItem(side, f"text {k}", None, f"{side} {k}") for k in range(start, start + count)]


def both_sides(count: int) -> list[CalibrationItem]:
    return texts(count) + texts(count, "candidate")


def save_noise(path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 35, 3), np.uint8)).save(path)


def test_the_same_seed_draws_the_same_items_and_hash():
    first, again, other = (choose(both_sides(40), "x", samples=20, seed=seed) for seed in (5, 5, 6))
    origins = [[item.origin for item in found.items] for found in (first, again, other)]
    assert origins[0] == origins[1] != origins[2]
    assert first.sha256 == again.sha256 != other.sha256


def test_held_out_items_are_not_calibrated_on_and_both_sides_have_some():
    found = choose(both_sides(16), "x", samples=32)
    assert len(found.items) + len(found.held_out) == 32
    assert not {item.origin for item in found.items} & {item.origin for item in found.held_out}
    assert {item.side for item in found.held_out} == {"query", "candidate"}
    assert len(found.held_out) == 8  # every fourth


def test_sides_and_within_a_side_kinds_are_drawn_evenly():
    both = [CalibrationItem("query", f"t{k}", _noise(k), f"{k}") for k in range(9)]
    found = choose([*texts(90), *both, *texts(90, "candidate")], "x", samples=24)
    counts = Counter(item.kind for item in (*found.items, *found.held_out))
    assert counts == {("query", True, False): 6, ("query", True, True): 6, ("candidate", True, False): 12}


def test_the_smallest_set_has_enough_of_each_side_whatever_the_kinds():
    """Three kinds of candidate and one of query: 16 items are 8 and 8."""
    images = [CalibrationItem("candidate", text, _noise(k), f"{k}") for k in range(6) for text in (None, f"t{k}")]
    found = choose([*texts(40), *texts(40, "candidate"), *images], "x", samples=16)
    assert Counter(item.side for item in (*found.items, *found.held_out)) == {"query": 8, "candidate": 8}


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8))


def test_a_side_without_data_is_an_error():
    with pytest.raises(UsageError, match=r"x gives 0 distinct, readable candidate inputs .* at least 8 of each side"):
        choose(texts(40), "x")


def test_too_little_data_is_an_error():
    with pytest.raises(UsageError, match=f"gives {MINIMUM - 1} distinct"):
        choose(both_sides(MINIMUM - 1), "x")
    with pytest.raises(UsageError, match="at least 16"):
        choose(both_sides(40), "x", samples=3)


def test_one_image_is_too_little(tmp_path):
    save_noise(tmp_path / "one.png", 0)
    with pytest.raises(UsageError, match="gives 1 distinct, readable query inputs"):
        choose(read_items(tmp_path), str(tmp_path))


def test_all_black_images_count_once_and_are_named(tmp_path, caplog):
    for k in range(20):
        Image.new("RGB", (56, 56)).save(tmp_path / f"{k}.png")
    with pytest.raises(UsageError, match="gives 1 distinct"):
        choose(read_items(tmp_path), str(tmp_path))
    assert any("one plain colour" in message and ".png" in message for message in caplog.messages)


def test_unreadable_images_are_left_out_by_name(tmp_path, caplog):
    for k in range(10):
        save_noise(tmp_path / f"{k}.png", k)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    found = choose(read_items(tmp_path), str(tmp_path), samples=20)
    assert len(found.items) + len(found.held_out) == 20
    assert (
        sum("broken.png is left out" in message for message in caplog.messages) == 1
    )  # though it stands on both sides


def test_a_folder_of_images_serves_both_sides_and_says_what_it_lacks(tmp_path, caplog):
    for k in range(8):
        save_noise(tmp_path / f"{k}.png", k)
    assert sorted({item.side for item in read_items(tmp_path)}) == ["candidate", "query"]
    assert "no text of users" in caplog.text


def test_a_text_that_will_be_cut_is_named(caplog):
    items = [*both_sides(10), CalibrationItem("query", "word " * 2000, None, "data.jsonl line 7")]
    choose(items, "x", text_tokens=512)
    assert "data.jsonl line 7: a text of 10000 characters is cut to 512 tokens" in caplog.text


def test_jsonl_lines_become_items_with_images_beside_the_file(write_jsonl):
    path = write_jsonl({"text": "a", "side": "query"}, "", {"image": "b.png", "text": None, "side": "candidate"})
    first, second = read_items(path)
    assert (first.side, first.text, first.image) == ("query", "a", None)
    assert (second.side, second.text, second.image) == ("candidate", None, path.parent / "b.png")
    assert second.origin == f"{path} line 3"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not of the form"),
        ({"text": "a", "side": "query", "label": 1}, "line 2 is not of the form"),
        ({"text": "a"}, "line 2 has side None"),
        ({"text": "a", "side": "doc"}, "line 2 has side 'doc'; it is one of query, candidate"),
        ({"text": 3, "side": "query"}, "text and image are strings"),
        ({"text": " ", "side": "query"}, "neither a text nor an image"),
        ('{"text": "\\ud800", "side": "query"}', "line 2: the text holds half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_refused_by_number(write_jsonl, line, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_items(write_jsonl({"text": "a", "side": "query"}, line))


def test_no_data_is_an_error(tmp_path, write_jsonl):
    with pytest.raises(UsageError, match="holds no images"):
        read_items(tmp_path)
    with pytest.raises(UsageError, match="is missing"):
        read_items(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is empty"):
        read_items(write_jsonl())
