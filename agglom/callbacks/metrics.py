"""metrics.csv of a run directory: one file over all resumptions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from agglom.whole import whole


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, writing DIR/metrics.csv itself and continuing a file that is there.

    Lightning's own deletes the file of an earlier start, so a resumed run would lose its curves.

    Args:
        save_dir: the run directory.
        flush_logs_every_n_steps: how often the file is written.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ContinuingWriter(log_dir=self.log_dir)
        return self._experiment


class OnlyFresh(pl.Callback):
    """Keeps out of a logged step's row what was measured at another step.

    Lightning goes on reporting the last value of everything that was ever logged in training: of a teacher that has
    left, of an objective that has stopped, of what is measured only now and then. A resumed run couldn't know them.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            results = trainer.fit_loop.epoch_loop._results
            results.clear()


class _ContinuingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _write(path, fieldnames, rows)


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of metrics.csv past `step`: the run resumes there and will write them again.

    So does a row that a killed process has written only in part.
    """
    if not path.is_file():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        rows = [row for row in reader if None not in row.values() and row["step"].isdigit() and int(row["step"]) < step]
    _write(path, names, rows)


def _write(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    """The whole file anew; a process that is killed meanwhile leaves the old one."""
    with whole(path, owner="run") as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
