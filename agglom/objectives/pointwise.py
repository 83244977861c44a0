"""Losses that compare each token with its own target: cosine, smooth-L1, squared error and their mixtures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.objectives.base import Loss, over_tokens, ready

EPS = 1e-6  # a norm below this counts as this: keeps the gradient of an all-zero token finite


def cosine(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos a token, in [0, 2]; an all-zero token scores 1. Shapes as in `Loss.forward`."""
    x, z = ready(prediction, target, mask)
    return over_tokens(1 - F.cosine_similarity(x, z, dim=1, eps=EPS), mask)


def smooth_l1(prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) below beta, |d| - beta/2 above; mean over channels."""
    x, z = ready(prediction, target, mask)
    return over_tokens(F.smooth_l1_loss(x, z, reduction="none", beta=beta).mean(1), mask)


def mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """d^2, mean over channels."""
    x, z = ready(prediction, target, mask)
    return over_tokens((x - z).square().mean(1), mask)


def dampened_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """d^2 / 2 below |d| = 1, 2 sqrt|d| - 3/2 above (value and slope meet at 1); mean over channels."""
    x, z = ready(prediction, target, mask)
    distance = (x - z).abs()
    # the clamp keeps the root's infinite slope at 0 out of the branch that isn't taken
    outer = 2 * distance.clamp(min=1).sqrt() - 1.5
    return over_tokens(torch.where(distance < 1, distance.square() / 2, outer).mean(1), mask)


def cosine_smooth_l1(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """Weighted `cosine` + `smooth_l1`, a token; a term of weight 0 isn't computed."""
    total = torch.zeros(len(prediction), device=prediction.device)
    if cosine_weight:
        total = total + cosine_weight * cosine(prediction, target, mask)
    if smooth_l1_weight:
        total = total + smooth_l1_weight * smooth_l1(prediction, target, mask, beta=beta)
    return total


def flattened_cosine_smooth_l1(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """As `cosine_smooth_l1`, but one cosine over an image's whole flattened (valid) map."""
    total = torch.zeros(len(prediction), device=prediction.device)
    if cosine_weight:
        x, z = ready(prediction, target, mask)
        flat = cosine(x.flatten(1), z.flatten(1))
        if mask is not None:
            flat = flat.masked_fill(~mask.flatten(1).any(1), 0)
        total = total + cosine_weight * flat
    if smooth_l1_weight:
        total = total + smooth_l1_weight * smooth_l1(prediction, target, mask, beta=beta)
    return total


class Cosine(Loss):
    """1 - cos: the summary loss of AM-RADIO."""

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return cosine(prediction, target, mask)


class SmoothL1(Loss):
    """Smooth-L1, mean over channels.

    Args:
        beta: the difference at which the square turns into the absolute value.
    """

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return smooth_l1(prediction, target, mask, beta=self.beta)


class MSE(Loss):
    """Mean squared error over channels: the spatial loss of PHI-S and later, on standardised targets."""

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return mse(prediction, target, mask)


class DampenedMSE(Loss):
    """Half a squared error that grows like a root beyond 1, so that outlier channels don't lead."""

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return dampened_mse(prediction, target, mask)


class CosineSmoothL1(Loss):
    """Cosine plus smooth-L1 a token: 0.9 / 0.1 in AM-RADIO and EUPE, 0.5 / 0.5 in UNIC.

    Args:
        cosine_weight: of 1 - cos; 0 leaves the term out.
        smooth_l1_weight: of the smooth-L1 term, which keeps the magnitude; 0 leaves it out.
        beta: of the smooth-L1 term (the RADIO trainer of TAO uses 2.0).
    """

    def __init__(self, *, cosine_weight: float = 0.9, smooth_l1_weight: float = 0.1, beta: float = 1.0) -> None:
        super().__init__()
        self.options = {"cosine_weight": cosine_weight, "smooth_l1_weight": smooth_l1_weight, "beta": beta}

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return cosine_smooth_l1(prediction, target, mask, **self.options)


class FlattenedCosineSmoothL1(CosineSmoothL1):
    """Theia's loss: the cosine is taken over an image's whole flattened map, not a token."""

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return flattened_cosine_smooth_l1(prediction, target, mask, **self.options)
