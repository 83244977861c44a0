"""How the numbers and names of a report are said, the same in Markdown and in HTML."""

from __future__ import annotations

import json
from typing import Any, Mapping, Sequence

Report = Mapping[str, Any]

TITLES = {
    "knn": "kNN", "linear": "Linear", "linear_sgd": "Linear, SGD over a grid", "zeroshot": "Zero-shot",
    "retrieval": "Retrieval", "retrieval_linear": "Retrieval, linear", "segmentation": "Segmentation",
    "segmentation_sgd": "Segmentation, SGD", "detection": "Detection", "fidelity": "Fidelity", "geometry": "Geometry",
}  # fmt: skip
METRICS = {
    "miou": "mIoU", "aacc": "pixel accuracy", "macc": "mean class accuracy", "macro": "per-class mean", "map": "mAP",
    "shift_error_half": "error, half a cell's shift", "shift_error": "error, a cell's shift",
    "position_r2": "position, R²", "val_miou": "mIoU on val",
}  # fmt: skip
PARTS = {
    "r1": "R@1", "r5": "R@5", "r10": "R@10", "mse": "relative error", "cka": "CKA", "rankme": "RankMe",
    "std": "spread", "top1": "top-1", "top5": "top-5", "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar": "AR",
    "ar1": "AR@1", "ar10": "AR@10", "ar100": "AR@100",
}  # fmt: skip
ABOUT = {  # what a probe asks, in a sentence or two
    "knn": "The class of the most similar train images, by a vote.",
    "linear": "The class by a linear classifier on frozen features, trained to its optimum.",
    "linear_sgd": "The class by the best of many linear classifiers on frozen features, trained at once.",
    "zeroshot": "The class whose name, in words, is nearest to the image; nothing is trained.",
    "retrieval": "The caption that belongs to an image, and the image that belongs to a caption.",
    "retrieval_linear": "Image to caption and back by a linear map from frozen features to words, fitted on train.",
    "segmentation": "The class of every pixel by a linear head on the frozen feature map, trained to its optimum.",
    "segmentation_sgd": "The class of every pixel by a linear head on the frozen feature map, trained by SGD.",
    "detection": "Boxes by a detector that is trained on the frozen backbone; COCO's average precision.",
    "fidelity": "How close the features through each adaptor are to the teacher's own on the test images: a cosine and "
    "a CKA of 1 and a relative error of 0 are the teacher itself; an error of 1 is no better than the teacher's mean.",
    "geometry": "The shape of the features, without labels. RankMe counts the directions in use. A spread of 1 is "
    "even, 0 is all the same. Position: how well a cell's features tell where it lies (R²). The errors are those of "
    "the map of a shifted image, moved back: 0 follows the image, 1.4 has nothing to do with it.",
}
GRADES = (  # class of a cell, least share of the teacher, what the legend says
    ("r1", 1.0, "100 % or more"), ("r2", 0.95, "95 to 100"), ("r3", 0.9, "90 to 95"), ("r4", 0.8, "80 to 90"),
    ("r5", -1.0, "below 80"),
)  # fmt: skip
TONES = 7  # distinct colours, the student's first; the page's style names them c0, c1, ...


def title(probe: str) -> str:
    """A probe's name."""
    return TITLES.get(probe, probe.replace("_", " "))


def metric_name(metric: str) -> str:
    """A metric's name: known parts of NAME_NAME@TOWER are spelt out."""
    name, at, tower = metric.partition("@")
    return METRICS.get(name, " ".join(PARTS.get(part, part) for part in name.split("_"))) + at + tower


def bounded(report: Report, probe: str) -> bool:
    """Whether the probe's metrics are fractions, which are said in percent."""
    return bool(report["protocol"][probe].get("bounded", True))


def number(report: Report, probe: str, value: float | None) -> str:
    """A metric in percent, or as it is where it is no fraction."""
    if value is None:
        return "-"
    return percent(value) if bounded(report, probe) else f"{value:.3g}"


def between(report: Report, probe: str, bounds: Sequence[float] | None) -> str:
    """An interval of a metric."""
    return " to ".join(number(report, probe, bound) for bound in bounds) if bounds else ""


def percent(value: float | None) -> str:
    """0.5 -> "50.0"."""
    return "-" if value is None else f"{100 * value:.1f}"


def percent_between(bounds: Sequence[float] | None) -> str:
    """(0.5, 0.6) -> "50.0 to 60.0"."""
    return f"{percent(bounds[0])} to {percent(bounds[1])}" if bounds else ""


def unit(report: Report, probe: str) -> str:
    """What a caption adds."""
    return ", in percent" if bounded(report, probe) else ""


def grade(value: float | None) -> str:
    """The colour class of a share of a teacher."""
    return "" if value is None else next(name for name, least, _ in GRADES if value >= least)


