"""metaembed-index and metaembed-search with the demo model, against encoding and scoring by hand."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from metaembed.runtime import cli_index, cli_search
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.items import read_data
from metaembed.runtime.maxsim import maxsim_reference
from metaembed.runtime.search import find_images

TEXTS = ["a red star", "a blue anchor", "a green umbrella and a red star"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pictures of noise and three texts; one item has both."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append({"_id": f"image{i}", "image": f"{i}.png", "number": i})
    lines += [{"id": f"text{i}", "text": text} for i, text in enumerate(TEXTS)]
    lines.append({"id": 7, "text": TEXTS[0], "image": "1.png", "number": 7})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def index(demo_bundle, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "index"
    assert cli_index.main([str(demo_bundle), "--data", str(data / "data.jsonl"), "-o", str(folder), "--quiet"]) == 0
    return folder


def searched(capsys, *argv):
    capsys.readouterr()
    assert cli_search.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, main, *argv, code=2):
    assert main([*map(str, argv)]) == code
    return capsys.readouterr().err


def test_search_equals_encoding_and_scoring_by_hand(demo_bundle, data, index, capsys):
    hits = searched(capsys, index, "a red star", "--image", data / "2.png", "-k", 8)
    with Encoder.open(demo_bundle) as encoder:
        query = encoder.encode_queries(["a red star"], images=[data / "2.png"])
        images = [data / f"{i}.png" for i in range(4)]
        candidates = encoder.encode_candidates(
            [None] * 4 + TEXTS + TEXTS[:1], images=[*images, None, None, None, images[1]]
        )
    scores = maxsim_reference(query, [candidates])[0]
    ids = [f"image{i}" for i in range(4)] + [f"text{i}" for i in range(3)] + ["7"]
    assert [hit["id"] for hit in hits] == [ids[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(scores)[::-1], atol=0.05)  # bf16 storage
    assert {hit["id"]: hit.get("payload") for hit in hits}["image2"] == {"number": 2}
    assert "payload" not in next(hit for hit in hits if hit["id"] == "text0")


def test_budget_cascade_and_filter_from_the_command_line(index, capsys):
    small = searched(capsys, index, "a red star", "--budget", "1,1", "-k", 3)
    cascade = searched(capsys, index, "a red star", "-k", 3, "--cascade", "1,1:3", "16,64")
    assert {hit["id"] for hit in small} == {hit["id"] for hit in cascade}
    found = searched(capsys, index, "a red star", "--where", "number>=1", "number!=7")
    assert {hit["id"] for hit in found} == {"image1", "image2", "image3"}


def test_an_approximate_first_stage_from_the_command_line(index, data, tmp_path, capsys):
    """Eight items are too few to walk a graph for, so the answers are the exact ones."""
    folder = shutil.copytree(index, tmp_path / "index")
    command = (folder, "a red star", "--cascade", "1,1:5", "16,64", "-k", 3)
    assert f"metaembed-index ann {folder}" in refused(capsys, cli_search.main, *command, "--approximate")
    assert cli_index.main(["ann", str(folder), "--quiet"]) == 0
    assert searched(capsys, *command, "--approximate") == searched(capsys, *command)
    assert cli_search.main([*map(str, command), "--approximate"]) == 0
    assert "cascade 1,1:5 16,64, approximate first stage" in capsys.readouterr().out
    assert "is 1,1, not" in refused(capsys, cli_search.main, *command[:2], "--approximate")
    assert "belong to an index" in refused(
        capsys, cli_search.main, tmp_path, "a red star", "--images", data, "--approximate"
    )


def test_a_folder_of_images_is_ranked_like_its_index(demo_bundle, data, tmp_path, capsys):
    assert cli_index.main([str(demo_bundle), "--data", str(data), "-o", str(tmp_path / "i"), "--quiet"]) == 0
    indexed = searched(capsys, tmp_path / "i", "a blue anchor")
    ranked = searched(capsys, demo_bundle, "a blue anchor", "--images", data)
    assert [hit["id"] for hit in indexed] == [os.path.relpath(hit["id"], data) for hit in ranked]


def test_resume_adds_what_is_new_and_update_replaces(demo_bundle, data, tmp_path, capsys):
    folder, lines = tmp_path / "index", tmp_path / "lines.jsonl"
    lines.write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    command = [str(demo_bundle), "--data", str(lines), "-o", str(folder), "--budget", "4"]
    assert cli_index.main(command) == 0
    assert "2 items added" in capsys.readouterr().out
    assert "exists; give --resume" in refused(capsys, cli_index.main, *command)
    lines.write_text('{"id": "b", "text": "other"}\n{"id": "c", "text": "three"}\n')
    assert cli_index.main([*command, "--resume"]) == 0
    assert "1 item added" in capsys.readouterr().out
    before = searched(capsys, folder, "other")
    assert cli_index.main([*command, "--update"]) == 0
    after = searched(capsys, folder, "other")
    assert sorted(hit["id"] for hit in after) == ["a", "b", "c"]
    scores = [{hit["id"]: hit["score"] for hit in hits} for hits in (before, after)]
    assert scores[0]["a"] == scores[1]["a"]
    assert scores[0]["b"] != scores[1]["b"]
    assert "stores 4 vectors per item, not 8" in refused(
        capsys, cli_index.main, *command[:5], "--resume", "--budget", 8
    )


def test_a_disk_too_full_to_merge_on_is_no_failure(demo_bundle, data, tmp_path, monkeypatch, capsys, caplog):
    """All items are durable by then; merging needs room for some of them twice."""

    def full(_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("metaembed.runtime.index_writer.IndexWriter.tidy", full)
    assert cli_index.main([str(demo_bundle), "--data", str(data), "-o", str(tmp_path / "index")]) == 0
    assert "all is stored, but not merged" in caplog.text
    assert "4 items added" in capsys.readouterr().out


def test_a_data_set_given_as_a_folder_of_images_is_pointed_out(data, tmp_path, caplog):
    """Its pictures of queries would be indexed too."""
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "data.jsonl").rename(folder / "corpus.jsonl")
    assert len(read_data(folder)) == 4
    assert f"give --data {folder / 'corpus.jsonl'}" in caplog.text


def test_a_bundle_that_moved_is_asked_for(demo_bundle, data, tmp_path, capsys):
    moved = shutil.copytree(demo_bundle, tmp_path / "bundle")
    assert cli_index.main([str(moved), "--data", str(data), "-o", str(tmp_path / "index"), "--quiet"]) == 0
    moved.rename(tmp_path / "elsewhere")
    assert "say where by --bundle" in refused(capsys, cli_search.main, tmp_path / "index", "a red star")
    assert len(searched(capsys, tmp_path / "index", "a red star", "--bundle", tmp_path / "elsewhere")) == 4


@pytest.mark.parametrize(("flag", "added"), [("--resume", 0), ("--resume", 1), ("--update", 4)])
def test_the_place_of_a_bundle_that_moved_is_kept_by_the_next_run(demo_bundle, data, tmp_path, capsys, flag, added):
    """Whether or not it has anything to add; then a plain search finds the model again."""
    moved = shutil.copytree(demo_bundle, tmp_path / "bundle")
    pages = shutil.copytree(data, tmp_path / "pages")
    command = ["--data", str(pages), "-o", str(tmp_path / "index")]
    assert cli_index.main([str(moved), *command, "--quiet"]) == 0
    moved.rename(tmp_path / "elsewhere")
    if added == 1:
        shutil.copy(pages / "0.png", pages / "new.png")
    capsys.readouterr()
    assert cli_index.main([str(tmp_path / "elsewhere"), *command, flag]) == 0
    assert f"{added} item" in capsys.readouterr().out
    assert len(searched(capsys, tmp_path / "index", "a red star")) == (5 if added == 1 else 4)
    with Index.open(tmp_path / "index") as index:
        assert (index.bundle, index.verify()) == (str(tmp_path / "elsewhere"), [])


def test_a_bundle_that_is_refused_is_not_kept(demo_bundle, data, tmp_path, capsys):
    """Another model's, and one that an option contradicts."""
    moved = shutil.copytree(demo_bundle, tmp_path / "bundle")
    with Index.open(_indexed(demo_bundle, data, tmp_path / "index")) as index:
        refused(capsys, cli_index.main, moved, "--data", data, "-o", tmp_path / "index", "--resume", "--budget", 3)
        Index.create(tmp_path / "other", index.layout, fingerprint="another", bundle=index.bundle)
        assert Index.open(tmp_path / "index").bundle == str(demo_bundle)
    refused(capsys, cli_index.main, moved, "--data", data, "-o", tmp_path / "other", "--resume")
    assert Index.open(tmp_path / "other").bundle == str(demo_bundle)


