"""Single bits flipped all over a small catalogue: a right answer or one sentence, never a wrong answer, and no segment lost.

What is right is what the sound index answers, and for writing a dictionary of what is in it.
"""

import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.index import SEGMENTS, Index
from metaembed.runtime.index_catalogue import CATALOGUE
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_writer import IndexWriter

R, D, COUNT = 2, 8, 280
FULL = [Stage(Budget(2, R))]
QUERY = np.random.default_rng(9).standard_normal((2, D)).astype(np.float32)
HEADER = 12  # of a page, in bytes: its kind, its number of cells, where they are, the page behind the last
SHARES = 4  # of the flips, so that processes can share them


def vectors(items):
    return np.random.default_rng(items).standard_normal((items, R, D)).astype(np.float32)


def payload(i):
    return None if i % 9 == 0 else {"year": i % 7, "text": "x" * (9000 if i == 102 else i % 60)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An index with pages of every kind: leaves and inner pages of both trees, overflowing payloads, free pages, dead rows."""
    folder = tmp_path_factory.mktemp("flips") / "index"
    Index.create(folder, Layout(D, (1, R)), fingerprint="f" * 64, bundle="/a/bundle")
    with IndexWriter(folder) as writer:
        writer.add([f"gone{i}" for i in range(150)], vectors(150))
        writer.delete([f"gone{i}" for i in range(150)])
        writer.compact()
        for start in range(0, COUNT, 70):
            rows = range(start, start + 70)
            writer.add([f"d{i}" for i in rows], vectors(COUNT)[start : start + 70], [payload(i) for i in rows])
        writer.delete([f"d{i}" for i in range(0, COUNT, 10)])
    return folder


def flipped(folder, page, byte, bit, target):
    """A copy of an index, its segments by hard links, with one bit of a page (from 0) of its catalogue flipped."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, copy_function=os.link)
    content = bytearray((folder / CATALOGUE).read_bytes())
    content[page * page_size(folder) + byte] ^= 1 << bit
    (target / CATALOGUE).unlink()
    (target / CATALOGUE).write_bytes(content)
    return target


def page_size(folder):
    return int.from_bytes((folder / CATALOGUE).read_bytes()[16:18], "big")


def answers(folder, **options):
    with Index.open(folder, **options) as index:
        found = [index.search(QUERY, 400, cascade=FULL, where=where) for where in ((), ["year=3"])]
    return [[(hit.id, hit.score, hit.payload) for hit in hits] for hits in found]


def one_sentence(error):
    assert len(str(error).splitlines()) == 1
    return True


def names(folder):
    return {path.name for path in (folder / SEGMENTS).iterdir()}


def check_reading(folder, right):
    try:
        assert answers(folder) == right
    except MetaEmbedError as error:
        assert one_sentence(error)
    try:
        for found, whole in zip(answers(folder, skip_damaged=True), right, strict=True):
            left = {id_ for id_, _, _ in found}
            assert found == [hit for hit in whole if hit[0] in left]
    except MetaEmbedError as error:
        assert one_sentence(error)


def check_writing(folder, right):
    before, alive = names(folder), {id_ for id_, _, _ in right[0]}
    try:
        with IndexWriter(folder) as writer:
            assert writer.known([f"d{i}" for i in range(COUNT + 5)]) == alive
            assert writer.delete(["d1", "d101", "nobody"]) == 2
            writer.add(["d1", "new"], vectors(2), [None, {"year": 3}])
        found = answers(folder)
        assert [hit for hit in found[0] if hit[0] not in ("d1", "new")] == [
            hit for hit in right[0] if hit[0] not in ("d1", "d101")
        ]
        assert sorted(hit[0] for hit in found[1]) == sorted({hit[0] for hit in right[1]} - {"d1", "d101"} | {"new"})
    except MetaEmbedError as error:
        assert one_sentence(error)
    assert before <= names(folder)


def places(folder):
    """(page, byte, bit) to flip: of every page some in its header and some elsewhere; of the first, the file's header too."""
    rng = np.random.default_rng(0)
    size = page_size(folder)
    for page in range((folder / CATALOGUE).stat().st_size // size):
        headers = [*rng.integers(0, HEADER, 12), *([*rng.integers(0, 112, 40)] if page == 0 else [])]
        for byte in [*headers, *rng.integers(HEADER, size, 24)]:
            yield page, int(byte), int(rng.integers(8))


@pytest.mark.parametrize("share", range(SHARES))
def test_a_bit_flipped_anywhere_in_a_catalogue_is_harmless_or_named(sound, tmp_path, share, caplog):
    right = answers(sound)
    assert len(right[0]) == 252
    for page, byte, bit in list(places(sound))[share::SHARES]:
        caplog.clear()
        folder = flipped(sound, page, byte, bit, tmp_path / "index")
        check_reading(folder, right)
        check_writing(folder, right)


@pytest.mark.parametrize("segments", [3, 4, 5])
def test_no_bit_at_the_beginning_of_the_table_of_segments_hides_one(tmp_path, segments):
    """Found by an audit: the count of 4 cells became 0, a search found nothing, and the next writer removed every segment."""
    folder = tmp_path / "index"
    Index.create(folder, Layout(D, (1, R)))
    with IndexWriter(folder) as writer:
        for i in range(segments):
            writer.add([f"{i}-{j}" for j in range(5)], vectors(5))
    right = answers(folder)
    connection = sqlite3.connect(folder / CATALOGUE)
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'segments'").fetchall()
    connection.close()
    for byte in range(24):
        for bit in range(8):
            damaged = flipped(folder, root - 1, byte, bit, tmp_path / "damaged")
            try:
                assert answers(damaged) == right
            except MetaEmbedError as error:
                assert one_sentence(error)
            if byte == 4:  # low bits of the number of cells
                with pytest.raises(MetaEmbedError):
                    IndexWriter(Path(damaged))
            assert names(damaged) == names(folder)
