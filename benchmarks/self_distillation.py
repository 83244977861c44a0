"""What self-distillation adds to several frozen teachers: equal optimiser steps, several seeds.

    python benchmarks/self_distillation.py --data data/scenes --steps 300 --batch-size 16 --train 2000

A small ViT learns from all three embedded teachers, whose views and its own are shifted against each other. Variants
add one objective each: dino and ibot, mesa, a Gram anchor, a Gram anchor of twice the resolution. Everything else is
the same for all. Columns: kNN, segmentation, and the error of the map when the image is shifted by a cell or by half a
cell (`agglom.probes.shift`; less is better). Prints one table, mean +- standard deviation over the seeds, and writes it
to --out as JSON and Markdown. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Mapping, Sequence

import torch
from scenes import COLUMNS as PROBED
from scenes import TEACHERS, Recipe, Results, Row, apart, cell, conditions, markdown, parser, probe, train

from agglom.data import eval_loader, read_index
from agglom.data.crops import CropOptions
from agglom.export import Exported, random_like
from agglom.features import Backbone
from agglom.probes.shift import shift_errors
from agglom.selfdistill import Dino, GramAnchor, Mesa
from agglom.shifts import ShiftOptions
from agglom.students import TimmStudent
from agglom.teachers import TinyTeacher

STUDENT = partial(  # a ViT for the masks of ibot; its stem of convolutions learns from few images, any size for gram
    TimmStudent,
    name="vit_tiny_r_s16_p8_224",
    kwargs={"img_size": 64, "patch_size": 2, "depth": 4, "mlp_ratio": 3.0, "dynamic_img_size": True},
)
BASE = "teachers alone"
ALONE = Recipe(student=STUDENT, ema_decay=0.99, shift=ShiftOptions(std=0.5, limit=1))
# options and crops of configs/recipes/tiny_siglip2_tail.yaml
DINO = partial(Dino, weight=0.25, ibot_weight=0.25, prototypes=512, hidden=256, bottleneck=64)
CROPS = CropOptions(global_size=64, local_size=32, global_crops=1, local_crops=4)
LATE = 0.5  # of the run: an anchor has to know something
CONFIGURATIONS = {
    BASE: ALONE,
    "+ dino, ibot": replace(ALONE, objectives={"self": DINO}, crops=CROPS),
    "+ mesa": replace(ALONE, objectives={"mesa": Mesa}),
    "+ gram": replace(ALONE, objectives={"gram": partial(GramAnchor, start=LATE)}),
    "+ gram at 2x": replace(ALONE, objectives={"gram": partial(GramAnchor, start=LATE, scale=2)}),
}
UNTRAINED = "student before training"
TITLES = {
    "knn": "kNN top-1",
    "segmentation": "segmentation mIoU",
    "cell": "shift error, 1 cell",
    "half": "shift error, 1/2 cell",
}
SHIFTS = {"cell": 8, "half": 4}  # pixels up, down, left and right


def shifted(model: Backbone, data: str, limit: int) -> Row:
    """Mean errors over the first test scenes and the four directions."""
    shifts = [shift for n in SHIFTS.values() for shift in ((n, 0), (-n, 0), (0, n), (0, -n))]
    loader = eval_loader(read_index(data), "test", fields=("image",), batch_size=100, limit=limit, num_workers=0)
    errors = torch.cat([shift_errors(model, batch["image"].float() / 255, shifts) for batch in loader], 1)
    means = errors.unflatten(0, (len(SHIFTS), 4)).mean((1, 2)).tolist()
    return dict(zip(SHIFTS, means, strict=True))


def evaluate(models: Mapping[str, Backbone], options: argparse.Namespace, out: Path) -> dict[str, Row]:
    """All columns for each model, as fractions."""
    rows = probe(models, options, out, {name: PROBED[name] for name in ("knn", "segmentation")})
    return {name: {**rows[name], **shifted(model, options.data, options.test // 4)} for name, model in models.items()}


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: a row a model, in percent; bold where no seed's value of a variant lies among base's."""
    lines = []
    for name, found in rows.items():
        line = [name]
        for column in TITLES:
            mine, base = ([100 * row[column] for row in each] for each in (found, rows[BASE]))
            bold = name in CONFIGURATIONS and apart(mine, base)
            line.append(f"**{cell(mine)}**" if bold else cell(mine))
        lines.append(line)
    return markdown(["model", *TITLES.values()], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, name="self_distillation", steps=300, lr=1e-3).parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "lr", "train", "test")}
    results = Results(options.out / "results.json", settings)
    keys = {(name, seed): f"{name}, seed {seed}" for seed in options.seeds for name in CONFIGURATIONS}
    with tempfile.TemporaryDirectory() as scratch:
        for (name, seed), key in keys.items():
            if key not in results:
                whole = train(CONFIGURATIONS[name], seed, options, Path(scratch) / "export")
                student = Exported(whole.student, {}, whole.about)  # nobody looks through its adaptors here
                models: dict[str, Backbone] = {name: student}
                if name == BASE:
                    models[UNTRAINED] = random_like(student, seed)
                results.keep(key, evaluate(models, options, Path(scratch) / "probes"))
        if "teachers" not in results:
            rows = evaluate({name: TinyTeacher(name) for name in TEACHERS}, options, Path(scratch) / "teachers")
            results.keep("teachers", {f"teacher {name}": row for name, row in rows.items()})
    found = results.by_model(["teachers", *keys.values()])
    order = [name for name in found if name not in CONFIGURATIONS] + list(CONFIGURATIONS)
    text = (
        f"{conditions(options)}; learning rate {options.lr:g}, fp32, torch threads {torch.get_num_threads()}\n\n"
        f"{table({name: found[name] for name in order})}\n"
    )
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
