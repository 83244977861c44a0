"""Learning-rate schedules in optimiser steps, as multipliers."""

from __future__ import annotations

import math
from typing import Any, Literal

from agglom.plan import Plan

Schedule = Literal["cosine", "wsd", "constant"]


def multiplier(
    step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int, final: float, decay_fraction: float = 0.2
) -> float:
    """Learning rate at `step` as a share of the peak.

    Linear warm-up over `warmup_steps`, then

    * "constant": 1;
    * "cosine": a half cosine down to `final` at `total_steps`;
    * "wsd" (warm-up, stable, decay; Hu et al., MiniCPM, 2404.06395): 1, and over the last `decay_fraction` of
      `total_steps` a straight line down to `final`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    begin = warmup_steps if schedule == "cosine" else max(warmup_steps, round((1 - decay_fraction) * total_steps))
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    return final + (1 - final) * (0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress)


def rate_at(step: int, *, plan: Plan, total_steps: int, lr: float, warmup_steps: int, **shape: Any) -> float:
    """Learning rate at `step` of a run with stages, as a share of `lr`: each stage has a peak and a warm-up of its own.

    Args:
        step: optimiser steps before this one.
        plan: the stages; one that restarts begins its schedule anew.
        total_steps: of the run.
        lr: peak of stages that name none.
        warmup_steps: of stages that name none.
        shape: the rest of `multiplier`'s arguments.
    """
    index = plan.stage_at(step)
    stage, (start, length) = plan.stages[index], plan.spans(total_steps)[index]
    warmup = warmup_steps if stage.warmup_steps is None else stage.warmup_steps
    return (stage.lr or lr) / lr * multiplier(step - start, warmup_steps=warmup, total_steps=length, **shape)
