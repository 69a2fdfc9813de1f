"""The loop that both training stages share: schedule, checkpoints to resume from, progress, log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from metaembed.runtime.staged_file import staged_file

SAVE_EVERY = 100  # steps
LOG_EVERY = 25  # steps
WARM_UP = 50  # steps

Step = Callable[[np.random.Generator, int], "tuple[Tensor, dict[str, float]]"]
Check = Callable[[], "dict[str, Any]"]


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe: AdamW to ``peak_rate`` and down a half cosine to zero.

    ``step(rng, number)`` returns a loss and numbers to log; ``check()`` is called every ``check_every``
    steps and at the end.
    """

    name: str
    steps: int
    peak_rate: float
    step: Step
    check: Check
    check_every: int

    def rate(self, number: int) -> float:
        return self.peak_rate * min(1, (number + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / self.steps))


class Run:
    """A training folder: ``log.jsonl``, and one ``STAGE.pt`` for each stage begun, to resume from."""

    def __init__(self, folder: Path, seed: int, *, quiet: bool = False) -> None:
        self.folder, self.seed, self.quiet = folder, seed, quiet
        folder.mkdir(parents=True, exist_ok=True)

    def train(self, model: nn.Module, parameters: Iterable[nn.Parameter], stage: Stage) -> None:
        """Train to the stage's last step, from its saved state if there is one. The same seed gives the same steps."""
        trained = list(parameters)
        optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
        first = self._resume(stage, model, optimiser)
        begun = time.monotonic()
        hidden = True if self.quiet else None  # None: shown on a terminal only
        bar = tqdm(range(first, stage.steps), stage.name, stage.steps, initial=first, disable=hidden, leave=False)
        for number in bar:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate(number)
            loss, seen = stage.step(np.random.default_rng([*stage.name.encode(), self.seed, number]), number)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            done = number + 1
            if done % LOG_EVERY == 0:
                spent = round(time.monotonic() - begun, 1)
                self.log(stage=stage.name, step=done, loss=round(float(loss.detach()), 4), seconds=spent, **seen)
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if done % SAVE_EVERY == 0 or done == stage.steps:
                self._save(stage, model, optimiser, done)
            if done % stage.check_every == 0 or done == stage.steps:
                self.log(stage=stage.name, step=done, **stage.check())

    def log(self, **record: Any) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")

    def _save(self, stage: Stage, model: nn.Module, optimiser: torch.optim.Optimizer, done: int) -> None:
        with staged_file(self._state(stage)) as part:
            torch.save({"step": done, "model": model.state_dict(), "optimiser": optimiser.state_dict()}, part)

    def _resume(self, stage: Stage, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
        if not self._state(stage).exists():
            return 0
        saved = torch.load(self._state(stage), weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        return int(saved["step"])

    def _state(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}.pt"
