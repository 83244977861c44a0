"""The tables of scores: every probe on the models themselves, and through their adaptors."""

from __future__ import annotations

from html import escape
from typing import Mapping, NamedTuple, Sequence

from agglom.probes import wording as w
from agglom.probes.charts import Scale, strip_axis, strip_plot
from agglom.probes.page import Section, cell, folded, note, table, text
from agglom.probes.sections import headline


class Row(NamedTuple):
    """A line of a score table: name, colour class, metric -> (value, interval), further cells, what chance gives."""

    name: str
    tone: str
    values: Mapping[str, tuple[float | None, Sequence[float] | None]]
    more: Sequence[str] = ()
    chance: float | None = None


def scores(report: w.Report) -> Section:
    """Every probe on the models themselves."""
    parts = [_probe(report, probe, names) for probe in report["protocol"] if (names := w.alone(report, probe))]
    about = "<p>Every model by itself, without adaptors. Small print and bars: 95 % interval; dashed: chance.</p>"
    return Section("scores", "Scores", about + "".join(parts) if parts else "")


def inside(report: w.Report) -> Section:
    """Every probe on models through their adaptors, beside the encoder alone and the teacher."""
    probes = [p for p in report["protocol"] if w.inside(report, p)]
    both = [p for p in probes if w.alone(report, p)]
    parts = []
    for model in dict.fromkeys(entry["model"] for entry in report.get("through", {}).values()):
        mine = {e["adaptor"]: n for n, e in report["through"].items() if e["model"] == model}
        rows = []
        for probe in both:
            cells = []
            for teacher, name in mine.items():
                own = headline(report, teacher, probe)
                value, ci = _scored(report, name, probe, report["protocol"][probe]["metric"])
                beside = [w.between(report, probe, ci)] if ci else []
                beside += [f"teacher {w.number(report, probe, own)}"] if own is not None else []
                cells.append(cell(w.number(report, probe, value), "; ".join(beside)))
            rows.append([w.title(probe), cell(w.number(report, probe, headline(report, model, probe))), *cells])
        if rows:
            head = ["Probe", "Encoder alone", *(f"Through {teacher}" for teacher in mine)]
            parts.append(table(f"{w.spoken(model).capitalize()} through its adaptors, headline metrics", head, rows))
    for probe in probes:
        names = w.inside(report, probe)
        if probe in both:
            drawn = _table(report, probe, names, f"{w.title(probe)} through the adaptors, every metric")
            parts.append(folded(f"{w.title(probe)} through the adaptors, every metric", drawn))
        else:
            parts.append(_probe(report, probe, names))
    about = (
        "<p>An adaptor turns the student's features into those of one teacher. The encoder alone is what other tasks "
        "build on; through an adaptor it stands in for that teacher.</p>"
    )
    return Section("adaptors", "Through the adaptors", about + "".join(parts) if parts else "")


def score_table(
    caption: str,
    first: str,
    rows: Sequence[Row],
    metrics: Sequence[str],
    *,
    percent: bool,
    more: Sequence[str] = (),
) -> str:
    """Metrics of several models; the first one is drawn with its interval beside the number.

    Args:
        caption: of the table.
        first: head of the first column.
        rows: one a model.
        metrics: columns, the headline first.
        percent: whether the values are fractions.
        more: heads of the further cells.
    """
    factor = 100.0 if percent else 1.0

    def said(value: float | None) -> str:
        return "-" if value is None else w.percent(value) if percent else f"{value:.3g}"

    def bounds(ci: Sequence[float] | None) -> str:
        return f"{said(ci[0])} to {said(ci[1])}" if ci else ""

    drawn = [(v, ci) for row in rows for v, ci in [row.values.get(metrics[0], (None, None))] if v is not None]
    references = [row.chance for row in rows if row.chance is not None]
    scale = Scale.over([0.0, *(x for v, ci in drawn for x in (v, *(ci or ()))), *references])
    top = (
        f'<th scope="col" class="plot"><div><span>{escape(w.metric_name(metrics[0]))}</span>'
        f"{strip_axis(scale, factor)}</div></th>"
        if drawn
        else w.metric_name(metrics[0])
    )
    lines = []
    for row in rows:
        value, ci = row.values.get(metrics[0], (None, None))
        plot = "" if value is None else strip_plot(value, ci, scale, row.tone, row.chance)
        small = f'<span class="ci">{escape(bounds(ci))}</span>' if ci else ""
        cells = [f'<td class="plot"><div><span>{said(value)}{small}</span>{plot}</div></td>']
        cells += [cell(said(v), bounds(c)) for m in metrics[1:] for v, c in [row.values.get(m, (None, None))]]
        lines.append([row.name, *cells, *row.more])
    heads = [f'<th scope="col" class="text">{escape(word)}</th>' for word in more]
    return table(caption, [first, top, *map(w.metric_name, metrics[1:]), *heads], lines, heard=True)


def _probe(report: w.Report, probe: str, names: Sequence[str]) -> str:
    """Heading, what the probe asks, its table and how it was done."""
    percent = ' <span class="dim small">in percent</span>' if w.bounded(report, probe) else ""
    about = f"<p>{escape(w.ABOUT[probe])}</p>" if probe in w.ABOUT else ""
    drawn = _table(report, probe, names, w.title(probe))
    return f"<h3>{escape(w.title(probe))}{percent}</h3>{about}{drawn}{note(w.how(report, probe, names))}"


def _table(report: w.Report, probe: str, names: Sequence[str], caption: str) -> str:
    entry = report["protocol"][probe]["models"]
    metrics = w.metrics_of(report, probe, names)
    picked = any(entry[n].get("chosen") for n in names)
    rows = [
        Row(
            w.shown_name(report, n),
            w.tone(report, n),
            {m: _scored(report, n, probe, m) for m in metrics},
            [text(w.chosen(report, probe, n))] if picked else [],
            entry[n].get("chance"),
        )
        for n in names
    ]
    more = ["Chosen on val"] if picked else []
    return score_table(
        caption + w.unit(report, probe), "Model", rows, metrics, percent=w.bounded(report, probe), more=more
    )


def _scored(report: w.Report, name: str, probe: str, metric: str) -> tuple[float | None, Sequence[float] | None]:
    return (
        report["models"][name].get(probe, {}).get(metric),
        report["ci"].get(name, {}).get(probe, {}).get(metric),
    )
