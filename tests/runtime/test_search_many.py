"""metaembed-search --queries, --hold and --place, with the demo model. Expected: the demo's vectors, one query encoded at a
time, items rounded to bf16 as the index stores them, scored by numpy in float64; TREC's files as pytrec_eval reads them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import pytrec_eval
from PIL import Image

from metaembed.runtime import cli_index, cli_search, gpu_kernel, searcher
from metaembed.runtime.cuda import find_gpu
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.searcher import Searcher

spec = importlib.util.spec_from_file_location("gpu_kernel_tests", Path(__file__).with_name("test_gpu_kernel.py"))
kernel_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_tests)
library = kernel_tests.library  # the kernel's own source, compiled for the CPU

ITEMS = ["red", "a star", "an anchor and a star", "quarterly revenue", "schön", "two cats", "7"]
# Of the fourth and the sixth, the lines' numbers are the ids; BEIR's files say _id and more.
LINES = [
    {"id": "q1", "text": "a red star"},
    {"id": 17, "text": "anchor", "image": "0.png", "note": ["ignored"]},
    {"_id": "beir", "text": "cats", "metadata": {}},
    {"text": "revenue", "title": "of no query", "id": None},
    {"id": "q5", "text": None, "image": "1.png"},
    {"image": "0.png"},
]
IDS = ["q1", "17", "beir", "4", "q5", "6"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two pictures of noise, six queries, and seven texts to index, whose ids are the texts without blanks."""
    folder = tmp_path_factory.mktemp("queries")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (56, 84, 3), np.uint8)).save(folder / f"{i}.png")
    write_lines(folder / "queries.jsonl", LINES)
    items = [{"id": text.replace(" ", "-"), "text": text, "letters": len(text)} for text in ITEMS]
    write_lines(folder / "items.jsonl", items)
    return folder


