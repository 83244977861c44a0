"""Whether a long training leaks: resident memory, open files and threads over its steps.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--quick] [--json FILE] [--data SHARDS]

Trains the demo's recipe, with workers and checkpoints, and looks at its own process and its workers' every `--every`
steps. The first quarter is left out: shuffle buffers, allocators and caches fill. What is told is the line of least
squares through the rest, and whether it grows by more than `FLAT` of the level over the run; and whether the numbers of
open files and threads are the same throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, Sequence

import lightning.pytorch as pl
import torch
from ladder import machine

from agglom.callbacks import Checkpoints, RandomState, RunCSVLogger, TrainingProgress
from agglom.checks import read_yaml
from agglom.data import ShardDataModule, ViewOptions
from agglom.distiller import Distiller
from agglom.fit import TRAINER_DEFAULTS
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent, attend_plainly
from agglom.teachers import TinyTeacher
from probes import pictures

FLAT = 0.02  # growth of memory over the steps that count, as a part of its level


class Look(pl.Callback):
    """Memory, files and threads of this process and its children at every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.rows.append({"step": trainer.global_step, **usage()})


def usage() -> dict[str, float]:
    """Of this process and its children: MiB, open files, threads.

    Memory is what isn't a file's (libraries are shared with whatever else runs), in proportion where they share it.
    """
    mine = os.getpid()
    out = {"mib": 0.0, "files": 0, "threads": 0}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
            if int(entry.name) != mine and int(status["PPid"]) != mine:
                continue
            kinds = [x.split() for x in (entry / "smaps_rollup").read_text().splitlines()]
            out["mib"] += sum(int(x[1]) for x in kinds if x[0] in ("Pss_Anon:", "Pss_Shmem:")) / 1024
            out["files"] += len(list((entry / "fd").iterdir()))
            out["threads"] += int(status["Threads"])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return out


def soak(data: str, steps: int, every: int, workers: int, batch: int) -> list[dict[str, float]]:
    """Train; returns what was seen."""
    torch.manual_seed(0)
    demo = read_yaml("configs/demo.yaml")[0]
    teachers = {name: TeacherConfig(TinyTeacher(name)) for name in demo["model"]["teachers"]}
    module = Distiller(TimmStudent(**demo["model"]["student"]["init_args"]), teachers)
    attend_plainly(module)
    source = ShardDataModule(
        data=data, batch_size=batch, size=demo["data"]["size"], view=ViewOptions(), num_workers=workers, val_split=None,
        shuffle=200,
    )  # fmt: skip
    look = Look(every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **{**TRAINER_DEFAULTS, "log_every_n_steps": 20},
            accelerator="cpu", max_steps=steps, logger=RunCSVLogger(folder), default_root_dir=folder,
            callbacks=[TrainingProgress(every_s=60), RandomState(), Checkpoints(every=max(1, steps // 10)), look],
        )  # fmt: skip
        trainer.fit(module, datamodule=source)
    return look.rows


def line(rows: Sequence[dict[str, float]]) -> tuple[float, float]:
    """MiB that the line of least squares grows from the first row to the last, and the deviation from it."""
    steps, mib = [row["step"] for row in rows], [row["mib"] for row in rows]
    slope = statistics.linear_regression(steps, mib).slope
    rest = [m - slope * s for m, s in zip(mib, steps, strict=True)]
    return slope * (steps[-1] - steps[0]), statistics.stdev(rest)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print what was seen; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", help="shards with images; default: some are made up")
    parser.add_argument("--quick", action="store_true", help="400 steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps = min(args.steps, 400)
    about = machine("cpu")
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(pictures(Path(folder) / "data", 1024))
        rows = soak(data, args.steps, max(1, args.steps // 80), args.workers, args.batch)
    settled = rows[len(rows) // 4 :]
    growth, noise = line(settled)
    level = statistics.mean(row["mib"] for row in settled)
    over = settled[-1]["step"] - settled[0]["step"]
    print(f"memory: {level:.0f} MiB, {growth:+.1f} MiB over {over:.0f} steps, noise {noise:.1f} MiB")
    third = len(settled) // 3
    parts = [line(settled[at * third : (at + 1) * third])[0] for at in range(3)]
    print(f"its thirds: {', '.join(f'{part:+.1f}' for part in parts)} MiB")  # what only settles grows less and less
    counts = {key: sorted({int(row[key]) for row in settled}) for key in ("files", "threads")}
    for key, values in counts.items():
        print(f"{key}: {', '.join(map(str, values))}: {'constant' if len(values) == 1 else 'CHANGED'}")
    flat = growth <= FLAT * level
    print(f"memory grows by at most {100 * FLAT:.0f} %: {'met' if flat else 'MISSED'} ({100 * growth / level:+.2f} %)")
    result = {"machine": about, "rows": rows, "growth_mib": growth, "noise_mib": noise, "level_mib": level, **counts}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
