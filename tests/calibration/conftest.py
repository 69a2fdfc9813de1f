"""The demo bundle cut down to what calibration's tests can replay in seconds, and small calibration sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaembed.calibration.dataset import CalibrationItem, CalibrationSet, choose
from metaembed.runtime.budget import Budget
from metaembed.runtime.golden import SIDES, golden_path, read_golden, write_golden
from metaembed.runtime.manifest import Bundle, write_manifest

WORDS = "a red umbrella and blue anchor green star telephone on page black knight pink queen".split()
SMALL = 112 * 112  # pixels


def draw(seed: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    """Coloured noise in blocks of 7 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 7, size[0] // 7, 3), np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((7, 7, 1), np.uint8)))


def make_items(count: int = 24) -> list[CalibrationItem]:
    """Texts, images and both by turns, on both sides."""
    rng = np.random.default_rng(0)
    items = []
    for place in range(count):
        text = None if place % 3 == 1 else " ".join(rng.choice(WORDS, 5))
        image = None if place % 3 == 0 else draw(place)
        items.append(CalibrationItem(SIDES[place // 3 % 2], text, image, f"item {place}"))
    return items


@pytest.fixture(scope="session")
def calibration_set() -> CalibrationSet:
    return choose(make_items(), "test items", samples=24)


@pytest.fixture(scope="session")
def small_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo at budgets 2,4 and 8,16 with the small golden inputs only. Read-only."""
    folder = tmp_path_factory.mktemp("calibration") / "bundle"
    manifest = Bundle.open(demo_bundle).manifest
    shutil.copytree(demo_bundle, folder)
    for side in SIDES:
        items, embeddings = read_golden(folder / golden_path(side))
        images = [item.image for item in items]
        kept = [k for k, image in enumerate(images) if image is None or image.width * image.height <= SMALL]
        write_golden(folder / golden_path(side), [items[k] for k in kept], embeddings[kept])
    write_manifest(folder, replace(manifest, budgets=(Budget(2, 4), Budget(8, 16))))
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write lines, as dictionaries or raw strings, to a JSONL file."""

    def write(*lines: object) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return path

    return write
