"""Charts as inline SVG: they take the page's colours, so one chart serves light, dark and print."""

from __future__ import annotations

import colorsys
import math
from html import escape
from typing import Mapping, NamedTuple, Sequence

from agglom.probes.training import Series, thin

DASHES = {"c1": "7 3", "c2": "2 3", "c3": "9 3 2 3", "c4": "5 2", "c5": "1 4", "c6": "12 3", "random": "3 5"}


DASHED = "5 3"


class Line(NamedTuple):
    """A curve: name in the legend, points, the colour class of `agglom.probes.wording.tone`, dashes ("" for none)."""

    name: str
    points: Series
    tone: str
    dash: str | None = None  # the tone's own

    @property
    def style(self) -> str:
        """The attribute of its dashes."""
        dash = DASHES.get(self.tone, "") if self.dash is None else self.dash
        return f' stroke-dasharray="{dash}"' if dash else ""


class Scale(NamedTuple):
    """Values from `low` to `high` on an axis, with a tick every `unit`."""

    low: float
    high: float
    unit: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Scale:
        """Round numbers around the values: at most five ticks beside the first."""
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        step = 10 ** math.floor(math.log10(high - low))
        unit = next(u for u in (0.2 * step, 0.5 * step, step, 2 * step, 5 * step) if _ticks(low, high, u) <= 5)
        return cls(math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit, unit)

    @property
    def ticks(self) -> list[float]:
        """From `low` to `high`."""
        return [self.low + self.unit * i for i in range(round((self.high - self.low) / self.unit) + 1)]

    def at(self, value: float, start: float, length: float) -> float:
        """Where a value lies on an axis of `length` from `start`."""
        return start + (value - self.low) / (self.high - self.low) * length


STRIP = (176, 26, 6)  # width, height and margin of a strip in CSS pixels


def strip_axis(scale: Scale, factor: float) -> str:
    """The head of a column of strips: the ticks, times `factor`."""
    width, _, margin = STRIP
    texts = "".join(
        f'<text x="{scale.at(value, margin, width - 2 * margin):.1f}" y="11" text-anchor="middle">'
        f"{factor * value:.3g}</text>"
        for value in scale.ticks
    )
    return (
        f'<svg class="strip-axis" viewBox="0 0 {width} 14" width="{width}" height="14" aria-hidden="true">{texts}</svg>'
    )


