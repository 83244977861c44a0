"""Several reports side by side: what each student kept, what it scores, and in what the runs differ."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Mapping, Sequence

from agglom.probes import wording as w
from agglom.probes.markdown import clean, grid
from agglom.probes.page import Section, cell, page, table, text
from agglom.probes.scores import Row, score_table
from agglom.probes.sections import headline, key, radar_of
from agglom.yaml_files import parse, read_text

ABOUT = "The student's metric, and under it the share of the best teacher's."
RESULTS = ("chosen", "chance", "at_edge", "warning")  # what a probe found, not how it looked


@dataclass(frozen=True)
class Run:
    """A report and the recipe it belongs to.

    Attributes:
        name: its folder.
        report: report.json.
        recipe: config.yaml of the run directory that it lies in, else nothing.
    """

    name: str
    report: dict[str, Any]
    recipe: dict[str, Any]

    @classmethod
    def of(cls, report: dict[str, Any], where: Path) -> Run:
        """Read the recipe of a report in `where`."""
        config = where.parent / "config.yaml"
        recipe = parse(read_text(config))[0] if config.is_file() else {}
        return cls(str(where.parent if where.name == "probes" else where), report, recipe or {})


def named(runs: Sequence[Run]) -> list[Run]:
    """The same under names without the folder that they have in common, where that tells them apart."""
    shared = Path(os.path.commonpath([run.name for run in runs]))
    short = [str(Path(run.name).relative_to(shared)) for run in runs]
    if len(set(short)) < len(short) or "." in short:
        return list(runs)
    return [replace(run, name=name) for run, name in zip(runs, short, strict=True)]


def markdown(runs: Sequence[Run]) -> str:
    """The comparison in words and tables."""
    probes = _probes(runs, "retention")
    rows = []
    for run in runs:
        kept = [run.report["retention"].get(probe) for probe in probes]
        shares = [f"{w.percent(k['student'])} ({w.percent(k['value'])})" if k else "-" for k in kept]
        rows.append([clean(run.name), *shares, w.percent(run.report["retention_mean"])])
    head = ["run", *(w.title(probe) for probe in probes), "mean retention"]
    parts = ["# Comparison", *_warnings(runs), f"{ABOUT[:-1]} in brackets, in percent.", grid(head, rows)]
    for probe in _probes(runs, "protocol"):
        having = _having(runs, probe)
        if having:
            metrics = _metrics(having, probe)
            cells = [[clean(run.name), *(_said(run.report, probe, m) for m in metrics)] for run in having]
            parts += [f"## {w.title(probe)}", grid(["run", *map(w.metric_name, metrics)], cells)]
    for title, rows in (("Recipes", recipes(runs)), ("Protocols", protocols(runs))):
        parts.append(f"## {title}")
        table_rows = [[f"`{clean(k)}`", *map(clean, values)] for k, *values in rows]
        parts.append(
            grid(["key", *(clean(r.name) for r in runs)], table_rows, words=True) if rows else "No difference."
        )
    return "\n\n".join(parts) + "\n"


def render(runs: Sequence[Run]) -> str:
    """The comparison as a page."""
    return page(
        "Comparison",
        f"{len(runs)} reports side by side: {', '.join(run.name for run in runs)}.",
        [
            Section(
                "warnings", "Read this first", "".join(f"<p><strong>{escape(x)}</strong></p>" for x in _warnings(runs))
            ),
            _retention(runs),
            _glance(runs),
            _scores(runs),
            _difference("recipes", "Recipes", recipes(runs), runs),
            _difference("protocols", "Protocols", protocols(runs), runs),
        ],
    )


def recipes(runs: Sequence[Run]) -> list[list[str]]:
    """Keys of config.yaml whose values differ, with every run's; the place of the run itself left out."""
    flat = [{k: v for k, v in w.flat(run.recipe).items() if not k.endswith("default_root_dir")} for run in runs]
    return _differing(flat)


def protocols(runs: Sequence[Run]) -> list[list[str]]:
    """What defines the numbers and isn't the same in all reports, with every report's."""
    return _differing([w.flat(_protocol(run.report)) for run in runs])


def _protocol(report: w.Report) -> dict[str, Any]:
    """All that the student's numbers depend on besides the student."""
    probes = {}
    for probe, entry in report["protocol"].items():
        mine = entry["models"].get(report["student"], {})
        probes[probe] = {k: v for k, v in mine.items() if k not in RESULTS and not k.startswith("val_")}
    made, data = report["provenance"], report["data"]
    return {
        "data": {k: data.get(k) for k in ("hash", "size", "limits", "splits")},
        "seed": made["seed"],
        "bootstrap": made["bootstrap"],
        "versions": made["versions"],
        "teachers": {t: made["models"][t]["fingerprint"] for t in report["teachers"]},
        "input": made["models"][report["student"]]["input"],
        "probes": probes,
    }


