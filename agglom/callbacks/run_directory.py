"""The run directory: teacher manifest, what a resumed run must have in common with it, export at the end of fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from agglom.callbacks.ema import WeightEMA
from agglom.callbacks.metrics import drop_rows_after
from agglom.errors import UserError
from agglom.export import write_export
from agglom.students import TimmStudent
from agglom.teachers import Teacher, compare, manifest
from agglom.whole import whole


class RunDirectory(Checkpoint):
    """Keeps what design and users expect in `trainer.default_root_dir`.

    - `teachers.json` at the start; a resume with other teachers is refused. Checkpoints hold the same manifest, and
      what the model was built from.
    - `metrics.csv` goes on at the step that is resumed; rows past it are removed.
    - `export/` at the end of fit, from the averaged weights where they are kept.

    A `Checkpoint` by type, so that Lightning runs it after every other callback, on settled weights.

    Args:
        size: pixels of a side of the training images, for the export's input contract.
        resumed: what the checkpoint that the run goes on from says of itself (`origin_of`); None for a new run.
        model: the configuration of the model, as plain data.
    """

    def __init__(
        self, size: int, resumed: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
    ) -> None:
        self.size, self.resumed, self.model = size, resumed, dict(model or {})
        self.exported = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "teachers.json"
        current = manifest(cast("dict[str, Teacher]", pl_module.frozen))
        if self.resumed is not None:
            before = self.resumed.get("teachers")
            if before is None and path.is_file():
                before = json.loads(path.read_text())
            if before and (differences := compare(before, current)):
                raise UserError(
                    f"{path}: the run was started with other teachers: {'; '.join(differences)}; start a new run"
                )
        self._manifest = current
        if trainer.is_global_zero:  # alone: two processes that rewrite a file are in each other's way
            if self.resumed is not None:
                drop_rows_after(path.with_name("metrics.csv"), self.resumed["step"])
            with whole(path, owner="run") as scratch:
                scratch.write_text(json.dumps(current, indent=2) + "\n")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["agglom"] = {"teachers": self._manifest, "model": self.model}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.export(trainer, pl_module)

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the export of the weights of now."""
        self.exported = True
        if not trainer.is_global_zero:
            return
        average = next((c for c in trainer.callbacks if isinstance(c, WeightEMA)), None)
        if average is not None:
            average.exchange(pl_module)
        root = Path(trainer.default_root_dir)
        export_module(pl_module, root / "export", self._manifest, self.size, trainer.global_step, run=root)
        if average is not None:
            average.exchange(pl_module)


def origin_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it: `step` and, where known, `teachers` (a manifest) and `model`."""
    return {**checkpoint.get("agglom", {}), "step": checkpoint["global_step"]}


# what the weights of a checkpoint mean: of the model as a whole, and of each teacher
OF_MODEL = ("student", "adaptor", "normalizer", "summary_normalizer")
OF_TEACHER = ("adaptor", "normalizer", "summary_normalizer")
ANYWAY = ("pretrained",)  # where weights came from doesn't matter once they are in a checkpoint


def model_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two configurations of a model differ in student, adaptors, normalisers and names of teachers, a line each.

    A key that only one of them has is left alone: versions of this package may differ in it.
    """
    lines = [line for key in OF_MODEL for line in _differences(f"model.{key}", before.get(key), now.get(key))]
    old, new = before.get("teachers", {}), now.get("teachers", {})
    lines += [f"teacher {name}: gone" for name in old if name not in new]
    lines += [f"teacher {name}: new" for name in new if name not in old]
    for name in [name for name in old if name in new]:
        for key in OF_TEACHER:
            lines += _differences(f"model.teachers.{name}.{key}", old[name].get(key), new[name].get(key))
    return lines


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in before:
            if name in now and name not in ANYWAY:
                yield from _differences(f"{key}.{name}", before[name], now[name])
    elif before != now:
        yield f"{key} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> Any:
    return value.get("class_path", value) if isinstance(value, Mapping) else value


def export_module(
    module: pl.LightningModule,
    out: Path,
    teachers: dict[str, Any],
    size: int,
    step: int,
    adaptors: Sequence[str] | None = None,
    run: Path | None = None,
) -> Path:
    """Write the export of a distiller with the weights that it holds now, with all or only some of its adaptors."""
    heads = {name: head for name, head in module.heads.items() if adaptors is None or name in adaptors}
    return write_export(
        out, student=cast(TimmStudent, module.student), heads=heads, teachers=teachers, size=size, step=step, run=run
    )
