"""Learning-rate schedules in optimiser steps, as multipliers."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "constant"]


def multiplier(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int, final: float) -> float:
    """Learning rate at `step` as a share of the peak.

    Linear warm-up over `warmup_steps`, then `constant`, or a half cosine down to `final` at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
