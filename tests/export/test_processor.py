"""Image rules of a checkpoint, in every file that transformers writes them to. Its own image processor is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metaembed.export.processor import read_processor
from metaembed.export.source import find_image_processor
from metaembed.runtime.errors import BundleError, UsageError

OLD, UNIFIED = "preprocessor_config.json", "processor_config.json"
LEGACY = {"processor_class": "Qwen2_5_VLProcessor"}  # what transformers 4 wrote beside a preprocessor_config.json


def rules(max_pixels: int) -> dict:
    return {"min_pixels": 3136, "max_pixels": max_pixels, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def nested(max_pixels: int) -> dict:
    return {**LEGACY, "image_processor": Qwen2VLImageProcessorPil(**rules(max_pixels)).to_dict()}


def write(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {OLD: rules(100_352)},
        {UNIFIED: nested(100_352)},
        {OLD: rules(200_704), UNIFIED: nested(100_352)},
        {OLD: rules(100_352), UNIFIED: LEGACY},
        {OLD: rules(100_352), UNIFIED: {"image_processor": None}},
    ],
    ids=["old", "unified", "unified wins", "legacy", "null"],
)
def test_rules_are_those_that_transformers_reads(tmp_path: Path, files: dict[str, object]):
    folder = write(tmp_path / "model", files)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)
    ours = read_processor((folder,), 1024)
    assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert (ours.min_pixels, ours.max_pixels) == (3136, 100_352)
    assert (list(ours.mean), list(ours.std)) == (list(theirs.image_mean), list(theirs.image_std))
    assert ours.mean == (0.1, 0.2, 0.3)


def test_an_adapter_s_own_rules_come_before_the_base_s(tmp_path: Path):
    base = write(tmp_path / "base", {OLD: rules(200_704)})
    unified = write(tmp_path / "unified", {UNIFIED: nested(100_352)})
    legacy = write(tmp_path / "legacy", {UNIFIED: LEGACY})
    assert read_processor((unified, base), 1024).max_pixels == 100_352
    assert read_processor((legacy, base), 1024).max_pixels == 200_704
    assert find_image_processor((unified, base))[0] == unified
    assert find_image_processor((legacy, base))[0] == base


def test_a_checkpoint_without_rules_is_told_both_places(tmp_path: Path):
    legacy, empty = write(tmp_path / "legacy", {UNIFIED: LEGACY}), write(tmp_path / "empty", {})
    for folders in ((legacy,), (legacy, empty)):
        with pytest.raises(UsageError) as caught:
            read_processor(folders, 1024)
        assert all(f"{word}" in str(caught.value) for word in (*folders, OLD, UNIFIED, "copy it from the base model"))


@pytest.mark.parametrize("content", [[], {"image_processor": 5}, {"image_processor": []}, {"image_processor": ""}])
def test_a_damaged_unified_file_is_named(tmp_path: Path, content: object):
    folder = write(tmp_path / "model", {UNIFIED: content})
    with pytest.raises(BundleError, match=UNIFIED):
        read_processor((folder,), 1024)
