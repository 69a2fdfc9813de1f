"""Symbol scenes: equal seeds give equal pages, held-out pairs stay held out, judgements are true."""

import unicodedata
from itertools import combinations

import numpy as np
import pytest

from metaembed.bench import scenes, scenes_queries
from metaembed.bench.scenes_render import render


@pytest.fixture(scope="module")
def split():
    return scenes_queries.make_split("test", 5, scenes=200, queries=(30, 10, 10))


def test_each_symbol_is_named_by_a_word_of_its_unicode_name():
    for symbol, word in scenes.SYMBOLS.items():
        assert word.upper() in unicodedata.name(symbol).replace("-", " ").split()


def test_there_are_64_symbols_and_8_colours_and_every_symbol_has_ink_of_its_own():
    """Two symbols drawn alike could not be told apart by any model."""
    assert (len(scenes.WORDS), len(set(scenes.WORDS)), len(scenes.COLOURS)) == (64, 64, 8)
    pages = [scenes.Scene(28, 28, 255, (scenes.Item(symbol, 7, 1, 1, 25),)) for symbol in range(64)]
    drawn = [np.asarray(render(page).convert("L"), float) for page in pages]
    assert min(np.abs(one - other).mean() for one, other in combinations(drawn, 2)) > 4


def test_training_sees_no_pair_that_validation_or_test_hold_out():
    held = {name: set(scenes.held_out_pairs(name)) for name in scenes.SPLITS}
    assert [len(held[name]) for name in scenes.SPLITS] == [0, 16, 48]
    assert not held["validation"] & held["test"]
    assert not set(scenes.allowed_pairs("train")) & (held["validation"] | held["test"])
    assert not set(scenes.allowed_pairs("validation")) & held["test"]
    assert {pair[1] for pair in held["test"]} == set(range(8))


def test_equal_seeds_give_equal_splits_and_pages(split):
    again = scenes_queries.make_split("test", 5, scenes=200, queries=(30, 10, 10))
    assert again == split
    assert np.array_equal(np.asarray(render(again.scenes[0])), np.asarray(render(split.scenes[0])))
    assert scenes_queries.make_split("test", 6, scenes=200, queries=(30, 10, 10)) != split
    assert scenes_queries.make_split("validation", 5, scenes=200, queries=(30, 10, 10)).scenes != split.scenes


def test_splits_of_one_seed_draw_different_numbers():
    drawn = {tuple(scenes.split_generator(name, 5).integers(0, 10**9, 3).tolist()) for name in scenes.SPLITS}
    assert len(drawn) == 3


def test_pages_keep_to_their_sizes_and_hold_their_items(split):
    sizes = {(scene.width, scene.height) for scene in split.scenes}
    assert sum((scene.width, scene.height) == (112, 112) for scene in split.scenes) == 150
    assert len(sizes) > 40
    for scene in split.scenes:
        assert min(scene.width, scene.height) >= 84
        assert max(scene.width, scene.height) <= min(336, 3 * min(scene.width, scene.height))
        assert 6 <= len(scene.items) == len(scene.pairs) <= 9
        for item in scene.items:
            assert 0 <= item.left <= scene.width - item.size
            assert 0 <= item.top <= scene.height - item.size


def test_items_of_a_page_do_not_overlap(split):
    for scene in split.scenes:
        for one, other in combinations(scene.items, 2):
            apart = max(abs(one.left - other.left), abs(one.top - other.top))
            assert apart >= min(one.size, other.size) - 1


def test_an_item_is_drawn_in_its_colour_where_it_says():
    """By hand: a black square of 20 px on a white page darkens its own box and nothing else."""
    square = scenes.WORDS.index("square")
    page = scenes.Scene(60, 40, 255, (scenes.Item(square, scenes.COLOUR_WORDS.index("black"), 10, 15, 20),))
    grey = np.asarray(render(page).convert("L"))
    assert grey[17:33, 12:28].max() < 64
    outside = grey.copy()
    outside[15:35, 10:30] = 255
    assert outside.min() == 255


def test_every_query_has_an_answer_and_judgements_are_by_content(split):
    """Judged again from the items, without the sets that ``relevant`` uses."""
    for query in split.queries:
        answers = split.relevant(query)
        assert answers
        for k, scene in enumerate(split.scenes):
            shown = [(item.symbol, item.colour) for item in scene.items]
            assert (k in answers) == all(pair in shown for pair in query.pairs)


def test_half_of_the_queries_name_a_pair_that_training_never_saw(split):
    held = set(scenes.held_out_pairs("test"))
    text = [query for query in split.queries if query.kind == "text"]
    assert sum(bool(query.pairs & held) for query in text) >= len(text) // 2


def test_queries_say_or_show_all_of_their_pairs(split):
    assert [sum(query.kind == kind for query in split.queries) for kind in scenes_queries.KINDS] == [30, 10, 10]
    for query in split.queries:
        said = {pair for pair in query.pairs if query.text and scenes_queries.phrase(pair) in query.text}
        shown = set(query.page.pairs) if query.page else set()
        assert said | shown == query.pairs
        assert not said & shown


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([("umbrella", "red")], "a red umbrella"),
        ([("umbrella", "orange"), ("anchor", "blue")], "an orange umbrella and a blue anchor"),
        ([("sun", "red"), ("gear", "cyan"), ("anchor", "blue")], "a red sun, a cyan gear and a blue anchor"),
    ],
)
def test_pairs_are_enumerated_in_plain_english(pairs, text):
    indexes = [(scenes.WORDS.index(word), scenes.COLOUR_WORDS.index(colour)) for word, colour in pairs]
    assert scenes_queries.enumerate_pairs(indexes) == text
