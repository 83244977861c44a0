"""Squared angle between prediction and target, in units of how far a teacher's targets spread."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.objectives.base import Loss, check_mask, over_tokens, ready, widen
from agglom.objectives.pointwise import EPS
from agglom.targets.moments import Statistics, accumulator, sum_over_ranks


def angle(x: Tensor, z: Tensor) -> Tensor:
    """Angle in [0, pi] along dimension 1: 2 atan2(|u - v|, |u + v|) of the unit vectors (Kahan).

    Exact where arccos is not: near 0 and pi arccos loses half the digits and its slope is infinite.
    """
    u, v = F.normalize(x, dim=1, eps=EPS), F.normalize(z, dim=1, eps=EPS)
    return 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1))


def squared_angle(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """angle^2 a token, radians^2. Shapes as in `Loss.forward`."""
    x, z = ready(prediction, target, mask)
    return over_tokens(angle(x, z).square(), mask)


class AngleBalanced(Loss, Statistics):
    """angle(prediction, target)^2 / dispersion: teachers with narrow and wide cones weigh the same.

    The dispersion is E[angle(z, m)^2] of the targets z about their mean direction m = E[z] / |E[z]|, so a student that
    only knows the mean direction scores 1 on every teacher. Both expectations are running sums over all ranks of
    `group`, until `freeze_after` targets were seen. Before the first `update` the dispersion counts as 1.

    Source: C-RADIOv4, section 2.5 (arccos there).

    Args:
        freeze_after: targets (of all ranks) after which the dispersion is fixed.
        eps: least dispersion.
    """

    lazy = ("total",)
    group: Any = None
    count: Tensor
    total: Tensor
    spread: Tensor

    def __init__(self, *, freeze_after: int = 10_000_000, eps: float = 1e-8) -> None:
        super().__init__()
        self.freeze_after = freeze_after
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(0, dtype=torch.float64))  # (C,) from the first update on
        self.register_buffer("spread", torch.zeros((), dtype=torch.float64))

    @property
    def dispersion(self) -> Tensor:
        """(), radians^2."""
        measured = (self.spread / self.count.clamp(min=1)).clamp(min=self.eps)
        return torch.where(self.count > 0, measured, torch.ones_like(measured))

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        squared = squared_angle(prediction, target, mask)
        return squared / self.dispersion.to(squared.dtype)

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor | None = None) -> None:
        """Take a step's targets in; nothing in eval mode and once frozen. All ranks call it together."""
        if not self.training:
            return
        rows = widen(target.detach()).movedim(1, -1).flatten(0, -2)  # (N, C)
        valid = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if mask is not None:
            check_mask(target, mask)
            valid = mask.flatten()
            rows = rows.masked_fill(~valid[:, None], 0)
        wide = accumulator(rows.device)
        self._resize("total", (rows.shape[1],), rows.device)
        # frozen is a question about a number on the device: answered there, so that the host need not wait
        open_ = (self.count < self.freeze_after).to(wide)
        count, total = sum_over_ranks(valid.sum().to(wide), rows.sum(0).to(wide), group=self.group)
        self.count.add_(open_ * count)
        self.total.add_(open_ * total)
        squared = angle(rows, self.total.to(rows.dtype).expand_as(rows)).square().masked_fill(~valid, 0)
        (spread,) = sum_over_ranks(squared.sum().to(wide), group=self.group)
        self.spread.add_(open_ * spread)
        self._count_step()

    def reset(self) -> None:
        for buffer in (self.count, self.total, self.spread):
            buffer.zero_()
        self._reset_steps()
