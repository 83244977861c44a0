"""report.json (and the pictures beside it) -> report.md and a self-contained report.html."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from agglom.errors import UserError
from agglom.probes import pictures
from agglom.probes.charts import Series, interval_chart, line_chart, palette, read_losses, summary_of
from agglom.probes.page import cell, page, picture, strip, table, text

READS = 1  # schema versions up to this one
TITLES = {"knn": "kNN", "linear": "Linear", "zeroshot": "Zero-shot", "segmentation": "Segmentation"}
METRICS = {"miou": "mIoU", "aacc": "pixel accuracy", "macc": "mean class accuracy", "macro": "per-class mean"}


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
    losses = _losses(where)
    try:
        (where / "report.md").write_text(markdown(report, losses), encoding="utf-8")
        html = where / "report.html"
        html.write_text(render(report, losses, pictures.load(where)), encoding="utf-8")
    except OSError as err:
        raise UserError(f"{where}: can't be written ({err.strerror or err}); copy the report elsewhere") from err
    return html


def write_comparison(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Several reports side by side, as comparison.md and comparison.html in `out`; returns the latter's path.

    Raises:
        UserError: as `write_report`.
    """
    read = {str(folder): read_report(folder)[0] for folder in folders}
    probes = sorted({probe for report in read.values() for probe in report["retention"]})
    head = ["run", *(_title(probe) for probe in probes), "mean retention"]
    hashes = {report["data"]["hash"] for report in read.values()}
    warning = "" if len(hashes) == 1 else "These reports are of different data: the numbers can't be compared."
    lines, rows = [], []
    for name, report in read.items():
        kept = [report["retention"].get(probe) for probe in probes]
        mean = report["retention_mean"]
        lines.append([_md(name), *(f"{_pc(k['student'])} ({_pc(k['value'])})" if k else "-" for k in kept), _pc(mean)])
        rows.append(
            [
                name,
                *(
                    cell(_pc(k["student"]), f"{_pc(k['value'])} kept", kind=_grade(k["value"])) if k else cell("-")
                    for k in kept
                ),
                cell(_pc(mean), kind=_grade(mean)),
            ]
        )  # fmt: skip
    about = "The student's metric, and under it the share of the best teacher's."
    body = f"<h1>Comparison</h1><p>{escape(about)}</p>" + (
        f"<p><strong>{escape(warning)}</strong></p>" if warning else ""
    )
    body += table("Students side by side, in percent", head, rows)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        text_body = f"# Comparison\n\n{about} {warning}\n\n{_md_table(head, lines)}"
        (out / "comparison.md").write_text(text_body, encoding="utf-8")
        (out / "comparison.html").write_text(page("Comparison", body), encoding="utf-8")
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
    except (ValueError, KeyError, TypeError) as err:
        raise UserError(f"{where / 'report.json'}: not a report ({type(err).__name__}: {err}); probe again") from err
    if version > READS:
        raise UserError(f"{where / 'report.json'}: schema_version {version}; valid: up to {READS}; update agglom")
    return report, where


def markdown(report: Mapping[str, Any], losses: Mapping[str, Series]) -> str:
    """The report in words and tables."""
    student = report["student"]
    parts = [f"# What {_md(_spoken(student))} kept", _md(_lead(report))]
    kept = report["retention"]
    if kept:
        rows = [
            [_title(p), _metric(r["metric"]), _pc(r["student"]),
             f"{_pc(r['best_teacher'])} ({_md(r['best_teacher_name'])})", f"**{_pc(r['value'])}**", _ci(r["ci"])]
            for p, r in kept.items()
        ]  # fmt: skip
        head = ["probe", "metric", "student", "best teacher", "retention", "95 % interval"]
        parts += ["## Retention", "Student / best teacher, in percent.", _md_table(head, rows)]
    parts.append("## Scores")
    for probe in report["protocol"]:
        names = [n for n in report["models"] if probe in report["models"][n]]
        if not names:
            continue
        metrics = list(dict.fromkeys(m for n in names for m in report["models"][n][probe]))
        rows = [
            [_md(n), *(_score_md(report, n, probe, m) for m in metrics)]
            for n in names
        ]  # fmt: skip
        parts += [f"### {_title(probe)}", _md_table(["model", *map(_metric, metrics)], rows), _md(_how(report, probe))]
    if losses:
        rows = [[f"`{n}`", f"{a:.4g}", f"{b:.4g}", str(s)] for n, a, b, s in summary_of(losses)]
        parts += ["## Training", _md_table(["loss", "first", "last", "last step"], rows)]
    if report["skipped"]:
        parts.append("## Not evaluated")
        parts.append(
            "\n".join(f"- {_title(s['probe'])} of {_md(s['model'])}: {_md(s['reason'])}" for s in report["skipped"])
        )
    parts.append("## Protocol and provenance")
    parts.append(_md_table(["what", "value"], [[a, _md(b)] for a, b in _facts(report)]))
    rows = [[_md(n), *map(_md, _model_facts(p))] for n, p in report["provenance"]["models"].items()]
    parts.append(_md_table(["model", "role", "parameters", "input", "weights", "fingerprint"], rows))
    return "\n\n".join(parts) + "\n"