def test_an_index_that_names_no_bundle_is_not_said_to_have_lost_it(demo_bundle, index, tmp_path, capsys):
    """Indexes made by the API; the sentence was "was made with ., which is no longer there"."""
    with Index.open(index) as made:
        layout, fingerprint = made.layout, made.fingerprint
    Index.create(tmp_path / "nameless", layout, fingerprint=fingerprint)
    Index.create(tmp_path / "unknown", layout)
    search = (cli_search.main, tmp_path / "nameless", "a")
    assert refused(capsys, *search) == (f"metaembed-search: {tmp_path}/nameless does not name the bundle that it was made "
                                        "with; say where by --bundle DIR\n")  # fmt: skip
    assert searched(capsys, tmp_path / "nameless", "a", "--bundle", demo_bundle) == []
    assert "does not say which model" in refused(
        capsys, cli_search.main, tmp_path / "unknown", "a", "--bundle", demo_bundle
    )


def test_one_item_is_not_called_items(demo_bundle, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"id": "a", "text": "b"}')
    assert cli_search.main([str(_indexed(demo_bundle, tmp_path / "data.jsonl", tmp_path / "index")), "b"]) == 0
    assert "\n1 item, default cascade" in capsys.readouterr().out


def _indexed(bundle, data, folder):
    assert cli_index.main([str(bundle), "--data", str(data), "-o", str(folder), "--quiet"]) == 0
    return folder


