"""report.json (and the pictures beside it) -> report.md and a self-contained report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from agglom.errors import UserError
from agglom.probes import compare, gallery, pictures, sections
from agglom.probes import wording as w
from agglom.probes.gallery import Saved
from agglom.probes.markdown import markdown
from agglom.probes.page import page
from agglom.probes.scores import inside, scores
from agglom.probes.training import Series, read_metrics

READS = 1  # schema versions up to this one


def write_report(folder: str | Path) -> Path:
    """Write report.md and report.html beside a report.json; no model is needed.

    Args:
        folder: of the report, or a run directory that has it in `probes/`.

    Returns:
        The path of report.html.

    Raises:
        UserError: there is no report, it isn't readable, or the place can't be written.
    """
    report, where = read_report(folder)
    path = next((p for p in (where / "metrics.csv", where.parent / "metrics.csv") if p.is_file()), None)
    columns = read_metrics(path) if path else {}
    try:
        (where / "report.md").write_text(markdown(report, columns), encoding="utf-8")
        html = where / "report.html"
        html.write_text(render(report, columns, pictures.load(where)), encoding="utf-8")
    except OSError as err:
        raise UserError(f"{where}: can't be written ({err.strerror or err}); copy the report elsewhere") from err
    return html


def write_comparison(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Several reports side by side, as comparison.md and comparison.html in `out`; returns the latter's path.

    Raises:
        UserError: as `write_report`.
    """
    runs = []
    for folder in folders:
        report, where = read_report(folder)
        runs.append(compare.Run.of(report, where))
    runs, out = compare.named(runs), Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(compare.markdown(runs), encoding="utf-8")
        (out / "comparison.html").write_text(compare.render(runs), encoding="utf-8")
    except OSError as err:
        raise UserError(f"{out}: can't be written ({err.strerror or err}); choose another --out") from err
    return out / "comparison.html"


def read_report(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """The report of a folder or run directory, and the folder it is in.

    Raises:
        UserError: none there, or not one of ours.
    """
    folder = Path(folder)
    where = next((p for p in (folder, folder / "probes") if (p / "report.json").is_file()), None)
    if where is None:
        raise UserError(f"{folder}: no report.json there or in probes/; write one with `agglom probe --out {folder}`")
    try:
        report = json.loads((where / "report.json").read_text(encoding="utf-8"))
        version = report["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise UserError(f"{where / 'report.json'}: not a report ({type(err).__name__}: {err}); probe again") from err
    if not isinstance(version, int) or version > READS:
        raise UserError(f"{where / 'report.json'}: schema_version {version!r:.40}; valid: up to {READS}; update agglom")
    return report, where


def render(report: w.Report, columns: Mapping[str, Series], saved: Saved) -> str:
    """The whole HTML page.

    Args:
        report: report.json.
        columns: of metrics.csv, or none.
        saved: from `pictures.load`.
    """
    return page(
        f"What {w.spoken(report['student'])} kept",
        w.lead(report),
        [
            sections.retention(report),
            sections.glance(report),
            scores(report),
            inside(report),
            sections.mode_switching(report),
            sections.training(report, columns),
            gallery.maps(report, saved),
            gallery.neighbours(report, saved),
            gallery.examples(report, saved),
            gallery.masks(report, saved),
            gallery.boxes(report, saved),
            sections.fitting(report),
            sections.skipped(report),
            sections.provenance(report),
        ],
    )
