"""What each choice of the recipe does to what a student keeps of its teachers: equal steps, several seeds.

    python benchmarks/ablation.py --data data/scenes --steps 300 --batch-size 16 --train 2000

One base configuration (all three embedded teachers, MLP heads, standardised targets, equal balance, no dropping) and
variants that change one thing each: a single teacher, ladder heads, teacher dropping, raw targets, PHI-S targets,
AdaLoss. Losses, learning rate and everything else are the same for all, and every teacher has weight 1. Retention is a
student's metric over the best teacher's under the same protocol. Prints one table, mean +- standard deviation over the
seeds, and writes it to --out as JSON and Markdown. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Mapping, Sequence

from scenes import COLUMNS, TEACHERS, Recipe, Results, Row, apart, cell, conditions, markdown, parser, probe, train

from agglom.adaptors import LadderAdaptor
from agglom.balance import AdaLoss, TeacherDropping
from agglom.targets import PHIS, Identity
from agglom.teachers import TinyTeacher

BASE = "base"
CONFIGURATIONS = {
    **{f"{name} alone": Recipe(teachers=(name,)) for name in TEACHERS},
    BASE: Recipe(),
    "ladder": Recipe(adaptor=LadderAdaptor),
    "dropping": Recipe(balance=lambda seed: TeacherDropping(p=0.5, normalization="per_image", seed=seed)),
    "raw": Recipe(normalizer=Identity),
    "phi_s": Recipe(normalizer=PHIS),
    "adaloss": Recipe(balance=lambda seed: AdaLoss()),
}
TITLES = {"knn": "kNN", "linear": "linear", "zeroshot": "zero-shot", "segmentation": "segmentation"}
MEAN = "mean without zero-shot"  # the columns that every student has


def best_teachers(teachers: Mapping[str, Row]) -> dict[str, tuple[str, float]]:
    """Column -> name and metric of the teacher that is best at it."""
    return {
        column: max(((name, row[column]) for name, row in teachers.items() if column in row), key=lambda pair: pair[1])
        for column in COLUMNS
    }


def retention(row: Row, teachers: Mapping[str, Row]) -> Row:
    """A student's metrics over the best teacher's, in percent, and the mean over what every student has."""
    best = best_teachers(teachers)
    kept = {column: 100 * row[column] / best[column][1] for column in COLUMNS if column in row}
    return {**kept, MEAN: statistics.mean(value for column, value in kept.items() if column != "zeroshot")}


def table(students: Mapping[str, list[Row]], teachers: Mapping[str, Row]) -> str:
    """Markdown: a row a configuration, one `Row` of metrics a seed; bold where no seed's value lies among base's."""
    kept = {name: [retention(row, teachers) for row in rows] for name, rows in students.items()}
    lines = []
    for name, rows in kept.items():
        line = [name]
        for column in (*COLUMNS, MEAN):
            mine, base = ([row[column] for row in each if column in row] for each in (rows, kept[BASE]))
            line.append(f"**{cell(mine)}**" if apart(mine, base) else cell(mine))
        lines.append(line)
    return markdown(["configuration", *(TITLES[column] for column in COLUMNS), MEAN], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, name="ablation", steps=300, lr=1e-2).parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "lr", "train", "test")}
    results = Results(options.out / "results.json", settings)
    keys = {(name, seed): f"{name}, seed {seed}" for seed in options.seeds for name in CONFIGURATIONS}
    with tempfile.TemporaryDirectory() as scratch:
        if "teachers" not in results:
            teachers = {name: TinyTeacher(name) for name in TEACHERS}
            results.keep("teachers", probe(teachers, options, Path(scratch) / "teachers"))
        for (name, seed), key in keys.items():
            if key not in results:
                student = train(CONFIGURATIONS[name], seed, options, Path(scratch) / "export")
                results.keep(key, probe({name: student}, options, Path(scratch) / "probes"))
    best = ", ".join(
        f"{TITLES[column]} {100 * value:.1f} ({name})"
        for column, (name, value) in best_teachers(results["teachers"]).items()
    )
    text = (
        f"{conditions(options)}; learning rate {options.lr:g}, fp32. Retention: a student's metric over the best "
        f"teacher's: {best}\n\n{table(results.by_model(keys.values()), results['teachers'])}\n"
    )
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
