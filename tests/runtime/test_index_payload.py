"""Payloads that are nested deep: how deep they may be, and what becomes of those from before there was a limit."""

import sys

import numpy as np
import pytest

from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_payload import check_levels
from metaembed.runtime.index_writer import IndexWriter
from metaembed.runtime.items import read_data

ONE = np.ones((1, 1, 4), np.float32)
QUERY = np.ones((1, 4), np.float32)


def nested(levels, inner=1):
    """An object in an object, so many in all."""
    for _ in range(levels):
        inner = {"a": inner}
    return inner


def listed(levels, inner):
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.fixture
def folder(tmp_path):
    Index.create(tmp_path / "index", Layout(4, (1,)))
    return tmp_path / "index"


@pytest.fixture
def no_limit(monkeypatch):
    """As it was for the indexes that hold deeper payloads."""
    monkeypatch.setattr("metaembed.runtime.index_payload.MOST_LEVELS", 10**6)


def test_a_hundred_levels_are_taken_and_given_back_and_one_more_is_refused(folder):
    mixed = {"many": [{"\\": "]}" * 3, '"': "[["}] * 200, "deep": nested(19, listed(80, "[{" * 300))}
    with IndexWriter(folder) as writer:
        for levels in (101, 985, 100_000):
            with pytest.raises(UsageError, match="payload of 'x' is nested too deep: .* at most 100 levels"):
                writer.add(["w", "x"], np.ones((2, 1, 4)), [{}, nested(levels)])
        with pytest.raises(UsageError, match="payload of 'x' is nested too deep"):
            writer.add(["x"], ONE, [{**mixed, "deep": nested(19, listed(81, 1))}])
        writer.add(["y", "z"], np.ones((2, 1, 4)), [nested(100), mixed])
    with Index.open(folder) as index:
        assert {hit.id: hit.payload for hit in index.search(QUERY)} == {"y": nested(100), "z": mixed}
        assert [hit.id for hit in index.search(QUERY, where=[f"{'.'.join('a' * 100)}=1"])] == ["y"]


@pytest.mark.parametrize(("text", "fits"), [("[[]]" * 60, True), ('["]"' * 101 + "]" * 101, False), ("[" * 101, False)])
def test_levels_are_those_of_brackets_outside_texts(text, fits):
    if fits:
        check_levels(text, "it")
    else:
        with pytest.raises(UsageError, match="it is nested too deep"):
            check_levels(text, "it")


@pytest.mark.parametrize("levels", [101, 5000, 100_000])
def test_a_line_of_data_that_is_too_deep_is_named(tmp_path, levels):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": "a", "text": "b"}\n{"id": "c", "text": "d", "v": ' + "[" * levels + "]" * levels + "}\n")
    with pytest.raises(UsageError, match="data.jsonl line 2 is nested too deep"):
        read_data(path)
    path.write_text('{"id": "c", "text": "d", "v": ' + "[" * 99 + "]" * 99 + "}\n")
    assert len(read_data(path)) == 1


def test_what_is_stored_deeper_is_served_or_refused_in_one_sentence(folder, no_limit):
    with IndexWriter(folder) as writer:
        writer.add(["x"], ONE, [nested(500)])
    with Index.open(folder) as index:
        assert index.search(QUERY)[0].payload == nested(500)

        def search(frames):
            return search(frames - 1) if frames else index.search(QUERY)

        limit = sys.getrecursionlimit()
        with pytest.raises(MetaEmbedError, match="payload of 'x' .*is nested too deep to be read here; store it again"):
            for frames in range(0, limit, 20):  # at some depth of the stack it no longer can be read
                search(frames)
        assert index.verify() == []


def test_conditions_over_what_sqlite_cannot_read_are_refused_without_naming_damage(folder, no_limit):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(4000)
    try:
        with IndexWriter(folder) as writer:
            writer.add(["x", "y"], np.ones((2, 1, 4)), [nested(2500), {"n": 1}])
    finally:
        sys.setrecursionlimit(limit)
    with Index.open(folder) as index, pytest.raises(BundleError, match="conditions cannot read: it is nested too deep"):
        index.search(QUERY, where=["n=1"])
