"""Checkpoints while a run goes on: every so many steps or minutes, on a signal, and at the end."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from agglom.callbacks.checkpoint_files import checkpoint_path, publish, remove_temporaries, temporary_path
from agglom.callbacks.guard import NotFinite
from agglom.errors import UserError


class Stopped(BaseException):
    """Training was asked to stop and did, with a checkpoint written. Carries the signal's number and the path."""

    def __init__(self, signum: int, path: Path, step: int) -> None:
        self.signum, self.path, self.step = signum, path, step
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {path} holds it")


class Checkpoints(Checkpoint):
    """Writes checkpoints/last.ckpt of the run directory, each time whole or not at all, and keeps the last few.

    A checkpoint is of a whole optimiser step with its metrics logged and its validation done, if one was due: it is
    written when the next step begins. Ctrl-C, SIGTERM and SIGUSR1 end the running step, write one and raise `Stopped`.
    Of several ranks, the first one has to get the signal (launchers send it to all), and they stop at the same step;
    Ctrl-C is Lightning's there.

    A `Checkpoint` by type, so that Lightning runs it after every other callback, on settled weights.

    Args:
        every: optimiser steps between checkpoints.
        minutes: the longest time between two; null for no such limit.
        keep: how many of the last ones are kept.

    Raises:
        UserError: a number that makes no sense.
    """

    ASKED = 100  # steps after which several ranks ask the first one whether the time is up: a device waits for that

    def __init__(self, every: int = 500, minutes: float | None = 30, keep: int = 2) -> None:
        for key, value in {"checkpoint_every": every, "checkpoint_keep": keep}.items():
            if value < 1:
                raise UserError(f"{key}: {value}; valid: 1 or more; change it")
        if minutes is not None and not minutes > 0:
            raise UserError(f"checkpoint_minutes: {minutes}; valid: more than 0, or null; change it")
        self.every, self.minutes, self.keep = every, minutes, keep
        self._signum: int | None = None
        self._path: Path | None = None  # of the checkpoint that was written on a signal
        self._previous: dict[int, Any] = {}
        self._whole = False  # the last batch ended an optimiser step
        self._due = False
        self._between = False
        self.stopped: Stopped | None = None  # what several ranks end with

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.is_global_zero:
            remove_temporaries(trainer.default_root_dir)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _StraightToDisk()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._saved, self._first = trainer.global_step, time.monotonic(), True
        # Lightning's own handler of SIGTERM talks to the other ranks from within, whatever they are about to say.
        ours = (signal.SIGTERM, signal.SIGUSR1)
        for signum in (signal.SIGINT, *ours) if trainer.world_size == 1 else ours:
            self._previous[signum] = signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:  # the second Ctrl-C doesn't wait
            raise KeyboardInterrupt
        self._signum = signum
        print(f"\n{signal.Signals(signum).name}: finishing the step, then writing a checkpoint", flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._whole = trainer.global_step != self._step
        if not self._whole:  # still accumulating
            return
        self._step = trainer.global_step
        self._due = self._step % self.every == 0 or self._late(trainer)
        if self._signum is None:
            return
        if trainer.world_size > 1:  # Lightning asks the first rank for this before each batch, and ends them all
            cast(Any, trainer)._signal_connector.received_sigterm = True
        else:  # a validation may come first, and who sent the signal may not wait for it
            self._path = self._save(trainer)

    def _late(self, trainer: pl.Trainer) -> bool:
        if self.minutes is None:
            return False
        late = time.monotonic() - self._saved > 60 * self.minutes
        if trainer.world_size == 1:
            return late
        return self._step % self.ASKED == 0 and trainer.strategy.broadcast(late)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._path = None  # a resume from what was written before would leave the validation out

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not at the end of the batch before: Lightning logs a step's metrics, and validates, only after that hook.
        if self._first:  # metrics are numbered by this counter, and Lightning's resume may leave it one off
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._first = False
        asked = self._signum is not None and trainer.world_size == 1
        if self._whole and (self._due or asked) and self._path is None:
            self._between = True
            path = self._save(trainer)
            self._between = False
            if asked:
                self._path = path
        self._due = False
        if self._path is not None and self._signum is not None:
            raise Stopped(self._signum, self._path, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._between:
            return
        # The batch that is about to begin is counted as ready; what resumes will fetch it again.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part] = {**progress[part], "ready": progress[part]["ready"] - 1}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_signals()
        if isinstance(exception, SIGTERMException) and trainer.world_size > 1 and self._whole:  # on every rank
            self.stopped = Stopped(self._signum or signal.SIGTERM, self._save(trainer), trainer.global_step)
        elif isinstance(exception, NotFinite):  # nothing of it is in the weights
            batches = trainer.fit_loop.epoch_loop.batch_progress.current
            self._between = batches.ready > batches.completed
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_signals()
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> Path:
        """On every rank."""
        for logger in trainer.loggers:
            logger.save()  # a resume begins with the curves up to here
        root = trainer.default_root_dir
        try:
            trainer.save_checkpoint(temporary_path(root), weights_only=False)  # False: with the optimiser
            if trainer.is_global_zero:
                publish(root, trainer.global_step, self.keep)
        except BaseException:
            if trainer.is_global_zero:
                remove_temporaries(root)
            raise
        self._saved = time.monotonic()
        return checkpoint_path(root)

    def _restore_signals(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class _StraightToDisk(TorchCheckpointIO):
    """Lightning's own builds the file in memory first, and moves it from the system's folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)  # `publish` waits for the disk
