"""The exponential moving average of the trained weights: for validation, the export, and as a teacher."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from agglom.errors import UserError

EMASchedule = Literal["fixed", "cosine"]


class WeightEMA(pl.Callback):
    """Keeps an average of everything that is trained (student, adaptors, heads of objectives) and validates with it.

    After every optimiser step (not every micro-batch): average <- decay * average + (1 - decay) * weights, buffers are
    copied. Saved in checkpoints and restored, snapshots included. Always in evaluation mode.

    Args:
        decay: of the average, in [0, 1].
        schedule: "fixed", or "cosine": the decay goes from `decay` to 1 over the run (BYOL, DINO).
        warmup: a fixed decay starts as min(decay, n / (9 + n)) after n steps, so that short runs are not dominated by
            the initial weights.
    """

    def __init__(self, decay: float = 0.999, *, schedule: EMASchedule = "fixed", warmup: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay {decay}; valid: 0 <= decay <= 1")
        self.decay, self.schedule, self.warmup = decay, schedule, warmup
        self.average: nn.ModuleDict | None = None
        self._snapshots: dict[str, nn.Module] = {}
        self._restored: dict[str, Any] = {}
        self._step = -1
        self._total = 0

    def decay_at(self, step: int) -> float:
        """The decay of the update after `step` optimiser steps (1 is the first)."""
        if self.schedule == "cosine":
            return 1 - (1 - self.decay) * (1 + math.cos(math.pi * min(1.0, step / max(1, self._total)))) / 2
        return min(self.decay, step / (9 + step)) if self.warmup else self.decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = _frozen_copy(_trained(pl_module))
        self._total = trainer.max_steps
        if self.schedule == "cosine" and self._total <= 0:
            raise UserError(
                f"trainer.max_steps: {self._total}, but model.ema_schedule: cosine needs an end; valid: > 0; set it"
            )
        if "average" in self._restored:
            self.average.load_state_dict(self._restored["average"])
        for name, state in self._restored.get("snapshots", {}).items():
            self._snapshots[name] = _frozen_copy(self.average["student"])
            self._snapshots[name].load_state_dict(state)
        self._restored = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # known only now: a checkpoint's loops are restored after on_fit_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        assert self.average is not None
        update_average(self.average, _trained(pl_module), self.decay_at(self._step))

    def copy(self, pl_module: pl.LightningModule) -> None:
        """Make the average a copy of the weights."""
        assert self.average is not None
        update_average(self.average, _trained(pl_module), 0.0)

    def snapshot(self, name: str, *, renew: bool) -> nn.Module:
        """A copy of the averaged student that stays as it is until it is renewed."""
        assert self.average is not None
        if name not in self._snapshots:
            self._snapshots[name] = _frozen_copy(self.average["student"])
        elif renew:
            update_average(self._snapshots[name], self.average["student"], 0.0)
        return self._snapshots[name]

    def exchange(self, pl_module: pl.LightningModule) -> None:
        """Put the average into the module and its weights aside; a second call puts them back."""
        if self.average is not None:
            _swap(self.average, _trained(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exchange(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exchange(pl_module)

    def state_dict(self) -> dict[str, Any]:
        if self.average is None:
            return {}
        snapshots = {name: module.state_dict() for name, module in self._snapshots.items()}
        return {"average": self.average.state_dict(), **({"snapshots": snapshots} if snapshots else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)


def _trained(module: pl.LightningModule) -> nn.ModuleDict:
    """Everything that a distiller trains, as one module."""
    return cast(nn.ModuleDict, module.trained)


def _frozen_copy(module: Any) -> Any:
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, weights: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights for parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(weights.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), weights.buffers(), strict=True):
        if ours.shape != theirs.shape:  # statistics that took their size from the first step
            ours.resize_(theirs.shape)
        ours.copy_(theirs)


def _swap(first: nn.Module, second: nn.Module) -> None:
    """Exchange the storage of all parameters and buffers, without copying."""
    ours: list[Tensor] = [*first.parameters(), *first.buffers()]
    theirs: list[Tensor] = [*second.parameters(), *second.buffers()]
    for a, b in zip(ours, theirs, strict=True):
        a.data, b.data = b.data, a.data
