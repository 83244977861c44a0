"""How alike two sets of features of the same things are: cosine, relative error, linear CKA."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ERROR, POWER, COSINE = 0, 1, 2  # columns of `agreement`


def agreement(ours: Tensor, theirs: Tensor, centre: Tensor) -> np.ndarray:
    """Per image, the means over its L vectors that relative error and cosine are made of.

    Args:
        ours, theirs: (n, L, C); L = 1 for summaries, H W for maps.
        centre: (C,) the mean of all of theirs.

    Returns:
        (n, 3) float64: ||p - t||^2, ||t - centre||^2, and the cosine of p and t (0 where one of them is 0).
    """
    ours, theirs = ours.float(), theirs.float()
    columns = [
        (ours - theirs).square().sum(-1),
        (theirs - centre).square().sum(-1),
        F.cosine_similarity(ours, theirs, dim=-1),
    ]
    return torch.stack([column.double().mean(1) for column in columns], 1).numpy()


def relative_error(means: np.ndarray) -> np.ndarray:
    """(..., 3) means of `agreement` -> (...): sum ||p - t||^2 / sum ||t - mean t||^2, which is 1 - R^2.

    0 for the teacher's features, 1 for their mean everywhere; NaN where they don't vary.
    """
    error, power = means[..., ERROR], means[..., POWER]
    return np.divide(error, power, out=np.full_like(error, np.nan), where=power > 0)


def linear_cka(x: Tensor, y: Tensor, *, chunk: int = 8192) -> float:
    """Linear centred kernel alignment: ||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms, columns centred.

    From covariances, in float64, so that the cost is linear in N. Source: Kornblith et al. 2019, "Similarity of Neural
    Network Representations Revisited", section 3. It lies in [0, 1], does not change under rotations
    and a common scale of either side, and is biased upwards where N isn't much larger than the dimensions.

    Args:
        x: (N, D).
        y: (N, E), of the same things.
        chunk: rows a matrix product.

    Returns:
        0 as well where a side doesn't vary at all.
    """
    if _constant(x) or _constant(y):
        return 0.0
    means = x.double().mean(0), y.double().mean(0)
    cross, own, other = 0.0, 0.0, 0.0
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        a, b = a.double() - means[0], b.double() - means[1]
        cross, own, other = cross + b.T @ a, own + a.T @ a, other + b.T @ b
    norms = [torch.linalg.matrix_norm(torch.as_tensor(product)) for product in (cross, own, other)]
    return float(norms[0] ** 2 / (norms[1] * norms[2]))


def _constant(x: Tensor) -> bool:
    return bool((x == x[:1]).all())