def render(
    report: Mapping[str, Any], losses: Mapping[str, Series], saved: Mapping[str, Mapping[str, np.ndarray]]
) -> str:
    """The whole HTML page."""
    title = f"What {_spoken(report['student'])} kept"
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(_lead(report))}</p>',
        _retention(report),
        _scores(report),
    ]
    parts += [_curves(losses), _maps(report, saved), _examples(report, saved), _masks(report, saved), _skipped(report)]
    return page(title, "\n".join([*parts, _provenance(report)]))


def _retention(report: Mapping[str, Any]) -> str:
    teachers = [t for t in report["teachers"] if any(t in r["teachers"] for r in report["retention"].values())]
    if not report["retention"]:
        return ""
    rows = []
    for probe, r in report["retention"].items():
        shares = [cell(_pc(r["teachers"].get(t)), kind=_grade(r["teachers"].get(t))) for t in teachers]
        best = cell(_pc(r["best_teacher"]), r["best_teacher_name"])
        share = (
            f'<td class="{_grade(r["value"])}"><span class="big">{_pc(r["value"])}</span>'
            f'<span class="ci">{escape(_ci(r["ci"]))}</span></td>'
        )
        rows.append([_title(probe), share, cell(_pc(r["student"])), best, *shares, text(_metric(r["metric"]))])
    key = "".join(
        f'<span class="key {_grade(v)}">{label}</span>'
        for v, label in ((1.0, "100 % or more"), (0.96, "95"), (0.92, "90"), (0.85, "80"), (0.1, "less"))
    )
    head = ["Probe", "Retention", "Student", "Best teacher", *(f"of {t}" for t in teachers), "Metric"]
    return (
        "<section><h2 id=\"retention\">Retention</h2><p>The student's metric divided by the best teacher's, and by "
        "each teacher's, in percent. Small print: 95 % bootstrap interval over test images, paired.</p>"
        + table("What the student kept, in percent", head, rows)
        + f'<p class="dim">Colours: {key}</p></section>'
    )


def _scores(report: Mapping[str, Any]) -> str:
    roles = {**dict.fromkeys(report.get("through", {}), "adaptor")}
    roles |= {n: p["role"] for n, p in report["provenance"]["models"].items()}
    parts = ['<section><h2 id="scores">Scores</h2>']
    for probe, entry in report["protocol"].items():
        names = [n for n in report["models"] if probe in report["models"][n]]
        if not names:
            continue
        metric = entry["metric"]
        metrics = list(dict.fromkeys(m for n in names for m in report["models"][n][probe]))
        chance = entry["models"][names[0]].get("chance")
        dots = [
            (n, roles[n], v, report["ci"][n][probe].get(metric))
            for n in names
            if (v := report["models"][n][probe].get(metric)) is not None
        ]
        label = f"{_title(probe)}, {_metric(metric)} in percent: " + ", ".join(f"{n} {_pc(v)}" for n, _, v, _ in dots)
        rows = [
            [
                n,
                text(roles[n]),
                *(cell(*_score(report, n, probe, m)) for m in metrics),
                text(_chosen(entry["models"][n])),
            ]
            for n in names
        ]
        parts.append(f"<h3>{escape(_title(probe))}</h3>")
        parts.append(interval_chart(label, dots, chance) if dots else "")
        parts.append(
            table(f"{_title(probe)}, in percent", ["Model", "Role", *map(_metric, metrics), "Chosen on val"], rows)
        )
        parts.append(f'<p class="dim">{escape(_how(report, probe))}</p>')
    return "".join(parts) + "</section>"


def _curves(losses: Mapping[str, Series]) -> str:
    if not losses:
        return ""
    charts = "".join(line_chart(name, series) for name, series in losses.items())
    return (
        '<section><h2 id="training">Training</h2><p>Losses over optimiser steps; each point is the mean of a stretch '
        f'of steps.</p><div class="charts">{charts}</div></section>'
    )


