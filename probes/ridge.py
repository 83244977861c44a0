"""Ridge regression for several strengths at once."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor


def ridge_path(gram: Tensor, moment: Tensor, rows: int, strengths: Sequence[float]) -> list[Tensor]:
    """Minimisers of the mean of ||W'x - y||^2 plus strength ||W||^2, from one eigendecomposition.

    Args:
        gram: (D, D) sum of x x'.
        moment: (D, K) sum of x y'.
        rows: how many x there are.
        strengths: of the ridge.

    Returns:
        (D, K) for each strength.
    """
    values, vectors = torch.linalg.eigh(gram / rows)
    inside = vectors.T @ (moment / rows)
    return [vectors @ (inside / (values.clamp(min=0) + strength)[:, None]) for strength in strengths]
