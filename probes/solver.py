"""Logistic regression with L2, by preconditioned L-BFGS on the full batch.

    minimise over W (K, D), b (K,):   mean_i loss(W x_i + b, y_i) + l2 / 2 * ||W||^2

where the loss is the cross-entropy of a softmax (one class an image), or the sum over the classes of the binary
cross-entropies of sigmoids (several classes an image: K regressions of one class against the rest).

The curvature of either is bounded by 1/2 of the features' covariance (Boehning 1992; the sigmoid's even by 1/4), so in
that covariance's eigenbasis, each axis scaled by 1 / sqrt(eigenvalue / 2 + l2), the problem is round and a few dozen
steps reach the optimum. scikit-learn's `LogisticRegression(C=1 / (l2 * N))` has the same optimum, for several classes
an image in `OneVsRestClassifier`.

Rows are worked through in chunks: beside the features and one rotated copy of them (none with `overwrite`), memory is
some `ENTRIES` numbers and the L-BFGS history of 20 times K x (D + 1), however many rows there are.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ENTRIES = 2**24  # numbers in the largest temporary: 64 MiB


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
        """From (N, D), N >= 1, or from (N, ...) with D numbers a row."""
        count, width = len(x), x[0].numel()
        total, squares, absolute = torch.zeros(3, width, dtype=torch.float64, device=x.device)
        for rows in chunks(count, 4 * width):
            some = x[rows].flatten(1).double()  # so that squares of a large mean don't drown the rest
            absolute += some.abs().sum(0)
            total += some.sum(0)
            squares += some.square_().sum(0)
        std = (squares / count - (total / count).square()).clamp_min(0).sqrt()
        constant = std <= 1e-6 * (absolute / count).clamp_min(1e-12)
        return cls((total / count).to(x.dtype), torch.where(constant, torch.inf, std).to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (x - self.mean) / self.std

    def to(self, device: torch.device) -> Standardise:
        """The same elsewhere."""
        return Standardise(self.mean.to(device), self.std.to(device))

    def into(self, x: Tensor) -> Tensor:
        """The same in place."""
        return x.sub_(self.mean).div_(self.std)

    def fold(self, head: Head) -> Head:
        """A head for standardised features -> the same head for the features as they come."""
        weight = head.weight / self.std
        return Head(weight, head.bias - weight @ self.mean)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Stretches of rows whose temporaries of `width` numbers a row hold no more than `ENTRIES` numbers."""
    step = max(1, ENTRIES // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def fit_logistic(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    l2: Sequence[float],
    steps: int = 100,
    tolerance: float = 1e-5,
    overwrite: bool = False,
) -> list[Head]:
    """One head for each strength of L2, from strong to weak, each starting where the last one ended.

    Args:
        x: (N, D) float, standardised.
        y: (N,) int in [0, classes), one class an image; or (N, K) bool, which classes each has.
        classes: K.
        l2: strengths, all > 0.
        steps: most L-BFGS steps a strength.
        tolerance: stop once the largest entry of the (preconditioned) gradient is below it.
        overwrite: x may be destroyed, which saves a copy of it.

    Returns:
        heads in the order of `l2`.
    """
    mean = x.mean(0)
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in chunks(len(x), x.shape[1]):
        centred = x[rows] - mean
        covariance += centred.T @ centred
    values, basis = torch.linalg.eigh(covariance / len(x))
    values, basis = values.clamp_min(0).to(x.dtype), basis.to(x.dtype)
    z = x if overwrite else torch.empty_like(x)  # (N, D), uncorrelated
    for rows in chunks(len(x), 2 * x.shape[1]):
        z[rows] = (x[rows] - mean) @ basis
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
    optimizer = torch.optim.LBFGS(
        [free], max_iter=steps, history_size=10, tolerance_grad=tolerance, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    slope_of = _softmax if y.ndim == 1 else _sigmoid

    @torch.no_grad()
    def closure() -> Tensor:
        # the gradient by hand: autograd would keep three more (N, K) tensors and multiply in a slower layout
        w, b = free[:, :-1] * scale, free[:, -1] * bias_scale
        loss, down, across = l2 / 2 * w.square().sum(), torch.zeros_like(w), torch.zeros_like(b)
        for rows in chunks(count, 2 * len(w)):
            some, slope = slope_of(F.linear(z[rows], w, b), y[rows])
            slope = slope.T.contiguous()  # (K, n)
            loss = loss + some / count
            down += slope @ z[rows]
            across += slope.sum(1)
        free.grad = torch.cat([(down / count + l2 * w) * scale, across[:, None] * (bias_scale / count)], 1)
        return loss

    optimizer.step(closure)
    return (free[:, :-1] * scale).detach(), (free[:, -1] * bias_scale).detach()


def _softmax(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K), which are overwritten, and classes (n,) -> summed cross-entropy, its slope (n, K)."""
    rows = torch.arange(len(logits), device=logits.device)
    logits -= logits.amax(1, keepdim=True)
    picked = logits[rows, y]
    total = logits.exp_().sum(1)
    logits /= total[:, None]
    logits[rows, y] -= 1
    return (total.log() - picked).sum(), logits


def _sigmoid(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K), which are overwritten, and which classes (n, K) -> summed binary cross-entropy, its slope."""
    loss = F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="sum")
    return loss, logits.sigmoid_().sub_(y.to(logits.dtype))