def _maps(report: Mapping[str, Any], saved: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    maps = saved.get("pca", {})
    if not maps:
        return ""
    count = len(next(iter(maps.values())))
    parts = [strip(saved["images"]["test"], "image", f"{count} test images")]
    for name, colours in maps.items():
        side, _, teacher = name.partition(" > ")
        shown = f"{side} through its adaptor for {teacher}" if teacher else name
        parts.append(strip(colours, shown, f"Feature map colours of {shown} on the same {count} images"))
    return (
        '<section><h2 id="maps">Feature maps</h2><p>The first three principal components of each feature map over '
        "these test images, as red, green and blue. Components of different models have no common order or "
        "sign, so each "
        f"model's are rotated (nothing else) to agree with {escape(report['student'])} where they can. The student "
        "through an adaptor lives in that teacher's space and shares the teacher's basis and colours exactly: the two "
        f"rows should look alike.</p>{''.join(parts)}</section>"
    )


def _examples(report: Mapping[str, Any], saved: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    examples = [e for e in report["examples"] if e["zeroshot"]]
    if not examples or "images" not in saved:
        return ""
    cards = []
    for example, image in zip(report["examples"], saved["images"]["test"], strict=True):
        guesses = ""
        for name, found in example["zeroshot"].items():
            items = "".join(
                f'<li class="{"right" if c == example["label"] else ""}">{escape(c)} <span class="dim">{s:.2f}</span>'
                f"{' ✓' if c == example['label'] else ''}</li>"
                for c, s in found
            )
            guesses += f"<div>{escape(name)}</div><ol>{items}</ol>"
        caption = f"“{escape(example['caption'])}”" if example["caption"] else f"<code>{escape(example['key'])}</code>"
        alt = f"Test image {example['key']}" + (f": {example['caption']}" if example["caption"] else "")
        cards.append(
            f'<div class="card">{picture(image, alt)}<p>{caption}<br><span class="dim">label: '
            f"{escape(str(example['label']))}</span></p>{guesses}</div>"
        )
    return (
        '<section><h2 id="examples">Zero-shot examples</h2><p>The three nearest classes, with their cosine; ✓ is the '
        f'label.</p><div class="cards">{"".join(cards)}</div></section>'
    )


def _masks(report: Mapping[str, Any], saved: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    masks = saved.get("masks", {})
    if len(masks) < 2:
        return ""
    names = report["data"]["seg_classes"]
    seen = sorted({int(v) for array in masks.values() for v in np.unique(array)} - {255})
    lookup = np.full((256, 3), 255, np.uint8)
    colours = palette(max([*seen, len(names) - 1]) + 1)
    lookup[: len(colours)] = colours
    count = len(masks["truth"])
    parts = [strip(saved["images"]["test"], "image", f"{count} test images")]
    for name, array in masks.items():
        shown = "ground truth" if name == "truth" else name
        alt = f"{'True' if name == 'truth' else 'Predicted'} masks of {shown} on the same {count} images"
        parts.append(strip(lookup[array], shown, alt))
    legend = "".join(
        f'<span><span class="swatch" style="background:rgb{colours[v]}"></span>'
        f"{escape(names[v] if v < len(names) else str(v))}</span>"
        for v in seen
    )
    return (
        '<section><h2 id="masks">Masks</h2><p>What a linear head reads from each frozen feature map, beside the truth '
        f'(white: ignored).</p>{"".join(parts)}<p class="dim">{legend}</p></section>'
    )


def _skipped(report: Mapping[str, Any]) -> str:
    if not report["skipped"]:
        return ""
    rows = [[_title(s["probe"]), text(s["model"]), text(s["reason"])] for s in report["skipped"]]
    return (
        f'<section><h2 id="skipped">Not evaluated</h2>{table("And why", ["Probe", "Model", "Reason"], rows)}</section>'
    )


def _provenance(report: Mapping[str, Any]) -> str:
    facts = [[a, text(b)] for a, b in _facts(report)]
    models = [[n, *map(text, _model_facts(p))] for n, p in report["provenance"]["models"].items()]
    full = json.dumps(report["protocol"], indent=1)
    return (
        '<section><h2 id="protocol">Protocol and provenance</h2><p>Backbones are frozen. Whatever is fitted is '
        "fitted on the train split, whatever is chosen is chosen on the val split, and the test split is looked "
        "at once.</p>"
        + table("Data and software", ["What", "Value"], facts)
        + table("Models", ["Model", "Role", "Parameters", "Input", "Weights", "Fingerprint"], models)
        + "<details><summary>Every hyper-parameter, grid and validation score</summary>"
        + f"<pre>{escape(full)}</pre></details></section>"
    )


def _spoken(name: str) -> str:
    """A model's name in a sentence: the run's own student has no name but that."""
    return f"the {name}" if name == "student" else name


def _lead(report: Mapping[str, Any]) -> str:
    kept, mean = report["retention"], report["retention_mean"]
    if mean is None:
        return (
            f"{report['student']}, frozen, under {len(report['protocol'])} probes; there is no teacher to compare with."
        )
    return (
        f"Over {len(kept)} probes {_spoken(report['student'])} keeps {_pc(mean)} % of the best teacher on the mean, "
        f"with one frozen backbone in the place of {len(report['teachers'])} ({', '.join(report['teachers'])})."
    )


def _how(report: Mapping[str, Any], probe: str) -> str:
    entry = report["protocol"][probe]
    first = next(iter(entry["models"].values()))
    chance = first.get("chance")
    used = {n: p["features"] for n, p in entry["models"].items()}
    same = len({json.dumps(v) for v in used.values()}) == 1
    spoken = str(next(iter(used.values()))) if same else "; ".join(f"{n}: {_plain_words(v)}" for n, v in used.items())
    words = [f"Features: {spoken}.", *(f"{first[k]}." for k in ("solver", "similarity", "prompts") if k in first)]
    edge = [n for n, p in entry["models"].items() if p.get("at_edge")]
    if edge:
        words.append(f"Chosen at the edge of the grid: {', '.join(edge)}.")
    return " ".join(words + ([f"Chance (most frequent class): {_pc(chance)}."] if chance is not None else []))


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, made = report["data"], report["provenance"]
    splits = "; ".join(
        f"{role}: {s['count']} images ({s['rows']} of {s['split']}"
        + (f", {s['unreadable']} unreadable)" if s["unreadable"] else ")")
        for role, s in data["splits"].items()
    )  # fmt: skip
    seconds = report["seconds"]
    return [
        ("data", data["path"]), ("data hash", data["hash"]), ("data licence", data["licence"]),
        ("splits", splits), ("image size", str(data["size"] or "as stored")),
        ("intervals", f"{made['bootstrap']['resamples']} bootstrap resamples over {made['bootstrap']['over']}"),
        ("seed", str(made["seed"])), ("versions", _plain_words(made["versions"])),
        ("wall time", f"{seconds['total']:.0f} s, of which features {seconds['extraction']:.0f} s"),
    ]  # fmt: skip


def _model_facts(p: Mapping[str, Any]) -> list[str]:
    spec = p["input"]
    size = "x".join(map(str, spec["size"])) if spec["size"] else "any"
    parameters = "-" if p["parameters"] is None else f"{p['parameters'] / 1e6:.2f} M"
    source = f"{p.get('source', '-')}, {p.get('licence', 'licence unknown')}"
    return [p["role"], parameters, f"{size} px, stride {spec['stride']}", source, p["fingerprint"]]


def _chosen(protocol: Mapping[str, Any]) -> str:
    return _plain_words(protocol.get("chosen") or {}) or "nothing"


def _plain_words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _score(report: Mapping[str, Any], name: str, probe: str, metric: str) -> tuple[str, str]:
    return _pc(report["models"][name][probe].get(metric)), _ci(report["ci"][name][probe].get(metric))


def _score_md(report: Mapping[str, Any], name: str, probe: str, metric: str) -> str:
    return " ".join(part for part in _score(report, name, probe, metric) if part)


def _losses(where: Path) -> dict[str, Series]:
    path = next((p for p in (where / "metrics.csv", where.parent / "metrics.csv") if p.is_file()), None)
    return read_losses(path) if path else {}


def _title(probe: str) -> str:
    return TITLES.get(probe, probe)


def _metric(metric: str) -> str:
    return METRICS.get(metric, metric.replace("top1", "top-1").replace("top5", "top-5"))


def _pc(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _ci(bounds: Sequence[float] | None) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}" if bounds else ""


def _grade(value: float | None) -> str:
    if value is None:
        return ""
    return next(
        name for name, least in (("r1", 1.0), ("r2", 0.95), ("r3", 0.9), ("r4", 0.8), ("r5", -1.0)) if value >= least
    )


def _md(value: Any) -> str:
    """Words that may hold anything, for a Markdown table cell."""
    out = escape(" ".join(str(value).split()), quote=False)
    for mark in "\\`*_[]|#":
        out = out.replace(mark, f"\\{mark}")
    return out


def _md_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
