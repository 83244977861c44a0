"""Probes during training, so that their curves stand beside the losses."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from agglom.errors import UserError, nearest
from agglom.features import TextTower

if TYPE_CHECKING:
    from agglom.distiller import Distiller

log = logging.getLogger("agglom.fit")


class OnlineProbes(pl.Callback):
    """Every so many optimiser steps, a few probes on a small part of the data, with the averaged weights.

    Logged as `probe/PROBE_METRIC` for the encoder and `probe/TEACHER/PROBE_METRIC` through an adaptor. What a probe
    can't evaluate is said once, in the log. The training goes on as if it hadn't been there: no random number of its
    streams is used.

    Args:
        every: optimiser steps between two rounds.
        probes: names from `agglom.probes.PROBES`.
        data: shard folder or address; left out: the training's.
        train: images of the train split that probes are fitted on.
        val: images of the val split that they choose on.
        test: images of the test split that they are tested on.
        size: pixels of a side that images are resized and cropped to; left out: `data.size` of the training.

    Raises:
        UserError: an unknown probe, or a number below 1.
    """

    def __init__(
        self,
        every: int = 1000,
        probes: Sequence[str] = ("knn",),
        *,
        data: str | None = None,
        train: int = 2000,
        val: int = 500,
        test: int = 500,
        size: int | None = None,
    ) -> None:
        from agglom.probes import PROBES

        for name in probes:
            if name not in PROBES:
                raise UserError(f"trainer.callbacks: OnlineProbes probes: {name!r}; {nearest(name, PROBES)}; take one")
        for key, value in {"every": every, "train": train, "val": val, "test": test}.items():
            if value < 1:
                raise UserError(f"trainer.callbacks: OnlineProbes {key}: {value}; valid: 1 or more; change it")
        self.every, self.probes, self.data, self.size = every, tuple(probes), data, size
        self.limits = {"train": train, "val": val, "test": test}
        self._step = 0
        self._said: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:  # still accumulating
            return
        self._step = step
        if step % self.every == 0:
            with isolate_rng():
                metrics = self.measure(trainer, cast("Distiller", pl_module))
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)  # as Lightning numbers the losses of this step

    def measure(self, trainer: pl.Trainer, module: Distiller) -> dict[str, float]:
        """One round with the weights of now; in a process group all ranks share the features out."""
        from agglom.data import read_index
        from agglom.export import Exported, fold_normalizers
        from agglom.probes.measure import measure

        datamodule = cast(Any, trainer).datamodule
        data = self.data or datamodule.data
        # one place for all ranks: they share the features out
        root = Path(trainer.default_root_dir) / "online_probes" if trainer.world_size > 1 else None
        cache = root or Path(tempfile.mkdtemp(prefix="agglom-probes-"))
        training = module.student.training
        if module.ema is not None:
            module.ema.exchange(module)
        try:
            adaptors = {name: fold_normalizers(head).to(module.device) for name, head in module.heads.items()}
            student = Exported(cast(Any, module.student), adaptors, {})
            towers = {name: getattr(teacher, "text", None) for name, teacher in module.encoders.items()}
            with torch.no_grad():
                found = measure(
                    {"student": student},
                    data,
                    self.probes,
                    cache,
                    text={name: tower for name, tower in towers.items() if isinstance(tower, TextTower)},
                    limits=self.limits,
                    templates=read_index(data).extra.get("templates", "simple"),
                    size=self.size or datamodule.val_view.size,
                )
        finally:
            module.student.train(training)
            if module.ema is not None:
                module.ema.exchange(module)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                shutil.rmtree(cache, ignore_errors=True)
        if found is None:
            return {}
        for entry in found.skipped:
            line = f"{entry['probe']} of {entry['model']}: {entry['reason']}"
            if line not in self._said:
                self._said.add(line)
                log.warning("online probe %s", line)
        return {
            "/".join(["probe", *name.split(" > ")[1:], f"{probe}_{metric}"]): value
            for name, by in found.results.items()
            for probe, result in by.items()
            for metric, value in result.metrics.items()
        }
