"""Conditions on names and values of which JSON and SQLite have their own notion. Expected throughout: what Python compares."""

import json
from operator import eq, ge, gt, le, lt, ne

import numpy as np
import pytest

from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_filter import parse_filters
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_writer import IndexWriter

SIGNS = (("=", eq), ("!=", ne), ("<", lt), ("<=", le), (">", gt), (">=", ge))


def filled(folder, payloads):
    """An index of items 0, 1, ... with these payloads."""
    Index.create(folder, Layout(4, (1,)))
    with IndexWriter(folder) as writer:
        count = len(payloads)
        writer.add([str(i) for i in range(count)], np.ones((count, 1, 4), np.float32), payloads)
    return Index.open(folder)


def matches(index, condition):
    return sorted(hit.id for hit in index.search(np.ones((1, 4), np.float32), 20, where=[condition]))


@pytest.mark.parametrize("value", ["9223372036854775808", "-9223372036854775809", "9" * 400, "-" + "9" * 5000])
@pytest.mark.parametrize("sign", ["=", "!=", "<"])
def test_whole_numbers_beyond_64_bits_are_refused(sign, value):
    """SQLite compares them as floats: 12345678901234567891 would be 12345678901234567890."""
    with pytest.raises(UsageError, match="beyond 64 bits") as caught:
        parse_filters([f"n{sign}{value}"])
    assert len(str(caught.value)) < 200


def test_whole_numbers_within_64_bits_are_told_apart_from_all_others(tmp_path):
    numbers = [2**63 - 1, 2**63 - 2, 2**63, 2**64, -(2**63), 1 - 2**63, 12345678901234567890, 0, 2.0**63, 1e20]
    with filled(tmp_path / "index", [{"n": number} for number in numbers]) as index:
        for value in (2**63 - 1, 2**63 - 2, -(2**63), 1 - 2**63, 0, 1e20):
            for sign, holds in SIGNS:
                expected = [str(i) for i, number in enumerate(numbers) if holds(number, value)]
                assert matches(index, f"n{sign}{value}") == expected, (value, sign)


def test_names_with_control_signs_are_found(tmp_path):
    names = ["c\x01trl", "new\nline", "tab\tname", "n\0l", "del\x7fete", "l\u2028s", "a\x1fb", "plain", "c\u0001tr"]
    with filled(tmp_path / "index", [{name: 1, "in": {name: "x"}} for name in names]) as index:
        for i, name in enumerate(names):
            for condition in (f"{name}=1", f"in.{name}=x", f"in.{name}>a"):
                assert matches(index, condition) == [str(i)], condition


def test_a_text_with_a_nul_is_itself_and_has_no_order(tmp_path):
    texts = ["en", "en\0x", "en\0", "en\0y", "en\\u0000x", 'en\0x","en\0x', "\0", "é\n\0😀\\", "x\0"]
    with filled(tmp_path / "index", [*({"t": text} for text in texts), {"t": 1}]) as index:
        for value in texts:
            for sign, holds in SIGNS[:2]:
                for written in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
                    expected = [str(i) for i, text in enumerate(texts) if holds(text, value)]
                    assert matches(index, f"t{sign}{written}") == expected, (value, sign)
        assert matches(index, "t=en\0x") == ["1"]
    for sign in ("<", "<=", ">", ">="):
        with pytest.raises(UsageError, match="holds a NUL has no order"):
            parse_filters([f't{sign}"en\\u0000x"'])
