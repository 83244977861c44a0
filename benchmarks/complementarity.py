"""Does a student of several teachers beat the students of each one? Equal steps, several seeds, one protocol.

    python benchmarks/complementarity.py --data data/scenes --steps 600 --seeds 0 1 2

Trains one student from each embedded teacher and one from all of them, then evaluates teachers, students and a student
before training with kNN, linear, zero-shot and segmentation probes and with instance retrieval (an edited copy of a
test scene finds its original by cosine similarity). Prints one table, mean +- standard deviation over the seeds, and
writes it to --out as JSON and Markdown. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.adaptors import LinearAdaptor
from agglom.data import ShardDataModule, ViewOptions, eval_loader, read_index
from agglom.demo import fast_bf16
from agglom.distiller import Distiller
from agglom.export import load, random_like, write_export
from agglom.features import Backbone
from agglom.heads import TeacherConfig
from agglom.probes import run_probes
from agglom.students import TimmStudent
from agglom.targets import Memory
from agglom.teachers import TinyTeacher, manifest

TEACHERS = ("clip", "dino", "sam")
COLUMNS = {"knn": "top1", "linear": "top1", "zeroshot": "top1", "segmentation": "miou", "instance": "top1"}
WEIGHTS = {"clip": (3.0, 2.0)}  # summary, spatial; as in configs/demo.yaml
MEMORY = {name: Memory() for name in TEACHERS}  # the teachers never change, so all runs share what they said


def train(names: tuple[str, ...], seed: int, options: argparse.Namespace, out: Path) -> Any:
    """One student of the named teachers -> its export."""
    pl.seed_everything(seed, verbose=False)
    bf16 = fast_bf16()
    encoders = {name: TinyTeacher(name, dtype="bf16" if bf16 else "fp32") for name in names}
    size = {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 8}  # as in configs/demo.yaml
    module = Distiller(
        student=TimmStudent(name="resnet10t", kwargs=size),
        teachers={name: TeacherConfig(encoder, *WEIGHTS.get(name, ())) for name, encoder in encoders.items()},
        adaptor=LinearAdaptor,
        lr=options.lr,
        warmup_steps=50,
        ema_decay=None,  # the schedule ends near 0, and one copy fewer is faster
        remember_teachers=True,
    )
    module.memories = {name: MEMORY[name] for name in names}
    data = ShardDataModule(
        data=options.data,
        batch_size=options.batch_size,
        size=64,
        view=ViewOptions(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
        val_split=None,
        num_workers=1,
        seed=seed,
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
    heads = dict(module.heads.items())
    write_export(out, student=module.student, heads=heads, teachers=manifest(encoders), size=64, step=options.steps)
    return load(out)


@torch.inference_mode()
def instance_retrieval(model: Backbone, data: str, limit: int, seed: int = 0) -> float:
    """R@1 of edited copies: shifted by up to 6 px, mirrored half of the time, brightness 0.7 to 1.3.

    Vectors are the summary and the mean of the map, each normalised, side by side.
    """
    generator = torch.Generator().manual_seed(seed)
    originals, copies = [], []
    for batch in eval_loader(read_index(data), "test", fields=("image",), batch_size=100, limit=limit, num_workers=0):
        images = batch["image"].float() / 255
        originals.append(_vectors(model, images))
        copies.append(_vectors(model, torch.stack([_edit(image, generator) for image in images])))
    gallery, queries = torch.cat(originals), torch.cat(copies)
    return float(((queries @ gallery.T).argmax(1) == torch.arange(len(queries))).float().mean())


def _edit(image: Tensor, generator: torch.Generator) -> Tensor:
    down, right, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (13, 13, 2))
    padded = F.pad(image[None], (6, 6, 6, 6), mode="reflect")[0]
    height, width = image.shape[-2:]
    shifted = padded[:, down : down + height, right : right + width]
    bright = 0.7 + 0.6 * float(torch.rand((), generator=generator))
    return ((shifted.flip(-1) if mirrored else shifted) * bright).clamp(0, 1)


def _vectors(model: Backbone, images: Tensor) -> Tensor:
    summary, spatial = model(images)
    parts = [x for x in (summary, None if spatial is None else spatial.mean((2, 3))) if x is not None]
    return F.normalize(torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1), dim=1)


def evaluate(models: dict[str, Backbone], options: argparse.Namespace, out: Path) -> dict[str, dict[str, float]]:
    """All five columns for each model, as fractions; zero-shot only where there is a text side."""
    clip = TinyTeacher("clip")
    report = run_probes(
        models,
        data=options.data,
        probes=("knn", "linear", "segmentation", "zeroshot"),
        out=out,
        student=next(iter(models)),
        text={"clip": clip.text},
        templates=read_index(options.data).extra["templates"],
        limits={"train": options.train, "val": options.test // 2, "test": options.test},
    )
    rows = {}
    for name, model in models.items():
        found = report["models"][name]
        rows[name] = {p: found[p][m] for p, m in COLUMNS.items() if p in found}
        rows[name]["instance"] = instance_retrieval(model, options.data, options.test)
    return rows


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one row a model, mean +- standard deviation in percent; the mean is over the columns that all have."""
    common = [column for column in COLUMNS if column != "zeroshot"]
    lines = ["| model | kNN | linear | zero-shot | segmentation mIoU | instance R@1 | mean without zero-shot |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, rows in results.items():
        cells = [[100 * row[c] for row in rows if c in row] for c in COLUMNS]
        cells.append([100 * statistics.mean(row[c] for c in common) for row in rows])
        lines.append(f"| {name} | " + " | ".join(_cell(values) for values in cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="data/scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/complementarity"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=3000, help="images the probes are fitted on")
    parser.add_argument("--test", type=int, default=1000, help="images the probes are tested on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    students = {**{f"student of {name}": (name,) for name in TEACHERS}, "student of all three": TEACHERS}
    started = time.perf_counter()

    def keep(key: str, rows: dict[str, dict[str, float]]) -> None:
        kept[key] = rows
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{time.perf_counter() - started:.0f} s {key}: {rows}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for title, names in students.items():
                key = f"{title}, seed {seed}, {options.steps} steps"
                if key not in kept:
                    student = train(names, seed, options, Path(scratch) / "export")
                    models: dict[str, Backbone] = {title: student}
                    if names == TEACHERS:
                        models["student before training"] = random_like(student, seed)
                    keep(key, evaluate(models, options, Path(scratch) / "probes"))
        if "teachers" not in kept:
            rows = evaluate({name: TinyTeacher(name) for name in TEACHERS}, options, Path(scratch) / "teachers")
            keep("teachers", {f"teacher {name}": row for name, row in rows.items()})
    results: dict[str, list[dict[str, float]]] = {}
    for rows in [kept["teachers"], *(kept[k] for k in kept if f"{options.steps} steps" in k)]:
        for name, row in rows.items():
            results.setdefault(name, []).append(row)
    text = (
        f"{options.steps} steps of {options.batch_size} scenes, {len(options.seeds)} seeds, probes fitted on "
        f"{options.train} and tested on {options.test} scenes, {platform.machine()}, torch {torch.__version__}; "
        f"percent, mean ± standard deviation over seeds\n\n{table(results)}\n"
    )
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
