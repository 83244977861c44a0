"""What a run says about itself: who pulls at the student, and how many directions its features use."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from agglom.features import Features, StudentFeatures
from agglom.targets.moments import accumulator, no_autocast, sum_over_ranks


def gradient_shares(terms: Sequence[Tensor], student: StudentFeatures) -> Tensor:
    """Norm of each term's gradient at the student's features, as a share of the sum of norms.

    At the features, not at the weights: the trunk below is the same for all terms, and a backward pass through the
    heads is all it costs. The graph is kept.

    Args:
        terms: T scalars; one without a graph counts as 0.
        student: what the terms were computed from: summary, map and taps.

    Returns:
        (T,) float32 without gradient; 0 where there is no gradient at all.
    """
    features = [x for x in (student.summary, student.spatial, *(x for pair in student.taps.values() for x in pair))]
    features = [x for x in features if x.requires_grad]
    norms = []
    for term in terms:
        found = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True) if term.requires_grad else ()
        squares = [grad.float().square().sum() for grad in found if grad is not None]
        norms.append(torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=term.device))
    stacked = torch.stack(norms)
    return stacked / stacked.sum().clamp(min=1e-30)


def teacher_metrics(
    names: Sequence[str],
    targets: Mapping[str, Features],
    heads: Mapping[str, Any],
    kept: Tensor,
    weights: Tensor,
    pulls: Tensor | None,
) -> dict[str, Tensor]:
    """What is logged of each teacher that saw the batch.

    Args:
        names: all teachers, in the order of the (T,) tensors.
        targets: name -> normalised features, of those that saw the batch.
        heads: name -> `agglom.heads.Head`, for the parts that it trains.
        kept: (T,) share of the images that count.
        weights: (T,) mean weight.
        pulls: (T,) share of the gradient, or None.
    """
    metrics: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        if name not in targets:
            continue
        metrics |= {f"train/{name}/weight": weights[index], f"train/{name}/kept": kept[index]}
        if pulls is not None:
            metrics[f"train/{name}/gradient_share"] = pulls[index]
        for part in heads[name].losses:
            target = getattr(targets[name], part)
            metrics |= {f"train/{name}/{part}_target_mean": target.mean()}
            metrics |= {f"train/{name}/{part}_target_std": target.std()}
    return metrics


def spread(features: Tensor) -> Tensor:
    """Root mean square of features' deviation from their channel means, over that of the features: () in [0, 1].

    0 where all rows are the same, all zeros included.

    Args:
        features: (B, C) or (B, C, H, W).
    """
    rows = features.detach().float().movedim(1, -1).flatten(0, -2)
    power = rows.square().mean()
    return ((rows - rows.mean(0)).square().mean() / power.clamp(min=1e-30)).sqrt()


class RankMe:
    """`effective_rank` of all rows seen, summed over ranks; nothing but a (D, D) matrix is kept."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """rows (..., D)."""
        flat = rows.detach().flatten(0, -2).float()
        with no_autocast(flat.device):
            gram = (flat.T @ flat).to(accumulator(flat.device))
        self._gram = gram if self._gram is None else self._gram + gram

    def compute(self, eps: float = 1e-7) -> float:
        """From 1 to D, of all rows since the last call; all ranks call it together. 0 if there were none."""
        if self._gram is None:
            return 0.0
        (gram,) = sum_over_ranks(self._gram)
        self._gram = None
        return effective_rank(gram, eps)


def effective_rank(gram: Tensor, eps: float = 1e-7) -> float:
    """exp of the entropy of features' normalised singular values: from 1 to D.

    Source: Garrido et al., "RankMe", 2210.02885, equation 1; singular values are the roots of the Gram matrix's
    eigenvalues.

    Args:
        gram: (D, D) X'X of features X (N, D), not centred.
        eps: added to each share.
    """
    values = torch.linalg.eigvalsh(gram.cpu().double()).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=eps) + eps
    return float((-(shares * shares.log()).sum()).exp())
