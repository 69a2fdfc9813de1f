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

# What is judged, in either package; the judge may reach none of it, directly or through another file.
JUDGED = {"export": {"encoder", "trace", "graph", "bundle"}} | {
    "runtime": {"layout", "images", "text", "processor", "encoder", "session", "session_ort", "open_sessions"}
}


@pytest.fixture(scope="module")
def reference(demo_folder: Path) -> Reference:
    return Reference(Source(Checkpoint.open(demo_folder), demo_folder, (demo_folder,)))


def imported(package: str, module: str) -> set[tuple[str, str]]:
    """Our own (package, module) pairs that a file imports, at its top or inside a function."""
    tree = ast.parse(Path(str(files(f"metaembed.{package}") / f"{module}.py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {(package, node.module)} if node.module else {(package, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metaembed."):
            _, other, *rest = str(node.module).split(".")
            found |= {(other, rest[0])} if rest else {(other, alias.name) for alias in node.names}
    return found


def test_the_reference_reaches_nothing_that_it_judges():
    """Read from the syntax tree, followed through every file of ours."""
    reached, waiting = set(), {("export", "reference")}
    while waiting:
        reached |= waiting
        waiting = set().union(*(imported(*place) for place in waiting)) - reached
    assert ("runtime", "golden") in reached, "imports were followed"
    assert not {(package, module) for package, module in reached if module in JUDGED.get(package, ())}


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