def test_an_id_cannot_pass_for_output(demo_bundle, tmp_path, capsys):
    """An id with a line break and a terminal's colour code is one line of visible signs; --json gives it as it is."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "a\n   1    9.9\x1b[31m日", "text": "b"}))
    assert (
        cli_index.main([str(demo_bundle), "--data", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "index")]) == 0
    )
    capsys.readouterr()
    assert cli_search.main([str(tmp_path / "index"), "b", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("  a\\n   1    9.9\\x1b[31m日")
    assert searched(capsys, tmp_path / "index", "b")[0]["id"] == "a\n   1    9.9\x1b[31m日"


def test_info_verify_delete_compact(demo_bundle, index, tmp_path, capsys):
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    assert cli_index.main(["info", str(folder)]) == 0
    assert "8 items in 1 segment, 0 deleted" in capsys.readouterr().out
    assert "'nobody' is not in" in refused(capsys, cli_index.main, "delete", folder, "image0", "nobody", code=1)
    assert cli_index.main(["compact", str(folder)]) == 0
    assert cli_index.main(["verify", str(folder)]) == 0
    assert "sound: 7 items" in capsys.readouterr().out
    (segment,) = (folder / "segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    assert cli_index.main(["verify", str(folder)]) == 1
    assert segment.name in capsys.readouterr().out


def damage_item(folder, row):
    """Change a bit of an item's first vector in the only segment, which has 64 vectors of 128 dims in bf16."""
    (path,) = (folder / "segments").iterdir()
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + row * 128 * 2] ^= 1
    path.write_bytes(content)


