"""The sections of the report page that hold numbers and curves."""

from __future__ import annotations

import json
from html import escape
from typing import Mapping, Sequence

from agglom.probes import wording as w
from agglom.probes.charts import DASHED, Line, line_chart, radar
from agglom.probes.page import Section, cell, folded, table, text
from agglom.probes.training import Curves, Series, curves


def retention(report: w.Report) -> Section:
    """What the student kept of the best teacher and of each."""
    kept = report["retention"]
    if not kept:
        return Section("retention", "Retention", "")
    teachers = [t for t in report["teachers"] if any(t in r["teachers"] for r in kept.values())]
    rows = []
    for probe, r in kept.items():
        cis = r.get("teachers_ci", {})
        shares = [
            cell(w.percent(v), w.percent_between(cis.get(t)), kind=w.grade(v))
            for t in teachers
            for v in [r["teachers"].get(t)]
        ]
        best = cell(w.percent(r["value"]), w.percent_between(r["ci"]), kind=w.grade(r["value"]), big=True)
        reference = cell(w.percent(r["best_teacher"]), r["best_teacher_name"])
        rows.append([w.title(probe), best, cell(w.percent(r["student"])), reference, *shares,
                     text(w.metric_name(r["metric"]))])  # fmt: skip
    head = ["Probe", "Retention", "Student", "Best teacher", *(f"of {t}" for t in teachers), "Metric"]
    return Section(
        "retention",
        "Retention",
        "<p>The student's metric divided by the best teacher's, and by each teacher's, in percent. Small print: 95 % "
        "bootstrap interval over test images, paired.</p>"
        + table("What the student kept, in percent", head, rows)
        + f'<p class="dim small">Retention: {key()}</p>',
    )


def key() -> str:
    """The colour scale, in words."""
    return "".join(f'<span class="key {kind}">{words}</span>' for kind, _, words in w.GRADES)


def glance(report: w.Report) -> Section:
    """The headline metric of every bounded probe as a radar, and the same numbers as a table."""
    probes = [p for p in report["protocol"] if w.bounded(report, p) and len(w.alone(report, p)) > 1]
    names = [n for n in report["provenance"]["models"] if any(n in w.alone(report, p) for p in probes)]
    names.sort(key=lambda n: n != report["student"])
    values = {n: {p: v for p in probes if (v := headline(report, n, p)) is not None} for n in names}
    body = radar_of(
        [(n, w.tone(report, n), values[n]) for n in names],
        probes,
        "The headline metric of each probe, in percent; higher is better. An outline is open where a probe doesn't "
        "apply to a model.",
    )
    return Section("glance", "Every probe at a glance", body)


def radar_of(rows: Sequence[tuple[str, str, Mapping[str, float]]], probes: Sequence[str], about: str) -> str:
    """A radar with its numbers as a table; nothing where there are fewer than three probes.

    Args:
        rows: (name, colour class, probe -> value); the first is the one that matters.
        probes: the axes.
        about: a sentence or two.
    """
    if len(probes) < 3 or not rows:
        return ""
    titles = {probe: w.title(probe) for probe in probes}
    drawn = [(name, tone, {titles[p]: v for p, v in values.items()}) for name, tone, values in rows]
    label = "Radar of " + ", ".join(titles.values()) + ". " + " ".join(
        f"{name}: {', '.join(f'{titles[p]} {w.percent(v)}' for p, v in values.items())}." for name, _, values in rows
    )  # fmt: skip
    cells = [[w.title(p), *(cell(w.percent(values.get(p))) for _, _, values in rows)] for p in probes]
    numbers = table("The same in numbers, in percent", ["Probe", *(name for name, _, _ in rows)], cells)
    return f'<p>{escape(about)}</p><div class="beside">{radar(label, list(titles.values()), drawn)}{numbers}</div>'


def headline(report: w.Report, name: str, probe: str) -> float | None:
    """A model's headline metric, or None."""
    value = report["models"].get(name, {}).get(probe, {}).get(report["protocol"][probe]["metric"])
    return None if value is None else float(value)


