"""The training loop: an interrupted run goes on as if nothing had happened."""

import json

import pytest
import torch
from torch import nn

from metaembed.bench import train_loop
from metaembed.bench.train_loop import Run, Stage


def fresh_model():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def noisy_step(model, stop_at=None):
    """A step whose data come from the step's own random numbers."""

    def step(rng, number):
        if number == stop_at:
            raise KeyboardInterrupt
        inputs = torch.from_numpy(rng.normal(size=(7, 5))).float()
        return (model(inputs) - 1).square().mean(), {"number": number}

    return step


def train(folder, model, stop_at=None, seed=3):
    stage = Stage("words", 12, 0.05, noisy_step(model, stop_at), lambda: {"checked": True}, 6)
    Run(folder, seed, quiet=True).train(model, model.parameters(), stage)
    return model


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """Expected value: the run that was never interrupted."""
    monkeypatch.setattr(train_loop, "SAVE_EVERY", 4)
    expected = train(tmp_path / "whole", fresh_model())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", fresh_model(), stop_at=9)
    resumed = train(tmp_path / "parts", fresh_model())
    assert torch.equal(resumed.weight, expected.weight)
    other = train(tmp_path / "other", fresh_model(), seed=4)
    assert not torch.equal(other.weight, expected.weight)


def test_a_finished_run_is_not_trained_again(tmp_path):
    trained = train(tmp_path, fresh_model())
    again = train(tmp_path, fresh_model(), stop_at=0)
    assert torch.equal(again.weight, trained.weight)


def test_loss_and_checks_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(train_loop, "LOG_EVERY", 5)
    train(tmp_path, fresh_model())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [5, 10]
    assert [record["step"] for record in records if "checked" in record] == [6, 12]


def test_the_rate_warms_up_and_falls_to_nothing():
    stage = Stage("words", 1000, 2.0, None, None, 1)
    assert stage.rate(0) == pytest.approx(2.0 / train_loop.WARM_UP, rel=1e-3)
    assert stage.rate(500) == pytest.approx(1.0)
    assert stage.rate(999) < 1e-4
