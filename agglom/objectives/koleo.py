"""KoLeo: features spread over the sphere, each away from its nearest neighbour."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agglom.objectives.base import widen
from agglom.objectives.pointwise import EPS
from agglom.objectives.relation import pair_distances
from agglom.targets.moments import no_autocast


def koleo(x: Tensor) -> Tensor:
    """-log(min_{j != i} |x_i - x_j| + 1e-6) of normalised rows: the Kozachenko-Leonenko entropy estimate, negated.

    The neighbours are those of this process' batch: the value depends on how a batch is divided over ranks. Call it
    with one view at a time, or an image's views push each other apart.

    Sources: Sablayrolles et al. (1806.03198); the weight is 0.1 in DINOv2 (2304.07193).

    Args:
        x: (B, D), of any length and float dtype.

    Returns:
        (B,) fp32, from -log 2 (the antipode) to 13.8 (a duplicate, with gradient 0); 0 for a batch of one.

    Raises:
        ValueError: x isn't (B, D).
    """
    if x.ndim != 2:
        raise ValueError(f"(B, D) summaries wanted, got {tuple(x.shape)}")
    x = widen(x)
    if len(x) < 2:
        return x.sum(1) * 0
    with no_autocast(x.device):
        nearest = pair_distances(F.normalize(x, dim=1, eps=EPS)).amin(1)
    return -(nearest + EPS).log()
