"""The report in Markdown: words and tables, as GitHub renders them."""

from __future__ import annotations

from html import escape
from typing import Any, Mapping, Sequence

from agglom.probes import wording as w
from agglom.probes.training import Series, curves, ends


def markdown(report: w.Report, columns: Mapping[str, Series]) -> str:
    """Everything of the report that isn't a picture.

    Args:
        report: report.json.
        columns: of metrics.csv, or none.
    """
    parts = [f"# What {clean(w.spoken(report['student']))} kept", clean(w.lead(report)), *_retention(report)]
    parts += [*_scores(report), *_inside(report), *_mode(report), *_training(columns)]
    if report["skipped"]:
        rows = [[clean(cell) for cell in row] for row in w.skipped(report)]
        parts += ["## Not evaluated", grid(["probe", "model", "reason"], rows, words=True)]
    parts += [
        "## Protocol and provenance",
        grid(["what", "value"], [[a, clean(b)] for a, b in w.facts(report)], words=True),
    ]
    models = [[clean(n), *map(clean, w.model_facts(p))] for n, p in report["provenance"]["models"].items()]
    parts.append(grid([word.lower() for word in w.MODEL_HEAD], models, words=True))
    return "\n\n".join(parts) + "\n"


def clean(value: Any) -> str:
    """Words that may hold anything, for a Markdown table cell."""
    out = escape(" ".join(str(value).split()), quote=False)
    for mark in "\\`*_[]|#~":
        out = out.replace(mark, f"\\{mark}")
    return out


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table; its columns but the first are flush right, unless they are words."""
    lines = [head, ["---", *["---" if words else "---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def retention_table(report: w.Report) -> str:
    """Each probe's retention, a row each; empty where nothing was compared."""
    kept = report["retention"]
    if not kept:
        return ""
    teachers = [t for t in report["teachers"] if any(t in r["teachers"] for r in kept.values())]
    rows = [
        [
            w.title(probe),
            w.metric_name(r["metric"]),
            w.percent(r["student"]),
            f"{w.percent(r['best_teacher'])} ({clean(r['best_teacher_name'])})",
            f"**{w.percent(r['value'])}**",
            w.percent_between(r["ci"]),
            *(w.percent(r["teachers"].get(t)) for t in teachers),
        ]
        for probe, r in kept.items()
    ]
    head = ["probe", "metric", "student", "best teacher", "retention", "95 % interval"]
    head += [f"of {clean(t)}" for t in teachers]
    return grid(head, rows)


def _retention(report: w.Report) -> list[str]:
    table = retention_table(report)
    return ["## Retention", "The student's metric divided by a teacher's, in percent.", table] if table else []


def _scores(report: w.Report) -> list[str]:
    parts = ["## Scores"]
    for probe in report["protocol"]:
        if names := w.alone(report, probe):
            metrics = w.metrics_of(report, probe, names)
            rows = [
                [clean(n), *(score(report, n, probe, m) for m in metrics), clean(w.chosen(report, probe, n))]
                for n in names
            ]
            head = ["model", *map(w.metric_name, metrics), "chosen on val"]
            parts += [f"### {w.title(probe)}", grid(head, rows), clean(w.how(report, probe, names))]
    return parts if len(parts) > 1 else []


def _inside(report: w.Report) -> list[str]:
    parts = ["## Through the adaptors"]
    for probe in report["protocol"]:
        if names := w.inside(report, probe):
            metrics = w.metrics_of(report, probe, names)
            rows = [[clean(w.shown_name(report, n)), *(score(report, n, probe, m) for m in metrics)] for n in names]
            parts += [
                f"### {w.title(probe)}, through the adaptors",
                grid(["model", *map(w.metric_name, metrics)], rows),
            ]
            if not w.alone(report, probe):
                parts.append(clean(w.how(report, probe, names)))
    return parts if len(parts) > 1 else []


def _mode(report: w.Report) -> list[str]:
    parts = []
    for what, sizes, lines in w.mode_switching(report):
        rows = [
            [clean(w.shown_name(report, n)), *(f"{at[x]:.3g}" if x in at else "-" for x in sizes)]
            for n, at in lines.items()
        ]
        parts += [f"### {what}", grid(["model", *(f"{x:g} pixels" for x in sizes)], rows)]
    return ["## Mode switching", w.MODE_ABOUT, *parts] if parts else []


def _training(columns: Mapping[str, Series]) -> list[str]:
    rows = []
    for chart in curves(dict(columns)):
        for name, series in chart.lines.items():
            first, last, step = ends(series)
            owner = " ".join(filter(None, ["loss" if chart.kind == "loss" else "", chart.title]))
            rows.append([clean(f"{owner}: {name}"), f"{first:.4g}", f"{last:.4g}", str(step)])
    return ["## Training", grid(["curve", "first", "last", "last step"], rows)] if rows else []


def score(report: w.Report, name: str, probe: str, metric: str) -> str:
    """A metric with its interval."""
    ci = w.between(report, probe, report["ci"].get(name, {}).get(probe, {}).get(metric))
    return w.number(report, probe, report["models"][name][probe].get(metric)) + (f" ({ci})" if ci else "")