def strip_plot(value: float, ci: Sequence[float] | None, scale: Scale, tone: str, chance: float | None) -> str:
    """A value with its interval on a line; chance dashed. The number itself stands beside it as text."""
    width, height, margin = STRIP
    middle = height / 2

    def x(number: float) -> str:
        return f"{min(max(scale.at(number, margin, width - 2 * margin), 0), width):.1f}"

    parts = [f'<line class="rule" x1="{x(t)}" x2="{x(t)}" y1="0" y2="{height}"/>' for t in scale.ticks]
    if chance is not None:
        parts.append(f'<line class="chance" x1="{x(chance)}" x2="{x(chance)}" y1="0" y2="{height}"/>')
    if ci:
        parts.append(f'<line class="bar {tone}" x1="{x(ci[0])}" x2="{x(ci[1])}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<circle class="dot {tone}" cx="{x(value)}" cy="{middle}" r="5"/>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="strip-plot" {size} aria-hidden="true">{"".join(parts)}</svg>'


def line_chart(title: str, lines: Sequence[Line], *, axis: str = "step", marks: bool = False) -> str:
    """Curves over one axis, as a figure with a legend.

    Args:
        title: what is drawn.
        lines: at least one, each with at least one point.
        axis: what x is.
        marks: whether points are marked: few that were measured, not many that were averaged.
    """
    shown = [line if marks else line._replace(points=thin(line.points)) for line in lines]
    width, height, left, bottom, top = 320, 170, 46, 24, 8
    xs, ys = ([p[i] for line in shown for p in line.points] for i in (0, 1))
    across, up = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, 1), Scale.over(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return across.at(x, left, width - left - 10), up.at(y, height - bottom, top + bottom - height)

    parts = []
    for value in up.ticks:
        y = at(across.low, value)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
    ends = (across.low, across.high)
    for value in sorted({*ends, *xs}) if marks and len(set(xs)) <= 6 else ends:
        anchor = {across.low: "start", across.high: "end"}.get(value, "middle")
        word = f"{axis} " if value == across.high else ""
        parts.append(
            f'<text x="{at(value, up.low)[0]:.1f}" y="{height - 6}" text-anchor="{anchor}">{word}{value:.0f}</text>'
        )
    for line in shown:
        spots = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="curve {line.tone}" points="{path}"{line.style}/>')
        if marks or len(spots) == 1:
            parts += [f'<circle class="dot {line.tone}" r="3.5" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in spots]
    spoken = "; ".join(
        f"{line.name} from {line.points[0][1]:.3g} at {axis} {line.points[0][0]:.0f} "
        f"to {line.points[-1][1]:.3g} at {axis} {line.points[-1][0]:.0f}"
        for line in shown
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}: {spoken}")}">'
        f"{''.join(parts)}</svg>{legend(shown)}</figure>"
    )


def legend(lines: Sequence[Line]) -> str:
    """Names beside samples of their lines."""
    samples = "".join(
        '<li><svg class="sample" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        f'<polyline class="curve {line.tone}" points="0,5 28,5"{line.style}/></svg>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{samples}</ul>'


def radar(label: str, axes: Sequence[str], rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """One spoke an axis, one outline a row; an outline is open where a value is missing.

    Args:
        label: what a screen reader says.
        axes: at least three names.
        rows: (name, colour class, axis -> value >= 0); the first is drawn last, filled.
    """
    width, height, radius = 520, 370, 145
    scale = Scale.over([0.0, *(value for _, _, values in rows for value in values.values())])

    def at(place: int, value: float) -> tuple[float, float]:
        angle, reach = 2 * math.pi * place / len(axes), scale.at(value, 0, radius)
        return width / 2 + reach * math.sin(angle), height / 2 - reach * math.cos(angle)

    def outline(values: Sequence[float]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in enumerate(values)))

    rings = scale.ticks[1:]
    parts = [f'<polygon class="ring" points="{outline([ring] * len(axes))}"/>' for ring in rings]
    for place, axis in enumerate(axes):
        (x, y), (tx, ty) = at(place, scale.high), at(place, scale.high * 1.1)
        side = math.sin(2 * math.pi * place / len(axes))
        anchor = "middle" if abs(side) < 0.2 else ("start" if side > 0 else "end")
        words = axis.split(", ")
        drop = 4 + 6 * (ty - height / 2) / radius - (16 * (len(words) - 1) if ty < height / 2 else 0)
        lines = "".join(
            f'<tspan x="{tx:.1f}" dy="{16 * bool(i)}">{escape(word)}</tspan>' for i, word in enumerate(words)
        )
        parts.append(f'<line class="rule" x1="{width / 2}" y1="{height / 2}" x2="{x:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="name" x="{tx:.1f}" y="{ty + drop:.1f}" text-anchor="{anchor}">{lines}</text>')
    for number, (_, tone, values) in reversed(list(enumerate(rows))):
        dash = Line("", [], tone).style
        if number == 0 and len(values) == len(axes):
            parts.append(f'<polygon class="area {tone}" points="{outline([values[a] for a in axes])}"/>')
        for place, axis in enumerate(axes):
            after = axes[(place + 1) % len(axes)]
            if axis in values and after in values:
                (x1, y1), (x2, y2) = at(place, values[axis]), at((place + 1) % len(axes), values[after])
                parts.append(f'<polyline class="curve {tone}" points="{x1:.1f},{y1:.1f} {x2:.1f},{y2:.1f}"{dash}/>')
        spots = [at(place, values[axis]) for place, axis in enumerate(axes) if axis in values]
        parts += [f'<circle class="dot {tone}" r="3.5" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in spots]
    for ring in rings:
        x, y = at(0, ring)
        parts.append(f'<text class="tick" x="{x - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{100 * ring:.3g}</text>')
    return (
        f'<figure class="radar"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{legend([Line(name, [], tone) for name, tone, _ in rows])}</figure>"
    )


def palette(count: int) -> list[tuple[int, int, int]]:
    """Distinct colours for mask values; 0 is a quiet grey."""
    colours = [(90, 94, 102)]
    for i in range(1, count):
        hue = (i * 0.618034) % 1.0
        rgb = colorsys.hsv_to_rgb(hue, (0.75, 0.55)[i % 2], (0.95, 0.8)[(i // 2) % 2])
        colours.append(tuple(round(255 * c) for c in rgb))  # type: ignore[arg-type]
    return colours


def _ticks(low: float, high: float, unit: float) -> int:
    """How many units it takes to cover the values in whole ones."""
    return math.ceil(high / unit - 1e-9) - math.floor(low / unit + 1e-9)
