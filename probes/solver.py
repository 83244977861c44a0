"""Multinomial logistic regression with L2, by preconditioned L-BFGS on the full batch.

    minimise over W (K, D), b (K,):   mean_i CE(W x_i + b, y_i) + l2 / 2 * ||W||^2

The curvature of the cross-entropy is bounded by 1/2 of the features' covariance (Boehning 1992), so in that
covariance's eigenbasis, each axis scaled by 1 / sqrt(eigenvalue / 2 + l2), the problem is round and a few dozen steps
reach the optimum. scikit-learn's `LogisticRegression(C=1 / (l2 * N))` has the same optimum.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """A linear classifier: logits = x @ weight.T + bias, weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        return F.linear(x, self.weight, self.bias)


class Standardise(NamedTuple):
    """Per-channel mean and standard deviation of the training features; constant channels become 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Standardise:
        """From (N, D)."""
        std = x.std(0, correction=0)
        constant = std <= 1e-6 * x.abs().mean(0).clamp_min(1e-12)
        return cls(x.mean(0), torch.where(constant, torch.inf, std))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (x - self.mean) / self.std

    def fold(self, head: Head) -> Head:
        """A head for standardised features -> the same head for the features as they come."""
        weight = head.weight / self.std
        return Head(weight, head.bias - weight @ self.mean)


def fit_softmax(
    x: Tensor, y: Tensor, *, classes: int, l2: Sequence[float], steps: int = 100, tolerance: float = 1e-5
) -> list[Head]:
    """One head for each strength of L2, from strong to weak, each starting where the last one ended.

    Args:
        x: (N, D) float, standardised.
        y: (N,) int in [0, classes).
        classes: K.
        l2: strengths, all > 0.
        steps: most L-BFGS steps a strength.
        tolerance: stop once the largest entry of the (preconditioned) gradient is below it.

    Returns:
        heads in the order of `l2`.
    """
    count, mean = len(x), x.mean(0)
    centred = x - mean
    values, basis = torch.linalg.eigh((centred.T @ centred / count).double())
    values, basis = values.clamp_min(0).to(x.dtype), basis.to(x.dtype)
    z = centred @ basis  # (N, D), uncorrelated
    heads: dict[float, Head] = {}
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    for strength in sorted(set(l2), reverse=True):
        weight, bias = _minimise(z, y, weight, bias, values, strength, steps, tolerance)
        w = weight @ basis.T
        heads[strength] = Head(w, bias - w @ mean)
    return [heads[strength] for strength in l2]


def _minimise(
    z: Tensor, y: Tensor, weight: Tensor, bias: Tensor, values: Tensor, l2: float, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    count = len(z)
    scale = (values / 2 + l2).rsqrt()  # (D,)
    bias_scale = 2.0**0.5
    free = torch.cat([weight / scale, bias[:, None] / bias_scale], 1).requires_grad_()  # (K, D + 1)
    rows = torch.arange(count, device=z.device)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=steps, history_size=10, tolerance_grad=tolerance, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def closure() -> Tensor:
        # the gradient by hand: autograd would keep three more (N, K) tensors and multiply in a slower layout
        w, b = free[:, :-1] * scale, free[:, -1] * bias_scale
        logits = F.linear(z, w, b)
        logits -= logits.amax(1, keepdim=True)
        picked = logits[rows, y]
        logits.exp_()
        total = logits.sum(1)
        loss = (total.log() - picked).mean() + l2 / 2 * w.square().sum()
        logits /= total[:, None]
        logits[rows, y] -= 1
        slope = logits.T.contiguous() / count  # (K, N)
        free.grad = torch.cat([(slope @ z + l2 * w) * scale, slope.sum(1, keepdim=True) * bias_scale], 1)
        return loss

    optimizer.step(closure)
    return (free[:, :-1] * scale).detach(), (free[:, -1] * bias_scale).detach()
