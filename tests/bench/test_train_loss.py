"""The MMR loss, against a plain float64 restatement with Python loops."""

import math

import numpy as np
import pytest
import torch

from metaembed.bench.train import parse_groups
from metaembed.bench.train_loss import TEMPERATURE, contrastive_loss, group_scores, mmr_loss, similarities
from metaembed.runtime.errors import UsageError


def unit_vectors(seed, *shape):
    values = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(values / np.linalg.norm(values, axis=-1, keepdims=True))


def plain_maxsim(query, candidate):
    """Mean over query vectors of the best dot product."""
    return sum(max(float(q @ c) for c in candidate) for q in query) / len(query)


def plain_infonce(scores, relevant):
    """For each relevant pair: -log softmax over itself and the irrelevant candidates, averaged per query."""
    total = 0.0
    for row, wanted in zip(scores, relevant, strict=True):
        losses = []
        for k in np.flatnonzero(wanted):
            others = [math.exp(row[j] / TEMPERATURE) for j in range(len(row)) if not wanted[j]]
            own = math.exp(row[k] / TEMPERATURE)
            losses.append(-math.log(own / (own + sum(others))))
        total += sum(losses) / len(losses) if losses else 0.0
    return total / len(scores)


def test_a_groups_score_is_maxsim_over_prefixes():
    queries, candidates = unit_vectors(1, 3, 4, 7), unit_vectors(2, 5, 6, 7)
    scores = group_scores(similarities(queries, candidates), (2, 3))
    expected = [[plain_maxsim(q[:2], c[:3]) for c in candidates] for q in queries]
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_contrastive_loss_equals_its_definition():
    scores = torch.from_numpy(np.random.default_rng(3).uniform(-0.3, 0.3, (4, 6)))
    relevant = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]]).bool()
    expected = plain_infonce(scores.numpy(), relevant.numpy())
    assert float(contrastive_loss(scores, relevant)) == pytest.approx(expected, rel=1e-9)


def test_mmr_loss_is_the_weighted_mean_of_its_groups():
    queries, candidates = unit_vectors(4, 3, 4, 7), unit_vectors(5, 5, 6, 7)
    relevant = torch.eye(3, 5).bool()
    alone = {group: float(mmr_loss(queries, candidates, relevant, {group: 1.0})) for group in [(1, 1), (2, 3), (4, 6)]}
    together = float(mmr_loss(queries, candidates, relevant, {(1, 1): 3.0, (2, 3): 1.0, (4, 6): 0.5}))
    assert together == pytest.approx((3 * alone[1, 1] + alone[2, 3] + 0.5 * alone[4, 6]) / 4.5)


def test_the_smallest_group_trains_only_the_first_vectors():
    """A gradient that reached a later vector would train what (1,1) never uses."""
    queries, candidates = unit_vectors(6, 3, 4, 7).requires_grad_(), unit_vectors(7, 5, 6, 7).requires_grad_()
    mmr_loss(queries, candidates, torch.eye(3, 5).bool(), {(1, 1): 1.0}).backward()
    assert queries.grad[:, 0].abs().min() > 0
    assert not queries.grad[:, 1:].any()
    assert not candidates.grad[:, 1:].any()


def test_groups_are_read_from_the_command_line():
    assert set(parse_groups("all")) == {(1, 1), (2, 4), (4, 8), (8, 16), (16, 64)}
    assert parse_groups("16,64") == {(16, 64): 1.0}
    assert parse_groups("1,1 2,4") == {(1, 1): 1.0, (2, 4): 1.0}


@pytest.mark.parametrize("text", ["", "8", "17,64", "0,4", "16,65", "a,b", "1,1,1"])
def test_groups_that_cannot_be_trained_are_refused(text):
    with pytest.raises(UsageError):
        parse_groups(text)
