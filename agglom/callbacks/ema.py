"""The exponential moving average of the trained weights, for validation and for the export."""

from __future__ import annotations

import copy
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class WeightEMA(pl.Callback):
    """Keeps an average of everything that is trained (student and adaptors) and validates with it.

    After every optimiser step (not every micro-batch): average <- decay * average + (1 - decay) * weights, buffers are
    copied. The decay warms up as min(decay, (1 + n) / (10 + n)) after n steps, so short runs are not dominated by
    the initial weights. Saved in checkpoints and restored.

    Args:
        decay: of the average, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay}; valid: 0 <= decay < 1")
        self.decay = decay
        self.average: nn.Module | None = None
        self._restored: dict[str, Tensor] | None = None
        self._step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = copy.deepcopy(_trained(pl_module)).requires_grad_(False)
        if self._restored is not None:
            self.average.load_state_dict(self._restored)
            self._restored = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # known only now: a checkpoint's loops are restored after on_fit_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        decay = min(self.decay, self._step / (9 + self._step))
        assert self.average is not None
        update_average(self.average, _trained(pl_module), decay)

    def exchange(self, pl_module: pl.LightningModule) -> None:
        """Put the average into the module and its weights aside; a second call puts them back."""
        if self.average is not None:
            _swap(self.average, _trained(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exchange(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exchange(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("average")


def _trained(module: pl.LightningModule) -> nn.Module:
    """Everything that a distiller trains, as one module."""
    return cast(nn.Module, module.trained)


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
    ours = [*first.parameters(), *first.buffers()]
    theirs = [*second.parameters(), *second.buffers()]
    for a, b in zip(ours, theirs, strict=True):
        a.data, b.data = b.data, a.data