def mode_switching(report: w.Report) -> Section:
    """Error against the teachers over the student's input size."""
    charts, numbers = "", ""
    for what, sizes, lines in w.mode_switching(report):
        drawn = [Line(w.shown_name(report, n), sorted(at.items()), w.tone(report, n)) for n, at in lines.items()]
        charts += line_chart(what, drawn, axis="pixels", marks=True)
        rows = [
            [w.shown_name(report, n), *(cell(f"{at[x]:.3g}" if x in at else "-") for x in sizes)]
            for n, at in lines.items()
        ]
        numbers += table(f"{what} at each size", ["Model", *(f"{x:g} px" for x in sizes)], rows)
    body = f'<p>{w.MODE_ABOUT}</p><div class="charts">{charts}</div>{folded("The same in numbers", numbers)}'
    return Section("mode-switching", "Mode switching", body if charts else "")


def fitting(report: w.Report) -> Section:
    """Whatever else probes gave as curves, such as the losses of what they trained."""
    known = {name for name, _ in w.MODE}
    charts = "".join(
        line_chart(
            f"{w.title(probe)}: {key.replace('_', ' ')}",
            [Line(w.shown_name(report, n), points, w.tone(report, n)) for n, points in lines.items()],
        )
        for (probe, key), lines in w.series(report).items()
        if key not in known
    )
    about = "<p>What the probes themselves trained on top of the frozen backbones, over their steps.</p>"
    return Section("fitting", "Training of the probes", f'{about}<div class="charts">{charts}</div>' if charts else "")


def training(report: w.Report, columns: Mapping[str, Series]) -> Section:
    """Losses of every teacher and objective, probes, balance and rates over steps."""
    charts = curves(dict(columns))
    drawn = "".join(_chart(report, chart) for chart in charts)
    about = "<p>Over optimiser steps; each point is the mean of a stretch of steps.</p>"
    return Section("training", "Training", f'{about}<div class="charts">{drawn}</div>' if drawn else "")


def _chart(report: w.Report, chart: Curves) -> str:
    if chart.kind == "loss":  # a colour for each part of the loss, dashed in validation
        parts = list(dict.fromkeys(name.split(", ")[0] for name in chart.lines))
        lines = [
            Line(name, series, w.nth_tone(parts.index(name.split(", ")[0])), DASHED if "validation" in name else "")
            for name, series in chart.lines.items()
        ]
        return line_chart(f"Loss: {chart.title}" if chart.title else "Loss", lines)
    known = {n: w.tone(report, n) for n in report["provenance"]["models"] if n != report["student"]}
    lines = [Line(name, series, known.get(name, w.nth_tone(i))) for i, (name, series) in enumerate(chart.lines.items())]
    return line_chart(chart.title, lines, marks=chart.title == "Probes during training")


def skipped(report: w.Report) -> Section:
    """What wasn't evaluated, and why."""
    rows = [[probe, text(models), text(reason)] for probe, models, reason in w.skipped(report)]
    body = table("Not evaluated, and why", ["Probe", "Models", "Reason"], rows) if rows else ""
    return Section("skipped", "Not evaluated", body)


def provenance(report: w.Report) -> Section:
    """All that the numbers depend on."""
    facts = [[a, text(b)] for a, b in w.facts(report)]
    models = [[n, *map(text, w.model_facts(p))] for n, p in report["provenance"]["models"].items()]
    full = f"<pre>{escape(json.dumps(report['protocol'], indent=1))}</pre>"
    body = (
        "<p>Backbones are frozen. Whatever is fitted is fitted on the train split, whatever is chosen is chosen on the "
        "val split, and the test split is looked at once.</p>"
        + table("Data and software", ["What", "Value"], facts)
        + table("Models", w.MODEL_HEAD, models)
        + folded("Every hyper-parameter, grid and validation score", full, long=True)
    )
    return Section("protocol", "Protocol and provenance", body)
