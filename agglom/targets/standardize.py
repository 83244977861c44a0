"""Mean 0 and deviation 1 a channel, in the three schedules that were published."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from agglom.errors import UserError
from agglom.targets.base import Normalizer
from agglom.targets.moments import Moments, merge

FLOOR = 0.01  # of a channel's deviation, as a share of the mean deviation


def scale(std: Tensor, eps: float) -> Tensor:
    """What a centred channel is divided by: its deviation, but not less than 1 % of the channels' mean, plus eps.

    A channel of a ReLU network can be silent in the first batch and not in the second; divided by eps alone, one such
    value outweighs the rest of the run.
    """
    return torch.maximum(std, FLOOR * std.mean()) + eps


class Standardize(Normalizer):
    """y -> (y - mean) / scale(std), channel by channel.

    Args:
        dim: C, channels.
        schedule: how the statistics move.
            "ema": mean and std follow the batches with momentum m: s <- (1 - m) s + m s_batch (UNIC).
            "frozen": pooled over the first `warmup_steps` updates, then fixed (EUPE, which spends them before training;
            `frozen` says when they are over).
            "running": pooled over all updates.
        momentum_start: m at step 0 ("ema" with `total_steps`).
        momentum_end: m at the last step, or with `total_steps` None always.
        total_steps: length of the cosine from start to end, UNIC's schedule, which follows the last few batches for
            half the training. None (the default): m = max(momentum_end, 1 / (step + 1)), a plain average at first, so
            the first batch has no lasting weight, and an EMA over 1 / momentum_end steps later.
        warmup_steps: updates of the "frozen" schedule.
        eps: added to the deviation.
        initial: what the first step sees: "batch" or "raw" (UNIC), see Normalizer.

    Raises:
        UserError: an unknown schedule.
    """

    count: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        *,
        schedule: Literal["ema", "frozen", "running"] = "ema",
        momentum_start: float = 1.0,
        momentum_end: float = 0.001,
        total_steps: int | None = None,
        warmup_steps: int = 500,
        eps: float = 1e-6,
        initial: Literal["batch", "raw"] = "batch",
    ) -> None:
        super().__init__(dim, initial=initial)
        if schedule not in ("ema", "frozen", "running"):
            raise UserError(f"schedule {schedule!r}; valid: 'ema', 'frozen', 'running'")
        self.schedule = schedule
        self.momentum_start = momentum_start
        self.momentum_end = momentum_end
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("std", torch.ones(dim, dtype=torch.float64))

    @property
    def frozen(self) -> bool:
        return self.schedule == "frozen" and self.taken >= self.warmup_steps

    def momentum(self, step: int) -> float:
        """m of the "ema" schedule at an update (0 is the first)."""
        if self.total_steps is None:
            return max(self.momentum_end, 1 / (step + 1))
        phase = min(step / max(self.total_steps - 1, 1), 1.0)
        return self.momentum_end + (self.momentum_start - self.momentum_end) * (1 + math.cos(math.pi * phase)) / 2

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self._check(x)
        if self.frozen:
            return
        batch = self._batch(x, mask)
        if self.schedule == "ema":
            # fewer than two rows have no deviation: such a step counts but moves nothing
            m = self.momentum(self.taken) * (batch.number > 1).to(batch.number.dtype)
            self.mean.lerp_(batch.mean, m)
            self.std.lerp_(batch.variance.sqrt(), m)
        else:
            pooled = merge(Moments(self.count, self.mean, self.std.square() * (self.count - 1).clamp(min=0)), batch)
            self.count.copy_(pooled.number)
            self.mean.copy_(pooled.mean)
            self.std.copy_(torch.where(pooled.number > 1, pooled.variance.sqrt(), self.std))
        self._count_step()

    def reset(self) -> None:
        self.count.zero_()
        self.mean.zero_()
        self.std.fill_(1)
        self._reset_steps()

    def fit(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        std = torch.where(moments.number > 1, moments.variance.sqrt(), torch.ones_like(moments.mean))
        divisor = scale(std, self.eps)
        return moments.mean, 1 / divisor, divisor

    def current(self) -> tuple[Tensor, Tensor, Tensor]:
        divisor = scale(self.std, self.eps)
        return self.mean, 1 / divisor, divisor