def _differing(flat: Sequence[Mapping[str, str]]) -> list[list[str]]:
    keys = sorted({key for entries in flat for key in entries})
    return [
        [key, *(w.shorten(entries.get(key, "-"), 90) for entries in flat)]
        for key in keys
        if len({entries.get(key) for entries in flat}) > 1
    ]


def _warnings(runs: Sequence[Run]) -> list[str]:
    out = []
    if len({run.report["data"]["hash"] for run in runs}) > 1:
        out.append("These reports are of different data: the numbers can't be compared.")
    if len({str(run.report["data"]["splits"]) for run in runs}) > 1:
        out.append("These reports are of different splits or numbers of images: see Protocols.")
    if len({str(sorted(_protocol(run.report)["teachers"].items())) for run in runs}) > 1:
        out.append("Not all reports have the same teachers: a share of the best teacher means something else in each.")
    return out


def _retention(runs: Sequence[Run]) -> Section:
    probes = _probes(runs, "retention")
    rows = []
    for run in runs:
        cells = []
        for probe in probes:
            k = run.report["retention"].get(probe)
            share = f"{w.percent(k['value'])} kept, {w.percent_between(k['ci'])}" if k else ""
            cells.append(cell(w.percent(k["student"]), share, kind=w.grade(k["value"])) if k else cell("-"))
        mean = run.report["retention_mean"]
        rows.append([run.name, cell(w.percent(mean), kind=w.grade(mean), big=True), *cells])
    head = ["Run", "Mean retention", *(w.title(probe) for probe in probes)]
    body = f"<p>{ABOUT}</p>{table('Students side by side, in percent', head, rows)}" if probes else ""
    return Section("retention", "Retention", body + f'<p class="dim small">Retention: {key()}</p>' if body else "")


def _glance(runs: Sequence[Run]) -> Section:
    probes = [
        probe
        for probe in _probes(runs, "protocol")
        if (having := _having(runs, probe)) and w.bounded(having[0].report, probe)
    ]
    rows = [
        (run.name, w.nth_tone(i), {p: v for p in probes if (v := _headline(run, p)) is not None})
        for i, run in enumerate(runs)
    ]
    about = "The students' headline metrics, in percent; higher is better."
    return Section("glance", "Every probe at a glance", radar_of(rows, probes, about))


def _scores(runs: Sequence[Run]) -> Section:
    parts = []
    for probe in _probes(runs, "protocol"):
        if having := _having(runs, probe):
            metrics, percent = _metrics(having, probe), w.bounded(having[0].report, probe)
            rows = [
                Row(run.name, w.nth_tone(i), {
                    m: (run.report["models"][run.report["student"]][probe].get(m), _ci(run.report, probe, m))
                    for m in metrics
                })
                for i, run in enumerate(runs) if run in having
            ]  # fmt: skip
            drawn = score_table(
                f"{w.title(probe)}{', in percent' if percent else ''}",
                "Run",
                rows,
                metrics,
                percent=percent,
            )
            parts.append(f"<h3>{escape(w.title(probe))}</h3>{drawn}")
    about = "<p>The students by themselves. Small print and bars: 95 % interval.</p>"
    return Section("scores", "Scores", about + "".join(parts) if parts else "")


def _difference(name: str, title: str, rows: Sequence[Sequence[str]], runs: Sequence[Run]) -> Section:
    if not rows:
        known = any(run.recipe for run in runs) or name != "recipes"
        return Section(name, title, "<p>No difference.</p>" if known else "<p>No report lies in a run directory.</p>")
    drawn = table(
        f"{title}: what differs", ["Key", *(run.name for run in runs)], [[k, *map(text, v)] for k, *v in rows]
    )
    return Section(name, title, f"<p>Only what differs is listed.</p>{drawn}")


def _probes(runs: Sequence[Run], part: str) -> list[str]:
    return list(dict.fromkeys(probe for run in runs for probe in run.report[part]))


def _having(runs: Sequence[Run], probe: str) -> list[Run]:
    return [run for run in runs if probe in run.report["models"].get(run.report["student"], {})]


def _metrics(runs: Sequence[Run], probe: str) -> list[str]:
    return list(dict.fromkeys(m for run in runs for m in w.metrics_of(run.report, probe, [run.report["student"]])))


def _headline(run: Run, probe: str) -> float | None:
    return headline(run.report, run.report["student"], probe) if probe in run.report["protocol"] else None


def _ci(report: w.Report, probe: str, metric: str) -> Sequence[float] | None:
    return report["ci"].get(report["student"], {}).get(probe, {}).get(metric)


def _said(report: w.Report, probe: str, metric: str) -> str:
    value = w.number(report, probe, report["models"][report["student"]][probe].get(metric))
    ci = w.between(report, probe, _ci(report, probe, metric))
    return f"{value} ({ci})" if ci else value
