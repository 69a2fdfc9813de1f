"""Data sets in every documented shape; expected values are what was written to disk by hand."""

from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from metaembed.bench.dataset import demo_dataset, load_dataset
from metaembed.runtime.errors import UsageError
from metaembed.runtime.items import read_data


def _write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _page(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 40)).save(path)


@pytest.fixture
def beir(tmp_path):
    """As BEIR's archives unpack: a header in the judgements, ids that are strings, a query without judgements."""
    folder = tmp_path / "tiny"
    _write(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "A", "text": "b\u2028c"},
        {"_id": "d2", "title": "", "text": "d"},
    )
    _write(folder / "queries.jsonl", {"_id": "q1", "text": "x"}, {"_id": "q2", "text": "y"}, {"_id": "q3", "text": "z"})
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td1\t1\nq2\td1\t0\nq3\td1\t1\n"
    )
    return folder


def test_beir_folder_as_it_is(beir):
    dataset = load_dataset(beir)
    assert [item.text for item in dataset.candidates] == ["A b\u2028c", "d"]
    assert [query.id for query in dataset.queries] == ["q1", "q3"]
    assert dataset.relevant == ({1: 2.0, 0: 1.0}, {0: 1.0})
    assert dataset.unjudged == 1


def test_names_with_spaces_and_byte_order_marks(tmp_path):
    """``space.png`` is another page: a judgement of ``with space.png`` is not one of it."""
    for name in ("with space.png", "space.png"):
        _page(tmp_path / name)
    _write(tmp_path / "queries.jsonl", {"_id": "1", "text": "x"})
    path = tmp_path / "queries.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "qrels.tsv").write_text("1\twith space.png\t1\r\n", encoding="utf-8-sig")
    dataset = load_dataset(tmp_path)
    assert [dataset.candidates[place].id for place in dataset.relevant[0]] == ["with space.png"]


@pytest.mark.parametrize("name", ["qrels.tsv", "queries.jsonl"])
def test_files_that_are_not_utf_8(tmp_path, name):
    _page(tmp_path / "a.png")
    _write(tmp_path / "queries.jsonl", {"_id": "1", "text": "x"})
    (tmp_path / "qrels.tsv").write_text("1\ta.png\t1\n")
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=f"{name} is not text in UTF-8"):
        load_dataset(tmp_path)


def test_images_and_queries_without_a_corpus(tmp_path):
    """Judgements name a page by its stem or its path."""
    for name in ("pages/p1.png", "pages/p2.png", "asked/q.png"):
        _page(tmp_path / name)
    _write(tmp_path / "queries.jsonl", {"_id": "1", "text": "x"}, {"_id": "2", "text": None, "image": "asked/q.png"})
    (tmp_path / "qrels.tsv").write_text("1\t0\tp2\t1\n2\t0\tpages/p1.png\t1\n")  # trec_eval's four columns, no header
    dataset = load_dataset(tmp_path)
    assert [item.id for item in dataset.candidates] == ["pages/p1.png", "pages/p2.png"]
    assert dataset.relevant == ({1: 1.0}, {0: 1.0})


def test_imagefolder_with_metadata(tmp_path):
    """Two rows may share a page or a query; a row without a query is a distractor."""
    for name in ("a.png", "b.png", "c.png"):
        _page(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,query\na.png,first\na.png,second\nb.png,first\nc.png,\n")
    dataset = load_dataset(tmp_path)
    assert [item.id for item in dataset.candidates] == ["a.png", "b.png", "c.png"]
    assert [query.text for query in dataset.queries] == ["first", "second"]
    assert dataset.relevant == ({0: 1.0, 1: 1.0}, {0: 1.0})


def test_candidates_of_nothing_are_left_out_and_counted(beir, caplog):
    """A judgement of 0 about one says nothing, and a header may name the grade as others do: the same judgements as before."""
    with (beir / "corpus.jsonl").open("a") as corpus:
        corpus.write('\n{"_id": "nothing", "title": "", "text": ""}\n{"_id": "blank", "text": " \\n"}\n')
    with caplog.at_level(logging.WARNING, "metaembed"):  # other tests make commands quiet
        before = load_dataset(beir)
    assert not {"nothing", "blank"} & {item.id for item in before.candidates}
    assert "left out: 2, 'blank' first" in caplog.text
    lines = ["query\tdoc\tRelevance", "q1\td2\t2", "q1\td1\t1", "q3\td1\t1", "q1\tnothing\t0"]
    (beir / "qrels/test.tsv").write_text("\n".join(lines))
    assert load_dataset(beir).relevant == before.relevant


def test_metadata_that_holds_no_plain_queries(tmp_path):
    _page(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,query\na.png,{'x' * 200_000}\n")
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    _write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "query": ["one", "two"]})
    with pytest.raises(UsageError, match="a row for each query"):
        load_dataset(tmp_path)


