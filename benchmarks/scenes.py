"""What the benchmarks on fashion scenes share: students trained in this process, their probes, results that last."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import lightning.pytorch as pl
import torch

from agglom.adaptors import MLPAdaptor
from agglom.balance import Balance, Equal
from agglom.checks import read_yaml
from agglom.data import ShardDataModule, ViewOptions, read_index
from agglom.data.crops import CropOptions
from agglom.distiller import Distiller, ObjectiveFactory
from agglom.export import Exported, load, write_export
from agglom.features import Backbone
from agglom.heads import AdaptorFactory, NormalizerFactory, TeacherConfig
from agglom.probes import run_probes
from agglom.shifts import ShiftOptions
from agglom.students import TimmStudent
from agglom.targets import Memory, Standardize
from agglom.teachers import TinyTeacher, manifest

DEMO = read_yaml("configs/demo.yaml")[0]  # its student, its size and the view that lets teachers be remembered
TEACHERS = tuple(DEMO["model"]["teachers"])
COLUMNS = {"knn": "top1", "linear": "top1", "zeroshot": "top1", "segmentation": "miou"}  # probe -> metric
MEMORY = {name: Memory() for name in TEACHERS}  # the teachers never change, so all runs share what they said

Row = dict[str, float]  # column -> fraction; zero-shot only where there is a text side


@dataclass(frozen=True)
class Recipe:
    """From whom a student learns, and how.

    Attributes:
        teachers: names of embedded teachers.
        adaptor: of all teachers.
        normalizer: of all teachers' targets.
        balance: a run's seed -> balance.
        weights: teacher -> its options `summary_weight` and `spatial_weight`; 1 each where left out.
        student: the student, untrained.
        objectives: name -> objective beside the teachers.
        ema_decay: of the average that objectives ask and that is exported. None: no average; the schedule ends near 0,
            and one copy fewer is faster.
        crops: of the images, for objectives that need them.
        shift: of the views against each other. Then every view is new, and teachers run at each step.
    """

    teachers: tuple[str, ...] = TEACHERS
    adaptor: AdaptorFactory = MLPAdaptor
    normalizer: NormalizerFactory = Standardize
    balance: Callable[[int], Balance] = lambda seed: Equal()
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    student: Callable[[], TimmStudent] = partial(TimmStudent, **DEMO["model"]["student"]["init_args"])
    objectives: Mapping[str, ObjectiveFactory] = field(default_factory=dict)
    ema_decay: float | None = None
    crops: CropOptions | None = None
    shift: ShiftOptions | None = None


def parser(doc: str | None, *, name: str, steps: int, lr: float) -> argparse.ArgumentParser:
    """The options that `train`, `probe` and `conditions` read."""
    out = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    out.add_argument("--data", default="data/scenes")
    out.add_argument("--out", type=Path, default=Path("runs") / name)
    out.add_argument("--steps", type=int, default=steps)
    out.add_argument("--batch-size", type=int, default=DEMO["data"]["batch_size"])
    out.add_argument("--lr", type=float, default=lr)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--train", type=int, default=3000, help="images the probes are fitted on")
    out.add_argument("--test", type=int, default=1000, help="images the probes are tested on")
    return out


def train(recipe: Recipe, seed: int, options: argparse.Namespace, out: Path, *, bf16: bool = False) -> Exported:
    """One student -> its export."""
    pl.seed_everything(seed, verbose=False)
    encoders = {name: TinyTeacher(name, dtype="bf16" if bf16 else "fp32") for name in recipe.teachers}
    size = DEMO["data"]["size"]
    student = recipe.student()
    module = Distiller(
        student=student,
        teachers={name: TeacherConfig(e, **recipe.weights.get(name, {})) for name, e in encoders.items()},
        adaptor=recipe.adaptor,
        normalizer=recipe.normalizer,
        balance=recipe.balance(seed),
        lr=options.lr,
        warmup_steps=DEMO["model"]["warmup_steps"],
        objectives=dict(recipe.objectives),
        ema_decay=recipe.ema_decay,
        shift=recipe.shift,
        remember_teachers=recipe.shift is None,
    )
    if module.memories:
        module.memories = {name: MEMORY[name] for name in recipe.teachers}
    data = ShardDataModule(
        data=options.data,
        batch_size=options.batch_size,
        size=size,
        view=ViewOptions(**DEMO["data"]["view"]),
        val_split=None,
        num_workers=1,
        seed=seed,
        margin=recipe.shift.limit * student.input.stride if recipe.shift else 0,
        crops=recipe.crops,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if bf16 else "32-true",
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    if module.ema is not None:
        module.ema.exchange(module)  # what a run exports
    heads = dict(module.heads.items())
    write_export(out, student=module.student, heads=heads, teachers=manifest(encoders), size=size, step=options.steps)
    return load(out)


def probe(
    models: Mapping[str, Backbone], options: argparse.Namespace, out: Path, columns: Mapping[str, str] = COLUMNS
) -> dict[str, Row]:
    """Every column for every model."""
    report = run_probes(
        models,
        data=options.data,
        probes=tuple(columns),
        out=out,
        student=next(iter(models)),
        text={"clip": TinyTeacher("clip").text},
        templates=read_index(options.data).extra["templates"],
        limits={"train": options.train, "val": options.test // 2, "test": options.test},
    )
    return {
        name: {column: found[column][metric] for column, metric in columns.items() if column in found}
        for name, found in report["models"].items()
        if name in models  # and not once more through each adaptor
    }


class Results:
    """Key -> model -> its row, in a file that is written after each key, so that a run cut short goes on from there.

    Args:
        path: the file.
        settings: what has to be the same for results to stand in one table.

    Raises:
        SystemExit: the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings, self.started = path, dict(settings), time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        old = self.kept.get("settings", self.settings)
        other = [f"{k} {old.get(k)} instead of {v}" for k, v in self.settings.items() if old.get(k) != v]
        if other:
            raise SystemExit(f"{path} holds results of other settings: {', '.join(other)}; choose another --out")

    def __contains__(self, key: str) -> bool:
        return key in self.kept

    def __getitem__(self, key: str) -> dict[str, Row]:
        return self.kept[key]

    def keep(self, key: str, rows: Mapping[str, Row]) -> None:
        self.kept |= {"settings": self.settings, key: rows}
        self.path.write_text(json.dumps(self.kept, indent=1) + "\n")
        print(f"{time.perf_counter() - self.started:.0f} s {key}: {rows}", flush=True)

    def by_model(self, keys: Iterable[str]) -> dict[str, list[Row]]:
        """Model -> its rows under these keys."""
        out: dict[str, list[Row]] = {}
        for key in keys:
            for name, row in self.kept[key].items():
                out.setdefault(name, []).append(row)
        return out


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation, to one decimal; a dash for nothing."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def apart(these: Sequence[float], those: Sequence[float]) -> bool:
    """Whether several runs of each don't overlap: all of these above all of those, or below."""
    return min(len(these), len(those)) > 1 and (min(these) > max(those) or max(these) < min(those))


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, *rows]).replace(
        "\n", "\n|" + "---|" * len(head) + "\n", 1
    )


def conditions(options: argparse.Namespace) -> str:
    """A table's first line, as far as it is the same for all."""
    return (
        f"{options.steps} steps of {options.batch_size} scenes, {len(options.seeds)} seeds, probes fitted on "
        f"{options.train} and tested on {options.test} scenes, {platform.machine()}, torch {torch.__version__}; "
        f"percent, mean ± standard deviation over seeds"
    )
