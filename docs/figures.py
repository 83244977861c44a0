"""Draws docs/data_flow.svg: the way of one batch through the demo's own objects, with the shapes that they really give.

python docs/figures.py              (tests/test_docs.py compares the file with what this writes)
python docs/figures.py runs/demo    docs/report.png as well: the beginning of that run's report, by Chromium
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
BATCH, SIZE = 32, 64
INK, SOFT, FROZEN, TRAINED, DATA = "#1c2733", "#5b6b7b", "#dbe8f4", "#fbe6d3", "#e8ecef"


def measured() -> dict[str, Any]:
    """Shapes at each station, from one batch through student, teachers and heads of configs/demo.yaml."""
    from agglom.checks import read_yaml
    from agglom.runs import build_distiller

    config = read_yaml(HERE.parent / "configs" / "demo.yaml")[0]
    config["model"]["remember_teachers"] = False
    model = build_distiller(config)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    frames = model.frames(images)
    with torch.no_grad():
        raw = {name: teacher(images) for name, teacher in model.frozen.items()}
        targets = model.targets(frames, model.names)
        student = model.student(frames.student, model.taps)
        predicted = {
            name: head.adaptor(student, targets[name].spatial.shape[-2:]) for name, head in model.heads.items()
        }
        losses = model.losses(student, targets)
    return {
        "images": images,
        "teachers": {name: (model.frozen[name], found) for name, found in raw.items()},
        "student": student,
        "predicted": predicted,
        "losses": losses,
        "names": model.names,
        "student_name": config["model"]["student"]["init_args"]["name"],
    }


def shape(x: Tensor | None) -> str:
    return "none" if x is None else str(tuple(x.shape))


def box(x: float, y: float, width: float, title: str, lines: list[str], fill: str) -> str:
    """A station: a title over lines of what it gives."""
    height = 34 + 17 * len(lines)
    out = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{SOFT}"/>',
        f'<text x="{x + 12}" y="{y + 21}" font-weight="600">{escape(title)}</text>',
    ]
    out += [
        f'<text x="{x + 12}" y="{y + 40 + 17 * i}" font-size="12" fill="{SOFT}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    return "\n".join(out)


def arrow(*points: tuple[float, float], label: str = "") -> str:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    out = f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'
    if label:
        (x0, y0), (x1, y1) = points[0], points[1]
        out += (
            f'<text x="{(x0 + x1) / 2 + 8}" y="{(y0 + y1) / 2 + 4}" font-size="12" fill="{SOFT}">{escape(label)}</text>'
        )
    return out


def draw(found: dict[str, Any]) -> str:
    teachers, student = found["teachers"], found["student"]
    parts = [box(300, 16, 300, "shards, one view an image", [f"images {shape(found['images'])} in [0, 1]"], DATA)]
    left, wide = 20, 196
    for i, (name, (teacher, features)) in enumerate(teachers.items()):
        x = left + i * (wide + 12)
        spec = teacher.input
        lines = [
            f"its own {'x'.join(map(str, spec.size)) if spec.size else 'size'}, mean and std",
            f"summary {shape(features.summary)}",
            f"map {shape(features.spatial)}",
        ]
        parts.append(box(x, 122, wide, f"teacher {name}, frozen", lines, FROZEN))
        parts.append(arrow((400, 67), (400, 96), (x + wide / 2, 96), (x + wide / 2, 120)))
        parts.append(arrow((x + wide / 2, 207), (x + wide / 2, 236)))
    right = left + 3 * (wide + 12) + 16
    parts.append(
        box(
            left,
            238,
            3 * wide + 24,
            "normaliser of each teacher: mean and deviation removed",
            ["targets, as wide as before"],
            FROZEN,
        )
    )
    lines = [
        "its own mean and std",
        f"summary {shape(student.summary)}",
        f"map {shape(student.spatial)}",
    ]
    parts.append(box(right, 122, 230, f"student {found['student_name']}", lines, TRAINED))
    parts.append(arrow((500, 67), (500, 96), (right + 115, 96), (right + 115, 120)))
    first = found["predicted"][found["names"][0]]
    lines = [
        f"{found['names'][0]}: {shape(first.summary)},",
        f"  {shape(first.spatial)}",
        "then onto the teacher's grid",
    ]
    parts.append(box(right, 238, 230, "adaptor of each teacher", lines, TRAINED))
    parts.append(arrow((right + 115, 207), (right + 115, 236)))
    loss = found["losses"][found["names"][0]]
    parts.append(
        box(
            220, 366, 420, "losses an image: summary and map of each", [f"{shape(loss['spatial'])} each, in fp32"], DATA
        )
    )
    middle = left + (3 * wide + 24) / 2
    parts.append(arrow((middle, 289), (middle, 364)))
    parts.append(arrow((right + 115, 323), (right + 115, 391), (642, 391)))
    count = len(found["names"])
    parts.append(
        box(220, 450, 420, "balance: weights of teachers and images", [f"({count}, {BATCH}), without gradient"], DATA)
    )
    parts.append(arrow((430, 417), (430, 448)))
    lines = ["backward through adaptors and student, never into a teacher", "then the averaged student (EMA) follows"]
    parts.append(box(220, 534, 420, "mean: one loss", lines, DATA))
    parts.append(arrow((430, 501), (430, 532)))
    parts.append(arrow((642, 568), (right + 190, 568), (right + 190, 325)))
    parts.append(f'<text x="660" y="560" font-size="12" fill="{SOFT}">gradient</text>')
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 910 624" font-family="system-ui, sans-serif" '
            f'font-size="14" fill="{INK}" role="img">',
            "<title>The way of a batch: teachers and student see the same view; adaptors predict each teacher's targets"
            "</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
            '<rect width="910" height="624" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def photograph(report: Path, out: Path) -> None:
    """The first 1,040 x 1,372 pixels of a report.html as a PNG."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        sys.exit("figures: no chromium, chromium-browser, google-chrome or chrome on PATH; install one of them")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1040,1372"]
    command = [browser, *flags, f"--screenshot={out.resolve()}", report.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    (HERE / "data_flow.svg").write_text(draw(measured()))
    if sys.argv[1:]:
        photograph(Path(sys.argv[1]) / "probes" / "report.html", HERE / "report.png")