def test_the_demo_set_is_read_from_disk_like_any_other():
    with demo_dataset(7, (2, 1, 1), seed=5) as dataset:
        assert len(dataset.candidates) == 7
        assert len(dataset.queries) == 4
        assert all(item.image.is_file() for item in dataset.candidates)
        assert [query.image is not None for query in dataset.queries] == [False, False, True, True]


def test_images_may_be_links_as_in_a_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    _page(tmp_path / "blobs/abc.png")
    folder = tmp_path / "snapshot"
    (folder / "pages").mkdir(parents=True)
    (folder / "pages/1.png").symlink_to("../../blobs/abc.png")
    _write(folder / "corpus.jsonl", {"_id": "d", "image": "pages/1.png"})
    _write(folder / "queries.jsonl", {"_id": "q", "text": "x"})
    (folder / "qrels.tsv").write_text("q\td\t1\n")
    assert load_dataset(folder).candidates[0].image == folder / "pages/1.png"


def test_an_index_holds_what_quality_is_measured_on(beir):
    """Found in review: the index left BEIR's titles out. Expected: text for text what the data set says."""
    indexed = read_data(beir / "corpus.jsonl")
    assert [(item.id, item.text) for item in indexed] == [
        (item.id, item.text) for item in load_dataset(beir).candidates
    ]
    assert indexed[0].payload == {"title": "A"}


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("qrels/test.tsv", "q1\td9\t1\n", "d9"),
        ("qrels/test.tsv", "q1 d1\n", "columns"),
        ("qrels/test.tsv", "q1\td1\tmuch\n", "much"),
        ("qrels/test.tsv", "q1\td1\tinf\n", "no grade"),
        ("qrels/test.tsv", "q1\td1\tnan\n", "no grade"),
        ("qrels/test.tsv", "q1\td1\t0\n", "no query has a relevant candidate"),
        ("queries.jsonl", "{", "line 1 is not JSON"),
        ("queries.jsonl", "[]", "not an object"),
        ("corpus.jsonl", '{"_id": "d1"}\n', "neither text nor image"),
        ("corpus.jsonl", '{"_id": "d1", "image": "../x.png"}\n', "not in the folder"),
        ("corpus.jsonl", '{"_id": "d1", "image": "/x.png"}\n', "not in the folder"),
        ("corpus.jsonl", '{"_id": "d1", "text": ["a"]}\n', "are strings"),
        ("corpus.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("corpus.jsonl", '{"text": "a"}\n', "no _id"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "a"}\n', "unique, and 'd1' occurs 2 times"),
        ("corpus.jsonl", '{"_id": "d1", "text": " "}\n', "neither text nor image, but a judgement"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', "neither text nor image"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t2\n", "judged twice"),
    ],
)
def test_a_damaged_data_set_is_named_in_one_sentence(beir, file, text, says):
    (beir / file).write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        load_dataset(beir)
    assert "\n" not in str(caught.value)


def test_a_folder_of_no_known_shape_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no data set"):
        load_dataset(tmp_path)
    _write(tmp_path / "corpus.jsonl", {"_id": "1", "text": "a"})
    _write(tmp_path / "queries.jsonl", {"_id": "1", "text": "a"})
    with pytest.raises(UsageError, match="no relevance judgements"):
        load_dataset(tmp_path)
