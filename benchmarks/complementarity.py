"""Does a student of several teachers beat the students of each one? Equal steps, several seeds, one protocol.

    python benchmarks/complementarity.py --data data/scenes --steps 600 --seeds 0 1 2

Trains one student from each embedded teacher and one from all of them, then evaluates teachers, students and a student
before training with kNN, linear, zero-shot and segmentation probes and with instance retrieval (an edited copy of a
test scene finds its original by cosine similarity). Prints one table, mean +- standard deviation over the seeds, and
writes it to --out as JSON and Markdown. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Sequence

import torch
import torch.nn.functional as F
from scenes import COLUMNS as PROBED
from scenes import DEMO, TEACHERS, Recipe, Results, Row, cell, conditions, markdown, parser, probe, train
from torch import Tensor

from agglom.adaptors import LinearAdaptor
from agglom.data import eval_loader, read_index
from agglom.demo import fast_bf16
from agglom.export import random_like
from agglom.features import Backbone
from agglom.teachers import TinyTeacher

COLUMNS = (*PROBED, "instance")
ALL = "student of all three"
STUDENTS = {**{f"student of {name}": (name,) for name in TEACHERS}, ALL: TEACHERS}
WEIGHTS = {  # those of the demo
    name: {key: value for key, value in options.items() if key.endswith("_weight")}
    for name, options in DEMO["model"]["teachers"].items()
}


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


def evaluate(models: dict[str, Backbone], options: argparse.Namespace, out: Path) -> dict[str, Row]:
    """All five columns for each model, as fractions; zero-shot only where there is a text side."""
    rows = probe(models, options, out)
    return {
        name: {**rows[name], "instance": instance_retrieval(model, options.data, options.test)}
        for name, model in models.items()
    }


def table(results: dict[str, list[Row]]) -> str:
    """Markdown: one row a model, mean +- standard deviation in percent; the mean is over the columns that all have."""
    common = [column for column in COLUMNS if column != "zeroshot"]
    lines = []
    for name, rows in results.items():
        cells = [[100 * row[c] for row in rows if c in row] for c in COLUMNS]
        cells.append([100 * statistics.mean(row[c] for c in common) for row in rows])
        lines.append([name, *map(cell, cells)])
    titles = ["model", "kNN", "linear", "zero-shot", "segmentation mIoU", "instance R@1", "mean without zero-shot"]
    return markdown(titles, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, name="complementarity", steps=600, lr=2e-2).parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("batch_size", "lr", "train", "test")}
    results = Results(options.out / "results.json", settings)
    bf16 = fast_bf16()
    keys = ["teachers"]
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for title, names in STUDENTS.items():
                keys.append(f"{title}, seed {seed}, {options.steps} steps")
                if keys[-1] in results:
                    continue
                recipe = Recipe(teachers=names, adaptor=LinearAdaptor, weights=WEIGHTS)
                student = train(recipe, seed, options, Path(scratch) / "export", bf16=bf16)
                models: dict[str, Backbone] = {title: student}
                if title == ALL:
                    models["student before training"] = random_like(student, seed)
                results.keep(keys[-1], evaluate(models, options, Path(scratch) / "probes"))
        if "teachers" not in results:
            rows = evaluate({name: TinyTeacher(name) for name in TEACHERS}, options, Path(scratch) / "teachers")
            results.keep("teachers", {f"teacher {name}": row for name, row in rows.items()})
    text = f"{conditions(options)}\n\n{table(results.by_model(keys))}\n"
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
