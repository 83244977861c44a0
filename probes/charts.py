"""Charts as inline SVG: they take the page's colours, so one chart serves light, dark and print."""

from __future__ import annotations

import csv
import math
from html import escape
from pathlib import Path
from typing import Mapping, Sequence

Series = list[tuple[float, float]]


def read_losses(path: Path, most: int = 12) -> dict[str, Series]:
    """Columns of a metrics.csv with "loss" in their name -> [(step, value)], validation left in, step doubles out.

    Where Lightning logs a value per step and per epoch (`NAME_step`, `NAME_epoch`), the step's is kept.
    """
    out: dict[str, Series] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            step = _number(row.get("step")) if row.get("step") else float(number)
            for name, text in row.items():
                if name and "loss" in name.lower() and step is not None and (value := _number(text)) is not None:
                    out.setdefault(name, []).append((step, value))
    for name in list(out):
        if name.endswith("_epoch") and f"{name.removesuffix('_epoch')}_step" in out:
            del out[name]
    return dict(sorted(out.items(), key=lambda item: (item[0].count("/"), item[0]))[:most])


def thin(series: Series, points: int = 120) -> Series:
    """At most so many points, each the mean of its stretch."""
    stretch = max(1, math.ceil(len(series) / points))
    parts = [series[i : i + stretch] for i in range(0, len(series), stretch)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def line_chart(title: str, series: Series) -> str:
    """One curve over steps, as a figure."""
    series = thin(sorted(series))
    width, height, left, bottom, top = 300, 150, 44, 22, 8
    xs, ys = [x for x, _ in series], [y for _, y in series]
    (x0, x1), (y0, y1) = _span(xs), _span(ys)

    def at(x: float, y: float) -> str:
        return (
            f"{left + (x - x0) / (x1 - x0) * (width - left - 8):.1f},"
            f"{top + (y1 - y) / (y1 - y0) * (height - top - bottom):.1f}"
        )

    path = " ".join(at(x, y) for x, y in series)
    axis = "".join(
        f'<line class="rule" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>'
        f'<text x="{left - 5}" y="{y + 3}" text-anchor="end">{value:.3g}</text>'
        for y, value in ((top, y1), ((top + height - bottom) / 2, (y0 + y1) / 2), (height - bottom, y0))
    )
    steps = (
        f'<text x="{left}" y="{height - 6}">{x0:.0f}</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {x1:.0f}</text>'
    )
    label = f"{title}: from {ys[0]:.3g} at step {xs[0]:.0f} to {ys[-1]:.3g} at step {xs[-1]:.0f}"
    body = f'<polyline points="{path}"/>' if len(series) > 1 else f'<circle r="3" cx="{left}" cy="{top}"/>'
    return (
        f'<figure class="chart"><figcaption><code>{escape(title)}</code></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{axis}{steps}{body}</svg></figure>"
    )


def interval_chart(
    label: str, rows: Sequence[tuple[str, str, float, Sequence[float] | None]], chance: float | None
) -> str:
    """Values with their intervals, one row a model.

    Args:
        label: what a screen reader says.
        rows: (name, role, value, (low, high) or None), fractions.
        chance: drawn as a dashed line.
    """
    width, left, step, top = 640, 150, 26, 6
    height = top + step * len(rows) + 20
    ends = [v for _, _, value, ci in rows for v in (value, *(ci or ()))] + ([chance] if chance is not None else [])
    high = _ceiling(max(ends))

    def x(value: float) -> float:
        return left + value / high * (width - left - 60)

    parts = [
        f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 18}"/>'
        f'<text x="{x(tick):.1f}" y="{height - 5}" text-anchor="middle">{100 * tick:.3g}</text>'
        for tick in (0, high / 4, high / 2, 3 * high / 4, high)
    ]
    if chance is not None:
        parts.append(f'<line class="chance" x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="{top}" y2="{height - 18}"/>')
    for i, (name, role, value, ci) in enumerate(rows):
        y = top + step * i + step / 2
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(_short(name))}</text>')
        if ci:
            parts.append(f'<line class="ci {role}" x1="{x(ci[0]):.1f}" x2="{x(ci[1]):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{role}" cx="{x(value):.1f}" cy="{y}" r="5"/>')
        parts.append(
            f'<text class="name" x="{x(max(value, *(ci or (0,)))) + 10:.1f}" y="{y + 4}">{100 * value:.1f}</text>'
        )
    size = f'viewBox="0 0 {width} {height}"'
    return f'<svg class="dots" {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def palette(count: int) -> list[tuple[int, int, int]]:
    """Distinct colours for mask values; 0 is a quiet grey."""
    import colorsys

    colours = [(90, 94, 102)]
    for i in range(1, count):
        hue = (i * 0.618034) % 1.0
        rgb = colorsys.hsv_to_rgb(hue, (0.75, 0.55)[i % 2], (0.95, 0.8)[(i // 2) % 2])
        colours.append(tuple(round(255 * c) for c in rgb))  # type: ignore[arg-type]
    return colours


def summary_of(losses: Mapping[str, Series]) -> list[tuple[str, float, float, int]]:
    """(name, first, last, last step) of each curve, each end averaged over a twentieth of it."""
    out = []
    for name, series in losses.items():
        ends = thin(sorted(series), 20)
        out.append((name, ends[0][1], ends[-1][1], int(max(x for x, _ in series))))
    return out


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ceiling(value: float) -> float:
    return next(c for c in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, math.inf) if value <= c * 0.98 or c >= 1.0)


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
