"""metaembed-bench: what it writes, and one sentence for each mistake."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from metaembed.bench.cli import main
from metaembed.runtime.manifest import Bundle, write_manifest

SMALL = ["--count", "12", "--queries", "4", "2", "2", "--quiet"]


def test_scenes_are_written_as_pages_queries_and_judgements(tmp_path):
    """Every id in the judgements exists, every page opens at the size that the corpus states."""
    folder = tmp_path / "scenes"
    assert main(["scenes", "-o", str(folder), "--split", "test", "--seed", "3", *SMALL]) == 0
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    judged = [line.split("\t") for line in (folder / "qrels.tsv").read_text().splitlines()[1:]]
    assert (len(corpus), len(queries)) == (12, 8)
    for page in corpus:
        with Image.open(folder / page["image"]) as image:
            assert image.size == (page["width"], page["height"])
    assert {query for query, _, _ in judged} == {query["_id"] for query in queries}
    assert {page for _, page, _ in judged} <= {page["_id"] for page in corpus}
    for query in queries:
        assert (query["image"] is None) == (query["kind"] == "text")
        assert query["image"] is None or (folder / query["image"]).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes"]


def test_an_existing_folder_is_replaced_only_when_forced(tmp_path, capsys):
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    assert main(["scenes", "-o", str(folder), *SMALL]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (folder / "mine.txt").exists()
    assert main(["scenes", "-o", str(folder), "-f", *SMALL]) == 0
    assert not (folder / "mine.txt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["scenes", "--count", "0"],
        ["scenes", "--seed", "-1"],
        ["scenes", "--varied", "1.5"],
        ["train", "--groups", "17,64"],
        ["train", "--steps", "0"],
        ["train", "--seed", "-1"],
    ],
)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(tmp_path, capsys, arguments):
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_records_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.jsonl", "cannot be written")):
        assert main(["quality", "no-bundle", "-o", str(output)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_missing_or_broken_checkpoint_is_one_sentence(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert main(["demo-quality", "--model", str(tmp_path), "--seed", "1", "--count", "5"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.safetensors" in error


def test_a_quantised_demo_has_the_checkpoints_quality_beside_it(demo_bundle, tmp_path, capsys):
    """Two copies of the demo said to be quantised, of the demo and of another model; their weights are the checkpoint's own, so
    that ONNX Runtime and PyTorch rank alike."""
    manifest = Bundle.open(demo_bundle).manifest
    command = ["--count", "12", "--queries", "4", "2", "2", "--budget", "8,16", "--quiet"]
    for model, columns in (("demo", 8), ("another", 6)):
        folder = shutil.copytree(demo_bundle, tmp_path / model)
        write_manifest(folder, replace(manifest, model=model, quantization={"type": "int8"}, parity=None))
        assert main(["quality", str(folder), *command]) == 0
        out = capsys.readouterr().out
        assert ("demo, fp32 in PyTorch" in out) is (model == "demo")
        assert len(out.splitlines()[-1].split()) == columns
    assert main(["quality", str(tmp_path / "another"), *command, "--against", "demo"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert (row[1], row[-1]) == (row[-2], "(+0.0000)")
    assert main(["quality", str(demo_bundle), *command, "--against", "nothing"]) == 2
    assert "there is no model 'nothing'" in capsys.readouterr().err