def test_repair_says_what_it_would_drop_drops_it_and_resuming_encodes_it_again(
    demo_bundle, data, index, tmp_path, capsys
):
    """The first and the last item of the fixture, `image0` and `7`; the answers are those of the sound index."""
    folder = shutil.copytree(index, tmp_path / "an index")
    question = (index, "a red star", "-k", 8)
    right = searched(capsys, *question)
    for row in (0, 7):
        damage_item(folder, row)
    (segment,) = (folder / "segments").iterdir()
    before = segment.read_bytes(), (folder / "catalogue.sqlite").read_bytes()
    assert cli_index.main(["verify", str(folder)]) == 1
    damage = f"{segment} is damaged in row 0 and 1 others; restore it, or index its items again"
    assert capsys.readouterr().out.splitlines() == [
        damage,
        f"metaembed-index repair '{folder}' says what can be mended",
    ]
    assert cli_index.main(["repair", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        damage,
        "2 items would be dropped: image0, 7",
        f"nothing was changed; metaembed-index repair '{folder}' --drop drops what is damaged and keeps 6 items",
    ]
    assert (segment.read_bytes(), (folder / "catalogue.sqlite").read_bytes()) == before
    assert cli_index.main(["repair", str(folder), "--drop"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        damage,
        "2 items dropped: image0, 7",
        "repaired: 6 items",
        f"metaembed-index BUNDLE --data DATA -o '{folder}' --resume encodes what was dropped again",
    ]
    assert searched(capsys, folder, *question[1:]) == [
        {**hit, "rank": rank} for rank, hit in enumerate((hit for hit in right if hit["id"] not in ("image0", "7")), 1)
    ]
    assert cli_index.main(["repair", str(folder)]) == 0
    assert capsys.readouterr().out == "sound, nothing to repair: 6 items\n"
    command = [str(demo_bundle), "--data", str(data / "data.jsonl"), "-o", str(folder), "--resume"]
    assert cli_index.main(command) == 0
    assert "2 items added" in capsys.readouterr().out
    again = searched(capsys, folder, *question[1:])
    assert [hit["id"] for hit in again] == [hit["id"] for hit in right]
    np.testing.assert_allclose([hit["score"] for hit in again], [hit["score"] for hit in right], atol=0.05)


def test_a_repair_as_json_names_all_that_is_dropped(index, tmp_path, capsys):
    """And the text the first twenty; an index of 30 items, each stored with the same vectors, all of them lost."""
    folder = tmp_path / "index"
    with Index.open(index) as made:
        Index.create(folder, made.layout)
    ids = ["\x1b[31m", *(f"a{i}" for i in range(29))]
    with Index.open(folder).writer() as writer:
        writer.add(ids, np.ones((30, 64, 128), np.float32))
    (segment,) = (folder / "segments").iterdir()
    segment.unlink()
    assert cli_index.main(["repair", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "done": False, "damages": [f"{segment} is missing; restore it, or index its items again"], "dropped": ids,
        "unnamed": 0, "older": [], "items": 0, "graph_dropped": False,
    }  # fmt: skip
    assert cli_index.main(["repair", str(folder)]) == 1
    assert f"30 items would be dropped: \\x1b[31m, {', '.join(ids[1:20])}, ...\n" in capsys.readouterr().out
    assert cli_index.main(["repair", str(folder), "--drop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**said, "done": True}
    assert "no index" in refused(capsys, cli_index.main, "repair", tmp_path)


def test_what_is_in_an_index_as_json(index, capsys):
    """Expected by hand: what the fixture wrote; the largest budget is 64."""
    assert cli_index.main(["info", str(index), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["deleted"], found["graph_items"], found["ends"][-1]) == (8, 0, 0, 64)
    assert found["vector_bytes"] == 8 * 64 * found["dims"] * 2
    assert cli_index.main(["verify", str(index), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": 8, "damages": []}


def test_a_deep_payload_of_an_older_index_is_printed_as_json(demo_bundle, tmp_path, capsys, monkeypatch):
    """Found in review: indexing took a payload 900 levels deep, and printing it ended in a traceback."""
    monkeypatch.setattr("metaembed.runtime.index_payload.MOST_LEVELS", 1000)
    (tmp_path / "data.jsonl").write_text('{"id": "a", "text": "b", "v": ' + "[" * 900 + "]" * 900 + "}")
    command = [str(demo_bundle), "--data", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "index"), "--quiet"]
    assert cli_index.main(command) == 0
    capsys.readouterr()
    assert cli_search.main([str(tmp_path / "index"), "b", "--json"]) == 0
    assert capsys.readouterr().out.count("[") == 901


def test_mistakes_get_one_sentence(demo_bundle, data, index, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    for content, sentence in [
        ("", "is empty"),
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('{"text": "a"}', "line 1 has no id"),
        ('{"id": "a"}', "neither a text nor an image"),
        ('{"id": "a", "text": "b"}\n{"id": "c", "text": "d", "v": 1e999}', "line 2 is not JSON"),
        ('{"id": 1.5, "text": "b"}', "the id 1.5 is neither a text nor a whole number"),
        ('{"id": "a", "text": "b"}\n{"id": "a", "text": "c"}', "the id 'a' twice"),
    ]:
        lines.write_text(content)
        assert sentence in refused(capsys, cli_index.main, demo_bundle, "--data", lines, "-o", tmp_path / "o")
    assert "is missing" in refused(capsys, cli_index.main, demo_bundle, "--data", tmp_path / "x", "-o", tmp_path / "o")
    assert "65 vectors" in refused(
        capsys, cli_index.main, demo_bundle, "--data", data, "-o", tmp_path / "o", "--budget", 65
    )
    assert "no query" in refused(capsys, cli_search.main, index)
    assert "before --cascade, which takes every word" in refused(
        capsys, cli_search.main, index, "--cascade", "1,1", "text"
    )
    assert "is no index" in refused(capsys, cli_search.main, demo_bundle, "text")
    assert "nope is missing" in refused(capsys, cli_search.main, tmp_path / "nope", "text")
    assert "not both" in refused(capsys, cli_search.main, index, "a", "--budget", "1,1", "--cascade", "1,1")
    assert "belong to an index" in refused(
        capsys, cli_search.main, demo_bundle, "a", "--images", data, "--where", "a=1"
    )


def test_an_unreadable_image_is_named_and_the_rest_is_indexed(demo_bundle, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/0.png").write_bytes(b"no picture")
    command = [str(demo_bundle), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "index")]
    assert cli_index.main(command) == 1
    assert "3 items added" in capsys.readouterr().out


def test_one_bad_item_of_any_kind_is_named_and_the_rest_is_indexed(demo_bundle, data, tmp_path, capsys, caplog):
    """A strip that the preprocessor refuses, a blank text, half a character, and a file that is no image."""
    Image.new("RGB", (8000, 30)).save(tmp_path / "strip.png")
    (tmp_path / "none.png").write_bytes(b"no picture")
    bad = [
        {"id": "strip", "image": "strip.png"},
        {"id": "blank", "text": "  "},
        {"id": "none", "image": "none.png"},
    ]
    lines = [bad[0], {"id": "a", "text": "a"}, *bad[1:], {"id": "b", "text": "b"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [str(demo_bundle), "--data", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "index")]
    assert cli_index.main(command) == 1
    assert "2 items added" in capsys.readouterr().out
    assert all(f"{item['id']} is left out" in caplog.text for item in bad)


@pytest.mark.parametrize("line", ['{"id": "\\ud800", "text": "a"}', '{"id": "a", "text": "a", "n": NaN}'])
def test_a_line_that_cannot_be_kept_is_refused_before_anything_is_encoded(demo_bundle, tmp_path, capsys, line):
    (tmp_path / "data.jsonl").write_text(f'{{"id": "b", "text": "b"}}\n{line}\n')
    command = (demo_bundle, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "index")
    assert "line 2" in refused(capsys, cli_index.main, *command)
    assert not (tmp_path / "index").exists()


def test_an_index_is_continued_as_it_was_made(demo_bundle, data, tmp_path, capsys):
    """Without a word about its layout; words that contradict it are refused."""
    command = [str(demo_bundle), "--data", str(data / "data.jsonl"), "-o", str(tmp_path / "index"), "--quiet"]
    assert cli_index.main([*command, "--budget", "4", "--storage", "int8"]) == 0
    assert cli_index.main([*command, "--resume"]) == 0
    for words, sentence in (
        (["--budget", "8"], "stores 4 vectors"),
        (["--storage", "bf16"], "stores int8"),
        (["--screen"], "without a screen"),
    ):
        assert sentence in refused(capsys, cli_index.main, *command, "--resume", *words)


def test_an_empty_folder_becomes_the_index(demo_bundle, data, tmp_path):
    (tmp_path / "index").mkdir()
    command = [str(demo_bundle), "--data", str(data), "-o", str(tmp_path / "index"), "--quiet"]
    assert cli_index.main(command) == 0


def test_broken_links_and_names_that_are_not_unicode_are_named_and_counted(demo_bundle, data, tmp_path, capsys, caplog):
    """Of four images one is sound; what is left out was neither counted nor, of a link, named."""
    shutil.copytree(data, tmp_path / "data")
    os.rename(tmp_path / "data/0.png", os.fsencode(tmp_path / "data") + b"/\xff.png")
    for name, to in ((1, "nowhere"), (2, "2.png")):
        (tmp_path / f"data/{name}.png").unlink()
        (tmp_path / f"data/{name}.png").symlink_to(to)
    command = [str(demo_bundle), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "index")]
    for flags, added, known in (([], 1, 0), (["--resume"], 0, 1), (["--update"], 1, 0)):
        caplog.clear()
        assert cli_index.main([*command, *flags]) == 1
        out = capsys.readouterr().out
        assert f"{added} item{'' if added == 1 else 's'} added" in out
        assert f"{known} were there, 3 unreadable" in out
        assert "\\udcff.png is left out: its name is not valid Unicode" in caplog.text
        assert all(
            f"{name}.png is left out: {tmp_path}/data/{name}.png is a broken link" in caplog.text for name in (1, 2)
        )
    caplog.clear()
    assert cli_search.main([str(demo_bundle), "a red star", "--images", str(tmp_path / "data")]) == 1
    out = capsys.readouterr().out
    assert "3.png" in out
    assert "4 images, 3 unreadable" in out
    assert sum("is left out" in message for message in caplog.messages) == 3


def test_a_folder_that_cannot_be_read_stops_the_run(monkeypatch, tmp_path):
    """Permissions do not stop root, so the refusal is the system's by proxy."""
    (tmp_path / "shut").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match="shut cannot be read"):
        find_images(tmp_path)


@pytest.mark.parametrize("flags", [["--json"], []])
def test_results_print_where_the_terminal_knows_ascii_only(demo_bundle, tmp_path, flags):
    lines = [{"id": "schön", "text": "a"}, {"id": "☂", "text": "b"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [str(demo_bundle), "--data", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "index"), "--quiet"]
    assert cli_index.main(command) == 0
    code = "from metaembed.runtime.cli_search import main; raise SystemExit(main())"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    search = [sys.executable, "-c", code, tmp_path / "index", "a", *flags]
    ended = subprocess.run(search, env=environment, capture_output=True, check=True)
    if flags:
        assert {hit["id"] for hit in json.loads(ended.stdout)} == {"schön", "☂"}
    else:
        assert b"sch\\xf6n" in ended.stdout


def test_a_bundles_folder_has_a_name_in_unicode(demo_bundle, data, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"b\xff")
    shutil.copytree(demo_bundle, folder)
    assert "not valid Unicode" in refused(capsys, cli_search.main, folder, "a", "--images", data)


def test_another_models_bundle_is_refused(demo_bundle, index, tmp_path, capsys):
    """The fingerprint in the index is changed, as if another model had made it."""
    layout = Index.open(index).layout
    Index.create(tmp_path / "other", layout, fingerprint="another", bundle=str(demo_bundle))
    assert "another model" in refused(capsys, cli_search.main, tmp_path / "other", "a")


def test_a_killed_run_continues_without_loss(demo_bundle, tmp_path, capsys):
    """SIGKILL once the first batch is stored; afterwards every line is there once."""
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"id": f"item{i}", "text": f"number {i}"}) for i in range(150)))
    folder = tmp_path / "index"
    command = [str(demo_bundle), "--data", str(lines), "-o", str(folder), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "metaembed.runtime.cli_index", *command])
    while process.poll() is None and not list(folder.glob("segments/*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli_index.main([*command, "--resume"]) == 0
    with Index.open(folder) as index:
        assert len(index) == 150
        assert index.verify() == []
