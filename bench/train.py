"""The demo model's recipe: words first, then Meta Tokens; one command, resumable, under an hour on two idle cores."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metaembed.runtime.errors import UsageError

from .demo_model import CANDIDATE_TOKENS, QUERY_TOKENS, write_checkpoint
from .demo_quality import SplitImages, measure
from .scenes_queries import make_split
from .train_loop import Run, Stage
from .train_loss import Group
from .train_mmr import GROUP_WEIGHTS, ScenePool, mmr_step
from .train_model import DemoModel
from .train_words import word_step

WORD_STEPS, WORD_RATE = 600, 2e-3
MMR_STEPS, MMR_RATE = 1800, 1.5e-3
VALIDATION_SEED, VALIDATION_SCENES, VALIDATION_QUERIES = 1, 1000, (200, 50, 50)
CHECK_EVERY = 300  # steps of stage 2


def train(folder: Path, *, groups: Mapping[Group, float], steps: int, seed: int, resume: bool, quiet: bool) -> Path:
    """Run both stages and write the checkpoint folder ``model`` below ``folder``; returns it.

    Args:
        groups: the weight of each trained (query, candidate) group; (16, 64) alone is the twin without MMR.
        steps: steps of stage 2.
        resume: go on from the states in ``folder``; otherwise it must hold none.
    """
    if any(folder.glob("*.pt")) and not resume:
        raise UsageError(
            f"{folder} already holds a training run; add --resume to go on with it, or name another folder"
        )
    run, model = Run(folder, seed, quiet=quiet), DemoModel(seed)
    _keep_settings(
        folder, {"groups": [[*group, weight] for group, weight in groups.items()], "steps": steps, "seed": seed}
    )
    words = Stage("words", WORD_STEPS, WORD_RATE, lambda rng, k: word_step(model, rng, k), dict, WORD_STEPS)
    run.train(model, model.parameters(), words)
    model.vision.requires_grad_(False)
    pool, validation = ScenePool(model, seed), _Validation(model)

    def check() -> dict[str, Any]:
        write_checkpoint(folder / "model", model.checkpoint())
        return validation.ndcg(model, groups)

    mmr = Stage("mmr", steps, MMR_RATE, lambda rng, k: mmr_step(model, pool, rng, k, groups), check, CHECK_EVERY)
    run.train(model, model.language.parameters(), mmr)
    return folder / "model"


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the run was asked for, or refuse to go on with another request."""
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n")
    elif json.loads(path.read_text()) != settings:
        raise UsageError(f"{folder} was begun with other groups, steps or seed ({path}); resume it with the same ones")


class _Validation:
    """nDCG@5 on a small validation split, for the log."""

    def __init__(self, model: DemoModel) -> None:
        self.split = make_split("validation", VALIDATION_SEED, scenes=VALIDATION_SCENES, queries=VALIDATION_QUERIES)
        self.images = SplitImages(model, self.split)

    def ndcg(self, model: DemoModel, groups: Mapping[Group, float]) -> dict[str, Any]:
        records = measure(self.split, *self.images.embed(model), groups=tuple(groups))
        kinds = ("text", "image", "image+text")
        return {f"{row['queries']} {row['budget']}": row["ndcg_at_5"] for row in records if row["queries"] in kinds}


def parse_groups(text: str) -> dict[Group, float]:
    """``all`` is MMR's nested groups with their weights; ``16,64`` that group alone; several are parted by spaces."""
    if text.strip() == "all":
        return dict(GROUP_WEIGHTS)
    groups = {}
    for part in text.split():
        query, comma, candidate = part.partition(",")
        if not (comma and query.isdecimal() and candidate.isdecimal()):
            raise UsageError(f"group {part!r} is not of the form R_Q,R_C (two whole numbers, for example 16,64)")
        group = int(query), int(candidate)
        if not (1 <= group[0] <= QUERY_TOKENS and 1 <= group[1] <= CANDIDATE_TOKENS):
            raise UsageError(
                f"group {part} leaves the demo model's 1..{QUERY_TOKENS},1..{CANDIDATE_TOKENS} Meta Tokens"
            )
        groups[group] = 1.0
    if not groups:
        raise UsageError("no group was given; name at least one, for example --groups 16,64")
    return groups


def prepare_process(threads: int | None) -> None:
    """Set torch's threads, and have the C library keep freed memory instead of returning it to the system.

    A step allocates and frees hundreds of arrays of some 10 MB; with fresh pages each time, matrix products ran at 19
    GFLOP/s on one core and at 51 with memory kept.
    """
    if threads:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**27)):
            libc.mallopt(option, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
