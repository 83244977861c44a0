"""A run's metrics.csv as groups of curves."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """What one chart shows.

    Attributes:
        title: of the chart; a teacher or an objective, or nothing, for losses.
        kind: "loss", "probe", "rate" or "balance".
        lines: name -> [(step, value)].
    """

    title: str
    kind: str
    lines: dict[str, Series]


def read_metrics(path: Path) -> dict[str, Series]:
    """Numeric columns of a metrics.csv -> [(step, value)]; cells that are empty or not finite are left out.

    Where Lightning logs a value per step and per epoch (`NAME_step`, `NAME_epoch`), the step's is kept.
    """
    out: dict[str, Series] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        for row_number, row in enumerate(csv.DictReader(stream)):
            step = _number(row.get("step")) if row.get("step") else float(row_number)
            for name, cell in row.items():
                known = name not in (None, "step", "epoch") and step is not None
                if known and isinstance(cell, str) and (value := _number(cell)) is not None:
                    out.setdefault(name, []).append((step, value))  # type: ignore[arg-type]
    for name in list(out):
        if name.endswith("_epoch") and f"{name.removesuffix('_epoch')}_step" in out:
            del out[name]
    return {name: sorted(series) for name, series in out.items()}


def curves(columns: dict[str, Series]) -> list[Curves]:
    """The charts of a run: the total loss, every teacher's and objective's losses, probes, ranks, balance, rates.

    Args:
        columns: from `read_metrics`, named "train/loss", "val/NAME/PART_loss", "probe/NAME_METRIC", "lr-...".
    """
    losses: dict[str, dict[str, Series]] = {}
    parts: dict[str, dict[str, Series]] = {}
    for column, series in columns.items():
        *heads, last = column.split("/")
        head, middle = heads[0] if heads else column, heads[1:]
        owner = "/".join(middle)
        last = last.removesuffix("_step")
        if "loss" in last.lower():
            which = last.removesuffix("loss").strip("_").replace("_", " ")
            name = f"{which or 'loss'}, {'validation' if head == 'val' else 'training'}"
            if head not in ("train", "val"):
                name = column
            losses.setdefault(owner, {})[name] = series
        elif head == "probe":
            parts.setdefault("probe", {})[f"{last}{f' through {owner}' if owner else ''}"] = series
        elif last.endswith("_rankme"):
            parts.setdefault("rank", {})[last.removesuffix("_rankme")] = series
        elif last in ("weight", "kept", "gradient_share"):
            parts.setdefault(last, {})[owner] = series
        elif head.startswith("lr"):
            parts.setdefault("lr", {})[column] = series
        elif last == "images_per_s":
            parts.setdefault("speed", {})["images"] = series
    out = [Curves(owner, "loss", dict(sorted(losses[owner].items()))) for owner in sorted(losses)]
    for key, title, kind in (
        ("probe", "Probes during training", "probe"),
        ("rank", "RankMe of the student's features", "probe"),
        ("weight", "Weight in the loss", "balance"),
        ("kept", "Share of the images kept", "balance"),
        ("gradient_share", "Share of the gradient", "balance"),
        ("lr", "Learning rate", "rate"),
        ("speed", "Images per second", "rate"),
    ):
        lines = parts.get(key, {})
        still = {value for series in lines.values() for _, value in series}
        if lines and not (kind == "balance" and len(still) == 1):  # nothing was balanced
            out.append(Curves(title, kind, lines))
    return out


def thin(series: Series, points: int = 120) -> Series:
    """At most so many points, each the mean of its stretch."""
    stretch = max(1, math.ceil(len(series) / points))
    parts = [series[i : i + stretch] for i in range(0, len(series), stretch)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def ends(series: Series) -> tuple[float, float, int]:
    """First value, last value and last step, each end averaged over a twentieth of the curve."""
    few = thin(series, 20)
    return few[0][1], few[-1][1], int(series[-1][0])


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
