"""The README's Python, and its commands for many queries, run as they stand but for their paths."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed.runtime import cli_index, cli_search

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It prints one score, of one query against one page, and the page's id."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    (tmp_path / "pages").mkdir()
    for path in ("page.png", "pages/one.png"):
        Image.fromarray(noise).save(tmp_path / path)
    assert cli_index.main([str(demo_bundle), "--data", "pages", "-o", "pages.index", "--quiet"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(code.replace("demo-out/bundle", str(demo_bundle)), {})
    assert re.fullmatch(r"\[\[\S+\]\]\n\['one.png'\]\n", capsys.readouterr().out)


def test_the_commands_for_many_queries_run(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two queries over the demo's own words, and three documents: two lines of results, six of a run file."""
    monkeypatch.chdir(tmp_path)
    for name, ids in (("corpus", "abc"), ("queries", "qr")):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"id": i, "text": f"a {i}"}) + "\n" for i in ids))
    assert cli_index.main([str(demo_bundle), "--data", "corpus.jsonl", "-o", "pages.index", "--quiet"]) == 0
    (section,) = re.findall(r"## Many queries\n\n```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = {"metaembed-search": cli_search.main, "metaembed-index": cli_index.main}
    for line in section.splitlines():
        name, *argv = shlex.split(line, comments=True)
        assert commands[name](argv) == 0, line
    assert [json.loads(line)["query"] for line in Path("hits.jsonl").read_text().splitlines()] == ["q", "r"]
    assert len(Path("run.trec").read_text().splitlines()) == 2 * 3
    printed = capsys.readouterr().out
    assert "8 GiB of memory: --hold 64" in printed
    assert printed.splitlines()[-1].endswith("--place 64, for a first stage of R_Q,64")
