"""Matryoshka multi-vector retrieval (MMR): one contrastive loss over nested groups of Meta Token vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Group = tuple[int, int]  # (query vectors, candidate vectors)
TEMPERATURE = 0.03


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """All dot products: (n, r, d) and (m, s, d) -> (n, r, m, s)."""
    flat = queries.flatten(0, 1) @ candidates.flatten(0, 1).t()
    return flat.view(*queries.shape[:2], *candidates.shape[:2])


def group_scores(similar: Tensor, group: Group) -> Tensor:
    """MaxSim at a smaller budget, averaged over the query vectors instead of summed: (n, r, m, s) -> (n, m).

    The average ranks as the sum does, and gives every group logits of one scale.
    """
    return similar[:, : group[0], :, : group[1]].amax(-1).mean(1)


def contrastive_loss(scores: Tensor, relevant: Tensor) -> Tensor:
    """InfoNCE of scores (n, m), each relevant pair against all irrelevant candidates of its query.

    -log(e^p / (e^p + sum of e^n)) = softplus(log(sum of e^n) - p), averaged over the relevant pairs of each query;
    other relevant candidates are left out of the denominator. relevant: bool (n, m); a row without any adds nothing.
    """
    logits = scores / TEMPERATURE
    against = logits.masked_fill(relevant, -1e4).logsumexp(1, keepdim=True)
    losses = F.softplus(against - logits) * relevant
    return (losses.sum(1) / relevant.sum(1).clamp(min=1)).mean()


def mmr_loss(queries: Tensor, candidates: Tensor, relevant: Tensor, weights: Mapping[Group, float]) -> Tensor:
    """The weighted mean of the groups' contrastive losses, in both directions; the similarities are computed once.

    Args:
        queries, candidates: L2-normalised (n, r, d) and (m, s, d), at least as many vectors as the largest group.
        relevant: bool (n, m).
        weights: each trained group's weight.
    """
    similar = similarities(queries, candidates)
    total = torch.zeros(())
    for group, weight in weights.items():
        scores = group_scores(similar, group)
        total = total + weight * (contrastive_loss(scores, relevant) + contrastive_loss(scores.t(), relevant.t())) / 2
    return total / sum(weights.values())
