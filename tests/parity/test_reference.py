"""The judge is independent of what it judges, and does not depend on how it is asked."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.golden import draw_page
from metaembed.export.reference import Reference
from metaembed.export.source import Source
from metaembed.runtime.golden import GoldenItem

# What the judge may share with the rest: the record that names one input, and where the checkpoint's files lie. Not
# layouts, preprocessing, prompts or models.
SHARED = {"metaembed.runtime.golden", "metaembed.runtime.golden.GoldenItem", ".source", ".source.Source"}


@pytest.fixture(scope="module")
def reference(demo_folder: Path) -> Reference:
    return Reference(Source(Checkpoint.open(demo_folder), demo_folder, (demo_folder,)))


def test_the_reference_imports_nothing_that_it_judges():
    """Read from the syntax tree, functions included."""
    tree = ast.parse(Path(str(files("metaembed.export") / "reference.py")).read_text(encoding="utf-8"))
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            named |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    assert {name for name in named if name.startswith(("metaembed", "."))} == SHARED


def test_a_left_padded_batch_equals_one_by_one(reference: Reference):
    """Within fp32's rounding: the official way pads on the left and extends the attention mask."""
    items = [
        GoldenItem("a red umbrella and a blue anchor"),
        GoldenItem("x"),
        GoldenItem(image=draw_page(1, (90, 200))),
        GoldenItem("naïve café", draw_page(2, (140, 60))),
    ]
    for side, vectors in (("query", 16), ("candidate", 64)):
        together = reference.encode(side, items)
        alone = np.concatenate([reference.encode(side, [item]) for item in items])
        assert together.shape == (4, vectors, 128)
        np.testing.assert_allclose(together, alone, atol=2e-6)


def test_the_two_sides_differ(reference: Reference):
    """So that a parity that compared one side with itself would be noticed."""
    item = [GoldenItem("a red umbrella")]
    assert np.abs(reference.encode("query", item) - reference.encode("candidate", item)[:, :16]).max() > 0.1
