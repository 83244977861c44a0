"""Training on several sources: their losses in the log, and shares that follow them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from agglom.data import GapOptions, follow
from agglom.data.ranks import of_all_ranks
from agglom.targets.moments import accumulator, sum_over_ranks


class Mixing(pl.Callback):
    """Logs each source's share and loss at logged steps; with `follow_gap`, sets new shares every so many steps.

    A source's gap is the mean over teachers (and objectives) of its loss since the last update over that of all
    sources, so that no teacher's scale counts more. The sums are over all ranks, hence the shares are the same on all;
    they hold from a batch on that no worker has begun. Losses are those of training: a stream seldom comes back to an
    image, and nothing has to be held out.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # teacher or objective -> (2, S): losses, images
        self._restored: list[dict[str, Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        names, sources = [*module.names, *module.objectives], len(trainer.datamodule.sources)  # type: ignore[attr-defined]
        wide = accumulator(module.device)
        self._sums = {name: torch.zeros(2, sources, dtype=wide, device=module.device) for name in names}
        same = len(self._restored) == trainer.world_size
        for number, sums in enumerate(self._restored):
            if trainer.global_rank == (number if same else 0):  # of other ranks than before, the first goes on for all
                for name, x in sums.items():
                    self._sums[name] += x.to(module.device, wide)
        self._restored = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        for name, loss in module.per_image.items():
            pair = torch.stack([loss.detach(), torch.ones_like(loss)]).to(self._sums[name].dtype)
            good = pair[0].isfinite()  # those of a step that is left out
            self._sums[name].index_add_(1, batch["source"], torch.where(good, pair, 0))
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            shares = data.shares.at(_ready(trainer) - 1)
            losses = torch.stack([sums[0] / sums[1] for sums in self._sums.values()]).nanmean(0)
            metrics = {}
            for number, name in enumerate(data.sources):
                metrics[f"train/sources/{name}/share"] = shares[number]
                metrics[f"train/sources/{name}/loss"] = losses[number]  # since the shares changed; of this rank
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)
        if data.follow_gap is not None and self._step % data.follow_gap.every == 0:
            self._update(data, data.follow_gap, trainer)

    def _update(self, data: Any, options: GapOptions, trainer: pl.Trainer) -> None:
        """New shares, from sums over all ranks; the host waits for them."""
        sums = torch.stack(sum_over_ranks(*self._sums.values())).cpu().double()  # (T, 2, S)
        loss = sums[:, 0] / sums[:, 1]
        everywhere = sums[:, 0].sum(1) / sums[:, 1].sum(1)
        gaps = (loss / everywhere[:, None]).nanmean(0)
        batch = _ready(trainer) + data.ahead
        now = torch.tensor(data.shares.at(batch), dtype=torch.float64)
        weights = torch.tensor(data.weights, dtype=torch.float64)
        shares = follow(now, gaps, weights, strength=options.strength, most=options.most)
        data.shares.put(batch, shares.tolist())
        for total in self._sums.values():
            total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The sums of each rank; all call it together."""
        return {"ranks": of_all_ranks({name: x.cpu() for name, x in self._sums.items()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["ranks"]


def _ready(trainer: pl.Trainer) -> int:
    """Number of the batch that comes next."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
