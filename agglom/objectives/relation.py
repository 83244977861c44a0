"""Losses on relations: distances between images (RKD, ARKD) and similarities between an image's tokens (Gram).

They compare pairs, so student and teacher may differ in width and no projector is needed. The pairs of RKD and ARKD are
those of this process' batch: the value depends on how a batch is divided over ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError
from agglom.objectives.base import Loss, check_mask, widen
from agglom.objectives.pointwise import EPS
from agglom.targets.moments import no_autocast


def pair_distances(x: Tensor) -> Tensor:
    """(B, D) -> (B, B - 1): Euclidean distances of every row to the others. Gradient 0 where rows coincide."""
    # the route over matrix products leaves 1e-3 of noise between equal rows
    full = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    b = len(x)
    # drop the diagonal by its stride: selecting by a mask would make the host wait
    return full.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)


def relational(
    prediction: Tensor,
    target: Tensor,
    *,
    asymmetric: bool = False,
    scale: Literal["own", "teacher"] = "own",
    beta: float = 1.0,
) -> Tensor:
    """Each image's share of a pairwise distance loss, such that the mean over images is the mean over ordered pairs.

    Args:
        prediction: (B, D_s).
        target: (B, D_t).
        asymmetric: count a pair only where the student errs to the harmful side: close pairs (distance below the
            teacher's median) too far apart, far pairs too close together.
        scale: distances are divided by their mean over pairs, student's and teacher's each by its "own", or both by the
            "teacher"'s, which asks for the magnitude too.
        beta: of the smooth-L1 penalty.

    Returns:
        (B,); 0 for a batch of one.
    """
    if prediction.ndim != 2 or target.ndim != 2 or len(prediction) != len(target):
        raise ValueError(f"(B, D) summaries wanted, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    x, z = widen(prediction), widen(target.detach())
    if len(x) < 2:
        return x.sum(1) * 0
    with no_autocast(x.device):
        student, teacher = pair_distances(x), pair_distances(z)
    unit = teacher.mean().clamp(min=EPS)
    far = teacher >= teacher.median()
    student = student / (student.mean().clamp(min=EPS) if scale == "own" else unit)
    difference = student - teacher / unit
    if asymmetric:
        difference = torch.where(far, -difference, difference).clamp(min=0)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=beta).mean(1)


def gram(prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, clip_negative: bool = False) -> Tensor:
    """Mean squared difference of the two matrices of cosines between an image's tokens.

    Args:
        prediction: (B, C_s, H, W).
        target: (B, C_t, H, W).
        mask: (B, H, W) bool; pairs of valid tokens count.
        clip_negative: negative cosines count as 0 on both sides.

    Returns:
        (B,).
    """
    if prediction.ndim != 4 or target.ndim != 4 or prediction.shape[2:] != target.shape[2:]:
        raise ValueError(f"two maps of one grid wanted, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    x, z = widen(prediction), widen(target.detach())
    pairs: Tensor | int = x.shape[2:].numel() ** 2
    if mask is not None:
        check_mask(x, mask)
        outside = ~mask.unsqueeze(1)
        x, z = x.masked_fill(outside, 0), z.masked_fill(outside, 0)  # a zero token has cosine 0 with all, on both sides
        pairs = mask.flatten(1).sum(1).clamp(min=1).square()
    x, z = (F.normalize(f.flatten(2), dim=1, eps=EPS) for f in (x, z))  # (B, C, N)
    with no_autocast(x.device):
        student, teacher = x.mT @ x, z.mT @ z  # (B, N, N)
    if clip_negative:
        student, teacher = student.clamp(min=0), teacher.clamp(min=0)
    return (student - teacher).square().sum((1, 2)) / pairs


class RKD(Loss):
    """Symmetric relational distillation of summaries: distances between images, up to scale (Park et al. 2019).

    Args:
        scale: what distances are divided by: each side's own mean, or both by the teacher's.
        beta: of the smooth-L1 penalty.

    Raises:
        UserError: an unknown scale.
    """

    asymmetric = False

    def __init__(self, *, scale: Literal["own", "teacher"] = "own", beta: float = 1.0) -> None:
        super().__init__()
        if scale not in ("own", "teacher"):
            raise UserError(f"scale {scale!r}; valid: 'own', 'teacher'")
        self.scale: Literal["own", "teacher"] = scale
        self.beta = beta

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """prediction (B, D_s), target (B, D_t) -> (B,). There is no mask for summaries."""
        if mask is not None:
            raise ValueError(f"{type(self).__name__} compares summaries: no mask")
        return relational(prediction, target, asymmetric=self.asymmetric, scale=self.scale, beta=self.beta)


class ARKD(RKD):
    """Asymmetric relational distillation: penalises close pairs that drift apart and far pairs that collapse (AMoE).

    Args:
        scale: what distances are divided by: each side's own mean, or both by the teacher's.
        beta: of the smooth-L1 penalty.
    """

    asymmetric = True

    def __init__(self, *, scale: Literal["own", "teacher"] = "teacher", beta: float = 1.0) -> None:
        super().__init__(scale=scale, beta=beta)


class Gram(Loss):
    """Gram matching of maps: how an image's tokens resemble each other (the Gram anchoring of DINOv3).

    Args:
        clip_negative: negative cosines count as 0 on both sides.
    """

    def __init__(self, *, clip_negative: bool = False) -> None:
        super().__init__()
        self.clip_negative = clip_negative

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """prediction (B, C_s, H, W), target (B, C_t, H, W) -> (B,)."""
        return gram(prediction, target, mask, clip_negative=self.clip_negative)