def write_lines(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def build(bundle, data, folder, *options):
    assert cli_index.main([str(bundle), "--data", str(data), "-o", str(folder), "--quiet", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def index(demo_bundle, data, tmp_path_factory):
    return build(demo_bundle, data / "items.jsonl", tmp_path_factory.mktemp("made") / "index")


@pytest.fixture(scope="module")
def scores(demo_bundle, data):
    """(queries, items), in float64."""
    with Encoder.open(demo_bundle) as encoder:
        queries = [
            encoder.encode_queries([line.get("text")], images=[line.get("image") and data / line["image"]])[0]
            for line in LINES
        ]
        items = encoder.encode_candidates(ITEMS).astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.einsum("qrd,nsd->qnrs", np.array(queries, np.float64), items).max(-1).sum(-1)


def run(*argv, code=0):
    assert cli_search.main([*map(str, argv)]) == code


def refused(capsys, *argv):
    run(*argv, code=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("batch", [4, 64])
def test_each_query_of_a_file_finds_what_scoring_by_hand_finds(
    index, data, scores, tmp_path, capsys, monkeypatch, batch
):
    """Four queries and two, or all six, encoded together."""
    monkeypatch.setattr(searcher, "BATCH", batch)
    run(index, "--queries", data / "queries.jsonl", "-k", 5)
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["query"] for result in results] == IDS
    for result, expected in zip(results, scores, strict=True):
        hits, order = result["hits"], np.argsort(-expected)[:5]
        assert [(hit["rank"], hit["id"]) for hit in hits] == [
            (rank, ITEMS[i].replace(" ", "-")) for rank, i in enumerate(order, start=1)
        ]
        np.testing.assert_allclose([hit["score"] for hit in hits], expected[order], atol=1e-4)
        assert [hit["payload"] for hit in hits] == [{"letters": len(ITEMS[i])} for i in order]
    assert captured.err.startswith("6 queries, 0 unreadable, encoded at ")
    run(index, "--queries", data / "queries.jsonl", "-k", 5, "-o", tmp_path / "hits.jsonl", "--quiet")
    written = (tmp_path / "hits.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["query"] for line in written.splitlines()] == IDS
    if batch == 4:  # the same batches, so the same rounding
        assert written == captured.out
    assert capsys.readouterr() == ("", "")


def test_stages_and_conditions_hold_for_every_query(index, data, scores, capsys):
    run(index, "--queries", data / "queries.jsonl", "--where", "letters>7", "--cascade", "16,64", "-k", 2)
    found = [[hit["id"] for hit in json.loads(line)["hits"]] for line in capsys.readouterr().out.splitlines()]
    long = [i for i, text in enumerate(ITEMS) if len(text) > 7]  # by hand: three of the seven
    assert [ITEMS[i] for i in long] == ["an anchor and a star", "quarterly revenue", "two cats"]
    expected = [sorted(long, key=lambda i, row=row: -row[i])[:2] for row in scores]
    assert found == [[ITEMS[i].replace(" ", "-") for i in best] for best in expected]


def test_a_trec_run_is_what_pytrec_eval_reads(index, data, scores, tmp_path):
    """Judged by pytrec_eval: to one query the best item is relevant, to the others the third best."""
    run(index, "--queries", data / "queries.jsonl", "--trec", "-k", 4, "-o", tmp_path / "run.trec")
    with (tmp_path / "run.trec").open(encoding="utf-8") as file:
        judged = pytrec_eval.parse_run(file)
    order = np.argsort(-scores)
    for id_, row, best in zip(IDS, scores, order, strict=True):
        assert judged[id_] == pytest.approx({ITEMS[i].replace(" ", "-"): row[i] for i in best[:4]}, abs=1e-4)
    places = dict.fromkeys(IDS, 2) | {"beir": 0}
    relevant = {id_: {ITEMS[best[places[id_]]].replace(" ", "-"): 1} for id_, best in zip(IDS, order, strict=True)}
    measured = pytrec_eval.RelevanceEvaluator(relevant, {"recip_rank"}).evaluate(judged)
    assert {id_: found["recip_rank"] for id_, found in measured.items()} == pytest.approx(
        {id_: 1 / (place + 1) for id_, place in places.items()}
    )
    columns = [line.split(" ") for line in (tmp_path / "run.trec").read_text(encoding="utf-8").splitlines()]
    assert [(line[0], line[1], line[3], line[5]) for line in columns] == [
        (id_, "Q0", str(rank), "metaembed") for id_ in IDS for rank in (1, 2, 3, 4)
    ]
    digits = np.array([line[4] for line in columns], np.float32)  # nothing of a score is lost in the file
    run(index, "--queries", data / "queries.jsonl", "-k", 4, "-o", tmp_path / "hits.jsonl")
    lines = map(json.loads, (tmp_path / "hits.jsonl").read_text(encoding="utf-8").splitlines())
    np.testing.assert_array_equal(digits, np.float32([hit["score"] for line in lines for hit in line["hits"]]))


def test_ids_that_trec_cannot_quote_are_refused_and_nothing_is_written(demo_bundle, index, data, tmp_path, capsys):
    """Of a query before anything is encoded, of an item when it is found: the old file stays."""
    old = tmp_path / "run.trec"
    old.write_text("old")
    write_lines(tmp_path / "queries.jsonl", [{"id": "a", "text": "b"}, {"id": "two words", "text": "b"}])
    asked = ("--queries", tmp_path / "queries.jsonl", "--trec")
    assert "'two words' cannot stand in a TREC run file" in refused(capsys, index, *asked)
    write_lines(tmp_path / "items.jsonl", [{"id": "no\u00a0break", "text": "a"}])
    spaced = build(demo_bundle, tmp_path / "items.jsonl", tmp_path / "spaced")
    asked = ("--queries", data / "queries.jsonl", "--trec", "-o", old)
    assert "'no\\xa0break' cannot stand" in refused(capsys, spaced, *asked)
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "queries.jsonl", "run.trec", "spaced"]


def test_queries_that_cannot_be_read_are_named_and_left_out(index, data, scores, tmp_path, capsys, caplog):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = [{"id": "none", "image": "none.png"}, {"id": "bad", "image": "bad.png"}, {"id": "blank", "text": " "}]
    write_lines(tmp_path / "queries.jsonl", [bad[0], LINES[0], *bad[1:], LINES[2]])
    run(index, "--queries", tmp_path / "queries.jsonl", code=1)
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["query"] for result in results] == ["q1", "beir"]
    for result, row in zip(results, scores[[0, 2]], strict=True):
        assert [hit["id"] for hit in result["hits"]] == [ITEMS[i].replace(" ", "-") for i in np.argsort(-row)]
    assert all(f"query {line['id']} is left out" in caplog.text for line in bad)
    assert captured.err.startswith("2 queries, 3 unreadable, encoded at ")
    write_lines(tmp_path / "queries.jsonl", bad)
    run(index, "--queries", tmp_path / "queries.jsonl", code=1)
    assert capsys.readouterr().err.startswith("no query could be read of 3")


def test_mistakes_get_one_sentence_before_anything_is_encoded(demo_bundle, index, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Encoder, "encode_queries", lambda *_, **__: pytest.fail("it encoded"))
    queries = data / "queries.jsonl"
    for argv, sentence in [
        ((index, "text", "--queries", queries), "not both"),
        ((index, "--image", "a.png", "--queries", queries), "not both"),
        ((index, "text", "--trec"), "--trec and -o write the results of --queries"),
        ((index, "text", "-o", tmp_path / "hits"), "--trec and -o write the results of --queries"),
        ((index, "--queries", queries, "--trec", "--json"), "not both"),
        ((index, "--queries", tmp_path / "none"), "none is no file"),
        ((index, "--queries", tmp_path), "is no file; --queries takes a JSONL file"),
        ((index, "--queries", queries, "-o", tmp_path), "is no file to write results to"),
        ((index, "--queries", queries, "-o", tmp_path / "none" / "hits"), "none is no folder"),
        ((index, "--queries", queries, "-o", queries), "holds the queries"),
        ((index, "--queries", queries, "-k", 0), "the best 0"),
        ((index, "--queries", queries, "--budget", "17,1"), "asks for 17 query Meta Tokens"),
        ((index, "--queries", queries, "--where", "letters"), "letters"),
        ((index, "--queries", queries, "--approximate"), "is 1,1, not"),
        ((index, "--queries", queries, "--hold", 65), "this index stores 64"),
        ((index, "--queries", queries, "--place", 1), "everything is scanned at 16,64; place 64, or begin"),
        ((index, "text", "--place", 1), "everything is scanned at 16,64"),
        ((index, "text", "--place", 1, "--cascade", "1,1:10", "4,8", "--approximate"), "place nothing on the GPU"),
        ((demo_bundle, "--queries", queries, "--images", data), "--queries, --cascade, --approximate"),
        ((demo_bundle, "text", "--images", data, "--hold", 1), "belong to an index"),
    ]:
        assert sentence in refused(capsys, *argv)
    for number in ("0", "-1", "some"):
        with pytest.raises(SystemExit) as ended:
            run(index, "text", "--hold", number)
        assert ended.value.code == 2
        assert "invalid number of vectors" in capsys.readouterr().err
    for lines, sentence in [
        ([{"id": "a"}], "neither a text nor an image"),
        ([{"id": 2, "text": "a"}, {"text": "b"}], "the id '2' twice"),
        ([], "is empty"),
    ]:
        write_lines(tmp_path / "queries.jsonl", lines)
        assert sentence in refused(capsys, index, "--queries", tmp_path / "queries.jsonl")


@pytest.mark.skipif(find_gpu() is not None, reason="needs a machine without a GPU")
def test_placing_without_a_gpu_is_one_sentence_before_anything_is_encoded(index, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Encoder, "encode_queries", lambda *_, **__: pytest.fail("it encoded"))
    asked = (index, "--queries", data / "queries.jsonl", "--place", 64, "-o", tmp_path / "hits.jsonl")
    assert "only a GPU keeps them" in refused(capsys, *asked)
    assert list(tmp_path.iterdir()) == []


def test_the_first_stage_scans_what_was_placed_on_the_gpu(library, narrow_demo, data, tmp_path, capsys, monkeypatch):
    """A bf16 bundle's kernel, its own source run on the CPU: the scores of the CPU's search but for queries rounded to bf16."""
    folder = build(narrow_demo("bf16"), data / "items.jsonl", tmp_path / "index")
    asked = (folder, "--queries", data / "queries.jsonl", "--budget", "4,8", "-k", 7)
    run(*asked, "-o", tmp_path / "cpu.jsonl")
    gpu, left = kernel_tests.EmulatedGpu(library), []
    gpu.unload_module = lambda module: left.append(len(gpu.memory))
    monkeypatch.setattr(gpu_kernel, "find_gpu", lambda: gpu)
    capsys.readouterr()
    run(*asked, "-o", tmp_path / "gpu.jsonl", "--place", 8)
    # 7 items of 8 vectors of 128 numbers of 2 bytes: 14,336 bytes
    assert "first 8 vectors on the GPU (0.000 GiB, MaxSim kernel (emulated))" in capsys.readouterr().err
    assert len(gpu.launched) == 6, "one for each query over the one segment"
    run(folder, "a red star", "--place", 8, "--cascade", "4,8:5", "8,16", "-k", 5)
    assert len(gpu.launched) == 7
    assert left == [0, 0], "everything placed was freed before its scorer ended"
    results = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("cpu", "gpu")
    ]
    for cpu, gpu in zip(*results, strict=True):
        mine, wanted = ({hit["id"]: hit["score"] for hit in result["hits"]} for result in (gpu, cpu))
        assert mine == pytest.approx(wanted, abs=4 * 2**-8)  # a product of unit vectors, one of them rounded to 8 bits
        assert mine != wanted


def test_held_vectors_answer_without_their_file(index, data, scores, tmp_path):
    """The bytes of all vectors are overwritten in place after they were copied into memory."""
    folder = shutil.copytree(index, tmp_path / "index")
    with Searcher(folder, hold=64, k=7) as opened:
        (path,) = (folder / "segments").iterdir()
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        hits = opened.search(LINES[0]["text"], None)
    order = np.argsort(-scores[0])
    assert [hit.id for hit in hits] == [ITEMS[i].replace(" ", "-") for i in order]
    np.testing.assert_allclose([hit.score for hit in hits], scores[0][order], atol=1e-4)


def test_results_are_utf8_where_the_terminal_knows_ascii_only(index, data):
    """An escape would be another id to trec_eval."""
    code = "from metaembed.runtime.cli_search import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, index, "--queries", data / "queries.jsonl", "--quiet"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for more in ([], ["--trec"]):
        ended = subprocess.run([*command, *more], env=environment, capture_output=True, check=True)
        assert ended.stdout.decode("utf-8").count("schön") == 6
