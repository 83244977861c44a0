"""The run directory: teacher manifest, graceful stop, export at the end of fit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Sequence, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from agglom.callbacks.ema import WeightEMA
from agglom.errors import UserError
from agglom.export import write_export
from agglom.students import TimmStudent
from agglom.teachers import Teacher, compare, manifest


class Stopped(BaseException):
    """Training was asked to stop and did, with a checkpoint written. Carries the signal's number and the path."""

    def __init__(self, signum: int, path: Path, step: int) -> None:
        self.signum, self.path, self.step = signum, path, step
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {path} holds it")


class RunDirectory(Checkpoint):
    """Keeps what design and users expect in `trainer.default_root_dir`.

    - `teachers.json` at the start; a resume with other teachers is refused.
    - Ctrl-C, SIGTERM and SIGUSR1 end the running step, write checkpoints/last.ckpt and raise `Stopped`
      (single process; several ranks leave signals to Lightning).
    - a checkpoint and `export/` at the end of fit, from the averaged weights where they are kept.

    A `Checkpoint` by type, so that Lightning runs it after every other callback, on settled weights.

    Args:
        size: pixels of a side of the training images, for the export's input contract.
        resuming: the run goes on from a checkpoint, so its teachers must be the ones that it started with.
    """

    def __init__(self, size: int, resuming: bool = False) -> None:
        self.size, self.resuming = size, resuming
        self._signum: int | None = None
        self._path: Path | None = None  # of the checkpoint that was written on a signal
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "teachers.json"
        current = manifest(cast("dict[str, Teacher]", pl_module.frozen))
        if self.resuming and path.is_file():
            differences = compare(json.loads(path.read_text()), current)
            if differences:
                raise UserError(
                    f"{path}: the run was started with other teachers: {'; '.join(differences)}; start a new run"
                )
        self._manifest = current
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(current, indent=2) + "\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[signum] = signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:  # the second Ctrl-C doesn't wait
            raise KeyboardInterrupt
        self._signum = signum
        print(f"\n{signal.Signals(signum).name}: finishing the step, then writing a checkpoint", flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._signum is None:
            return
        self._path = checkpoint_path(trainer.default_root_dir)
        trainer.save_checkpoint(self._path, weights_only=False)  # False: with the optimiser

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not at the end of the batch: Lightning logs a step's metrics only after that hook.
        if self._path is not None and self._signum is not None:
            raise Stopped(self._signum, self._path, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_signals()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_signals()
        trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir), weights_only=False)  # on every rank
        if not trainer.is_global_zero:
            return
        average = next((c for c in trainer.callbacks if isinstance(c, WeightEMA)), None)
        if average is not None:
            average.exchange(pl_module)
        export_module(
            pl_module, Path(trainer.default_root_dir) / "export", self._manifest, self.size, trainer.global_step
        )
        if average is not None:
            average.exchange(pl_module)

    def _restore_signals(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def checkpoint_path(root: str | Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return Path(root) / "checkpoints" / "last.ckpt"


def export_module(
    module: pl.LightningModule,
    out: Path,
    teachers: dict[str, Any],
    size: int,
    step: int,
    adaptors: Sequence[str] | None = None,
) -> Path:
    """Write the export of a distiller with the weights that it holds now, with all or only some of its adaptors."""
    heads = {name: head for name, head in module.heads.items() if adaptors is None or name in adaptors}
    return write_export(
        out, student=cast(TimmStudent, module.student), heads=heads, teachers=teachers, size=size, step=step
    )