def spoken(name: str) -> str:
    """A model's name in a sentence: the run's own student has no name but that."""
    return f"the {name}" if name == "student" else name


def shown_name(report: Report, name: str) -> str:
    """A subject's name in a table: "MODEL > TEACHER" is a model through its adaptor."""
    inside = report.get("through", {}).get(name)
    return f"{inside['model']} through {inside['adaptor']}" if inside else name


def role(report: Report, name: str) -> str:
    """student, teacher, random, other or adaptor."""
    known = report["provenance"]["models"].get(name)
    return str(known["role"]) if known else "adaptor"


def tone(report: Report, name: str) -> str:
    """The colour class of a model, the same in all charts; through an adaptor it has the teacher's."""
    name = report.get("through", {}).get(name, {}).get("adaptor", name)
    if name == report.get("random"):
        return "random"
    order = [report["student"], *(n for n in report["provenance"]["models"] if n != report["student"])]
    return nth_tone(order.index(name)) if name in order else "random"


def nth_tone(place: int) -> str:
    """Colours for things in order; the student's own isn't used twice."""
    return f"c{place if place < TONES else 1 + (place - 1) % (TONES - 1)}"


def alone(report: Report, probe: str) -> list[str]:
    """The models that a probe evaluated by themselves."""
    return [n for n in _evaluated(report, probe) if n not in report.get("through", {})]


def inside(report: Report, probe: str) -> list[str]:
    """The subjects that a probe evaluated through an adaptor."""
    return [n for n in _evaluated(report, probe) if n in report.get("through", {})]


def _evaluated(report: Report, probe: str) -> list[str]:
    names = [*report["provenance"]["models"], *report.get("through", {})]  # json keeps the order they ran in
    return [n for n in names if probe in report["models"].get(n, {})]


def metrics_of(report: Report, probe: str, names: Sequence[str]) -> list[str]:
    """Every metric that one of them has, the headline first."""
    found = dict.fromkeys(m for n in names for m in report["models"][n][probe])
    first = report["protocol"][probe]["metric"]
    return [*([first] if first in found else []), *(m for m in found if m != first)]


def lead(report: Report) -> str:
    """The first sentence."""
    kept, mean = report["retention"], report["retention_mean"]
    if mean is None:
        return (
            f"{report['student']}, frozen, under {len(report['protocol'])} probes; there is no teacher to compare with."
        )
    teachers = report["teachers"]
    place = "the place of" if len(teachers) == 1 else f"the place of {len(teachers)}:"
    return (
        f"Over {len(kept)} probes {spoken(report['student'])} keeps {percent(mean)}\u00a0% of the best teacher on the "
        f"mean, with one frozen backbone in {place} {', '.join(teachers)}."
    )


def how(report: Report, probe: str, names: Sequence[str]) -> str:
    """What a probe did with these models, in a few sentences."""
    entry = report["protocol"][probe]["models"]
    first = entry[names[0]]
    used: dict[str, list[str]] = {}
    for name in names:
        if (said := entry[name].get("features")) is not None:
            only = next(iter(said.values())) if isinstance(said, Mapping) and len(said) == 1 else said
            used.setdefault(plain(only), []).append(shown_name(report, name))
    several = len(used) > 1
    words = [
        "Features: " + "; ".join(f"{said} ({', '.join(of)})" if several else said for said, of in used.items()) + "."
    ] * bool(used)
    words += [f"{k.capitalize()}: {first[k]}." for k in SAID if first.get(k)]
    grid = first.get("grid") or {}
    if any(isinstance(values, list) and len(values) > 1 for values in grid.values()):
        words.append(f"Tried on val: {shorten(plain(grid), 160)}.")
    edge = [shown_name(report, n) for n in names if entry[n].get("at_edge")]
    if edge:
        words.append(f"Chosen at the edge of the grid: {', '.join(edge)}.")
    if by_chance := sorted({entry[n]["chance"] for n in names if entry[n].get("chance") is not None}):
        frequent = {"cls", "seg"} & set(report["protocol"][probe].get("fields", ()))
        ends = [number(report, probe, value) for value in (by_chance[0], by_chance[-1])]
        words.append(
            f"Chance{', always the most frequent class' if frequent else ''}: {' to '.join(dict.fromkeys(ends))}."
        )
    return " ".join(words)


SAID = (
    "definitions",
    "solver",
    "similarity",
    "prompts",
    "hit",
    "reference",
    "warning",
)  # sentences of a probe's protocol


def chosen(report: Report, probe: str, name: str) -> str:
    """The hyper-parameters that val chose."""
    return plain(report["protocol"][probe]["models"][name].get("chosen") or {}) or "nothing"


