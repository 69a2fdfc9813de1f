"""The README's Python, run as it stands but for its paths."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed.runtime import cli_index

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
