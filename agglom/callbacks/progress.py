"""The progress line: images/s, data wait, loss by teacher, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agglom.memory import peak_memory


class TrainingProgress(pl.Callback):
    """A bar in a terminal, a plain line every `every_s` seconds elsewhere; at the end the peak of memory.

    Also logs `train/images_per_s` (over all ranks) and `train/data_wait` (share of the time since the last report
    that the step waited for its batch) with the trainer's own logging interval, and `train/bad_samples`: how many rank
    0's readers have skipped since the process began.

    Args:
        every_s: seconds between plain lines.
    """

    def __init__(self, every_s: float = 15.0) -> None:
        self.every_s = every_s
        self._bar: Progress | None = None
        self._mark = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.global_step
        self._note = "starting"
        self._started = self._mark = self._said = time.perf_counter()
        self._images = 0
        self._window = [0.0, 0.0, 0]  # seconds, seconds waiting, images since the last log
        if trainer.is_global_zero and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]fit"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=Console(soft_wrap=True),
            )  # fmt: skip
            self._task = self._bar.add_task("fit", total=trainer.max_steps, completed=self._first, note="")
            self._bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._window[1] += time.perf_counter() - self._mark

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        images = len(batch["image"]) * trainer.world_size
        self._window[0] += now - self._mark
        self._window[2] += images
        self._images += images
        self._mark = now
        step = trainer.global_step
        often = trainer.log_every_n_steps  # 0: no metrics at all
        if step and often and step % often == 0 and self._window[0] > 0:
            seconds, waiting, seen = self._window
            metrics = {"train/images_per_s": seen / seconds, "train/data_wait": waiting / seconds}
            bad = getattr(getattr(trainer, "datamodule", None), "bad_samples", None)
            if bad is not None:
                metrics["train/bad_samples"] = float(bad)
            pl_module.log_dict(metrics, rank_zero_only=True)
            self._window = [0.0, 0.0, 0]
            self._note = f"{metrics['train/images_per_s']:.0f} img/s, wait {100 * metrics['train/data_wait']:.1f} %"
            self._note += f", {bad} bad samples skipped" if bad else ""
        self._say(trainer, step, now)

    def _say(self, trainer: pl.Trainer, step: int, now: float) -> None:
        if not trainer.is_global_zero:
            return
        last = step >= trainer.max_steps > 0
        if self._bar is None and now - self._said < self.every_s and not last:
            return
        if self._bar is not None and step % (trainer.log_every_n_steps or 50) and not last:
            self._bar.update(self._task, completed=step)
            return
        note = ", ".join([self._note, *_losses(trainer.logged_metrics)])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        if now == self._said:
            return
        self._said = now
        left = (now - self._started) / max(step - self._first, 1) * max(trainer.max_steps - step, 0)
        print(f"step {step}/{trainer.max_steps}, {note}, {_clock(left)} left", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()  # validation is neither training nor waiting

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if trainer.is_global_zero:
            print(peak_memory(pl_module.device), flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _losses(metrics: dict[str, Any]) -> list[str]:
    """`loss 0.512`, then each teacher's, from the metrics that the distiller logs."""
    chosen = {k: v for k, v in metrics.items() if k.startswith("train/") and k.count("/") == 2 and k.endswith("/loss")}
    total = [f"loss {float(metrics['train/loss']):.3f}"] if "train/loss" in metrics else []
    return total + [f"{name.split('/')[1]} {float(value):.3f}" for name, value in chosen.items()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