def plain(value: Any) -> str:
    """A plain value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten(words: str, most: int) -> str:
    """At most so many characters."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def skipped(report: Report) -> list[tuple[str, str, str]]:
    """(probe, models, reason), models with the same reason in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for entry in report["skipped"]:
        rows.setdefault((entry["probe"], entry["reason"]), []).append(shown_name(report, entry["model"]))
    return [(title(probe), ", ".join(names), reason) for (probe, reason), names in rows.items()]


def facts(report: Report) -> list[tuple[str, str]]:
    """What the numbers depend on besides models and probes."""
    data, made, seconds = report["data"], report["provenance"], report["seconds"]
    splits = "; ".join(
        f"{name}: {s['count']} images ({s['rows']} of {s['split']}"
        + (f", {s['unreadable']} unreadable)" if s["unreadable"] else ")")
        for name, s in data["splits"].items()
    )
    probes = ", ".join(f"{title(probe)} {sum(by.values()):.1f} s" for probe, by in seconds.get("probes", {}).items())
    return [
        ("data", data["path"]), ("data index hash", data["hash"]), ("data source", data.get("source") or "not stated"),
        ("data licence", data["licence"] or "not stated"), ("splits", splits),
        ("limits", plain(data.get("limits") or {}) or "none"),
        ("image size", f"{data['size']} px" if data["size"] else "as stored"),
        ("intervals", f"{100 * made['bootstrap'].get('level', 0.95):.0f} %, {_resamples(report)} bootstrap "
                      f"resamples over {made['bootstrap']['over']}"),
        ("seed", str(made["seed"])),
        ("device", plain(made.get("device") or {}).replace("_", " ") or "not stated"),
        ("versions", plain(made["versions"])),
        ("wall time", f"{seconds['total']:.0f} s: features {seconds['extraction']:.0f} s; {probes}"),
        ("report schema", f"version {report['schema_version']}"),
    ]  # fmt: skip


def _resamples(report: Report) -> str:
    """Their number, and that of the probes that have another."""
    own = {
        probe: found["resamples"]
        for probe, about in report["protocol"].items()
        for found in about["models"].values()
        if "resamples" in found
    }
    return ", ".join(
        [str(report["provenance"]["bootstrap"]["resamples"]), *(f"{title(p)} {n}" for p, n in own.items())]
    )


MODEL_HEAD = ("Model", "Role", "Parameters", "Input", "Normalisation", "Weights", "Fingerprint")


def model_facts(entry: Mapping[str, Any]) -> list[str]:
    """The columns of `MODEL_HEAD` after the name."""
    spec = entry["input"]
    size = " x ".join(map(str, spec["size"])) if spec["size"] else "any"
    parameters = "-" if entry["parameters"] is None else f"{entry['parameters'] / 1e6:.2f} M"
    known = [entry[k] for k in ("source", "licence") if entry.get(k)]
    source = ", ".join([*known, *([f"sha256 {entry['sha256'][:12]}"] if entry.get("sha256") else [])]) or "not stated"
    normal = f"mean {plain(spec['mean'])}, std {plain(spec['std'])}" if "mean" in spec else "-"
    resize = f", {spec['interpolation']}" if "interpolation" in spec else ""
    return [
        entry["role"], parameters, f"{size} px, stride {spec['stride']}{resize}", normal, source, entry["fingerprint"],
    ]  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings -> "a.b.c" -> the value as JSON."""
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.dumps(value, default=str)}


MODE = (  # the curves of one section: series -> what y is
    ("mode_switching", "relative error of the map"),
    ("mode_switching_summary", "1 - cosine of the summary"),
)


def series(report: Report) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """What probes gave as curves: (probe, series) -> subject -> points."""
    out: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for name, by in report.get("series", {}).items():
        for probe, found in by.items():
            for key, points in found.items():
                if points := sorted((x, y) for x, y in points if x is not None and y is not None):
                    out.setdefault((probe, key), {})[name] = points
    return out


def mode_switching(report: Report) -> list[tuple[str, list[float], dict[str, dict[float, float]]]]:
    """(what y is, all sizes in pixels, subject -> size -> y), an entry a chart."""
    found, out = {key: lines for (_, key), lines in series(report).items()}, []
    for name, what in MODE:
        if lines := found.get(name):
            sizes = sorted({x for points in lines.values() for x, _ in points})
            out.append((f"{what[:1].upper()}{what[1:]}", sizes, {n: dict(points) for n, points in lines.items()}))
    return out


MODE_ABOUT = (
    "The same test images at several sizes: how far the features through each adaptor are from the teacher's, which "
    "sees them at its own size. The error is divided by the variance of the teacher's features, so that 1 is no "
    "better than their mean. A student that becomes another model at another size shows a jump."
)
