"""Several probes on several models under one protocol, into one report.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.errors import UserError, nearest
from agglom.features import Backbone, Features, TextTower
from agglom.probes import pictures
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.extract import FeatureSet, Source, Targets, Wanted, extract
from agglom.probes.fingerprint import tensors_of, weights_hash
from agglom.probes.knn import KnnProbe
from agglom.probes.linear import LinearProbe
from agglom.probes.segmentation import SegmentationProbe
from agglom.probes.statistics import RESAMPLES, interval
from agglom.probes.zeroshot import TEMPLATES, ZeroShotProbe

SCHEMA_VERSION = 1
ROLES = ("train", "val", "test")
PROBES: dict[str, Callable[..., Any]] = {  # name -> class of a Probe
    "knn": KnnProbe,
    "linear": LinearProbe,
    "segmentation": SegmentationProbe,
    "zeroshot": ZeroShotProbe,
}


def run_probes(
    models: Mapping[str, Backbone],
    data: str | Path,
    probes: Sequence[str | Probe] = tuple(PROBES),
    out: str | Path = "probes",
    *,
    student: str,
    teachers: Sequence[str] = (),
    random: str | None = None,
    text: Mapping[str, TextTower] | None = None,
    limits: Mapping[str, int] | None = None,
    templates: Sequence[str] = TEMPLATES,
    size: int | None = None,
    show: int = 6,
    cache: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate every model with every probe and write `out/report.json` and `out/pictures.npz`.

    Features are computed once a model and split, and kept in `cache`. What a probe can't evaluate is listed under
    `skipped` with the reason.

    Args:
        models: name in the report -> model. One with `.adaptors` (teacher -> images -> Features) is also looked at
            through them, where a probe asks for it.
        data: shard folder or address. Its "train", "val" and "test" splits are used; a missing one is made up from
            the others (see `splits_of`), and the report says so.
        probes: names from `PROBES`, or probes.
        out: folder of the report.
        student: the model that retention is computed for.
        teachers: the models it is compared with.
        random: the model that stands for "no training at all".
        text: teacher -> its text tower.
        limits: "train", "val", "test" -> only the first so many samples.
        templates: prompts of the zero-shot probe.
        size: pixels that images are resized and cropped to; None: they all have one size already.
        show: how many test images the report pictures.
        cache: folder of the feature cache; by default `out/cache`, which is then kept free of entries that this
            call didn't use.
        seed: of random pixels and bootstrap.

    Returns:
        the report, as written.

    Raises:
        UserError: unknown probe, model name or split; no probe could run; bad data (see `extract`).
    """
    out, started = Path(out), time.monotonic()
    text = dict(text or {})
    built = [_build(probe, templates) for probe in probes]
    _check_names(models, student, teachers, random, text, limits)
    fields = tuple(
        sorted({"txt"} | {field for probe in built for field in probe.fields})
    )  # txt: captions in the report
    source = Source.open(data, size=size, fields=fields)
    plan = splits_of(source.index)
    source = replace(source, limits={plan[role]["split"]: n for role, n in (limits or {}).items() if role in plan})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"{out}: can't be written ({err.strerror or err}); choose another --out") from err

    folder = Path(cache) if cache is not None else out / "cache"
    clock = time.monotonic()
    targets, features, through, used = _features(models, source, plan, built, text, folder)
    if cache is None:
        for entry in set(folder.iterdir()) - used:
            shutil.rmtree(entry, ignore_errors=True)
    extraction_s = time.monotonic() - clock

    count = len(targets["test"].keys)
    rows = tuple(int(i) for i in np.unique(np.linspace(0, count - 1, min(show, count)).round()))
    subjects = [
        Subject(
            name=name,
            model=model,
            features=features[name],
            targets=targets,
            through=through.get(name, {}),
            text=text,
            classes=source.index.classes,
            seg_classes=source.index.seg_classes,
            show=rows,
            seed=seed,
        )
        for name, model in models.items()
    ]
    results, skipped, seconds = _evaluate(built, subjects)
    if not results:
        reasons = "; ".join(f"{s['probe']} of {s['model']}: {s['reason']}" for s in skipped[:4])
        raise UserError(f"{data}: no probe could run ({reasons}); choose other data, probes or models")

    roles = {name: _role(name, student, teachers, random) for name in models}
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "student": student,
        "teachers": list(teachers),
        "random": random,
        "models": {n: {p: r.metrics for p, r in by.items()} for n, by in results.items()},
        "ci": {
            n: {p: {m: interval(s) for m, s in r.resamples.items()} for p, r in by.items()} for n, by in results.items()
        },
        "retention": _retentions(built, results, student, teachers),
        "skipped": skipped,
        "protocol": {
            probe.name: {
                "metric": probe.metric,
                "fields": list(probe.fields),
                "models": {n: by[probe.name].protocol for n, by in results.items() if probe.name in by},
            }
            for probe in built
        },
        "data": {
            "path": str(data),
            "hash": source.hash,
            "source": source.index.source,
            "licence": source.index.licence,
            "size": size,
            "limits": dict(limits or {}),
            "splits": plan,
            "classes": list(source.index.classes or ()),
            "seg_classes": list(source.index.seg_classes or ()),
        },
        "provenance": {
            "models": {name: _provenance(model, roles[name]) for name, model in models.items()},
            "seed": seed,
            "bootstrap": {"resamples": RESAMPLES, "level": 0.95, "over": "test images, paired across models"},
            "versions": _versions(),
            "device": {"cpu_threads": torch.get_num_threads(), "machine": platform.machine()},
        },
        "seconds": {"extraction": round(extraction_s, 2), "probes": seconds},
    }
    report["retention_mean"] = _mean([r["value"] for r in report["retention"].values()])
    report["examples"] = _pictures(out, source, plan["test"], models, targets["test"], rows, results, student)
    report["seconds"]["total"] = round(time.monotonic() - started, 2)
    report = _plain(report)
    scratch = out / ".report.json.tmp"
    scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, out / "report.json")
    return report


def splits_of(index: Any) -> dict[str, dict[str, Any]]:
    """train, val, test -> `{"split", "rows"}`: which split it is, and "all" or which part of it.

    Without a test split, val is the test; without a val split (or when it became the test), every fifth train sample
    is val and the others train, so that nothing is ever chosen on test.

    Raises:
        UserError: there is no train split, or neither val nor test.
    """
    counts = {split: count for split, count in index.counts.items() if count}
    if "train" not in counts or not {"val", "test"} & set(counts):
        have = ", ".join(sorted(counts)) or "none"
        raise UserError(f"{index.root}: splits {have}; the probes want train, and val or test or both")
    test = "test" if "test" in counts else "val"
    if "val" in counts and test != "val":
        return {role: {"split": role, "rows": "all"} for role in ROLES}
    return {
        "train": {"split": "train", "rows": "4 of 5"},
        "val": {"split": "train", "rows": "every 5th"},
        "test": {"split": test, "rows": "all"},
    }


def _features(
    models: Mapping[str, Backbone],
    source: Source,
    plan: dict[str, dict[str, Any]],
    probes: Sequence[Probe],
    text: Mapping[str, TextTower],
    cache: Path,
) -> tuple[
    dict[str, Targets], dict[str, dict[str, FeatureSet]], dict[str, dict[str, FeatureSet]], set[Path]
]:  # fmt: skip
    """Role -> targets; model -> role -> features; model -> teacher -> test features through the adaptor; places."""
    maps = any(p.spatial and all(f in source.index.fields[plan["test"]["split"]] for f in p.fields) for p in probes)
    inside = {
        f"{name} > {tower}": (name, tower)
        for name, model in models.items()
        for tower in text
        if any(probe.name == "zeroshot" for probe in probes) and tower in getattr(model, "adaptors", {})
    }
    targets: dict[str, Targets] = {}
    features: dict[str, dict[str, FeatureSet]] = {name: {} for name in models}
    through: dict[str, dict[str, FeatureSet]] = {}
    read: dict[str, tuple[Targets, dict[str, FeatureSet]]] = {}
    used: set[Path] = set()
    for role in ROLES:
        split = plan[role]["split"]
        if split not in read:
            wanted = {name: Wanted(model, spatial=maps) for name, model in models.items()}
            if role == "test":
                wanted |= {key: Wanted(_Through(models[n], t)) for key, (n, t) in inside.items()}
            found_targets, found, places = extract(wanted, source, split, cache)
            read[split] = found_targets, found
            used |= places
        found_targets, found = read[split]
        rows = _part(len(found_targets.keys), plan[role]["rows"])
        targets[role] = found_targets if rows is None else found_targets.take(rows)
        plan[role]["count"] = len(targets[role].keys)
        plan[role]["unreadable"] = source.rows(split) - len(found_targets.keys)
        for name in models:
            features[name][role] = found[name] if rows is None else found[name].take(rows)
        if role == "test":
            for key, (name, tower) in inside.items():
                through.setdefault(name, {})[tower] = found[key]
    return targets, features, through, used


def _part(count: int, rows: str) -> np.ndarray | None:
    if rows == "all":
        return None
    fifth = np.arange(count) % 5 == 4
    return np.flatnonzero(fifth if rows == "every 5th" else ~fifth)


class _Through(torch.nn.Module):
    """A model seen through one of its adaptors: answers in that teacher's space."""

    def __init__(self, model: Any, teacher: str) -> None:
        super().__init__()
        if isinstance(model, torch.nn.Module):
            self.model = model  # a submodule, so that its weights are hashed and its device is known
        self.input, self._adaptor = model.input, [model.adaptors[teacher]]

    def forward(self, images: Tensor) -> Features:
        return self._adaptor[0](images)


def _evaluate(
    probes: Sequence[Probe], subjects: Sequence[Subject]
) -> tuple[dict[str, dict[str, Result]], list[dict[str, str]], dict[str, dict[str, float]]]:
    results: dict[str, dict[str, Result]] = {}
    skipped: list[dict[str, str]] = []
    seconds: dict[str, dict[str, float]] = {}
    for probe in probes:
        for subject in subjects:
            reason = probe.missing(subject)
            if reason is not None:
                skipped.append({"probe": probe.name, "model": subject.name, "reason": reason})
                continue
            clock = time.monotonic()
            results.setdefault(subject.name, {})[probe.name] = probe.evaluate(subject)
            seconds.setdefault(probe.name, {})[subject.name] = round(time.monotonic() - clock, 3)
    return results, skipped, seconds


def _retentions(
    probes: Sequence[Probe], results: Mapping[str, Mapping[str, Result]], student: str, teachers: Sequence[str]
) -> dict[str, dict[str, Any]]:
    out = {}
    for probe in probes:
        mine = results.get(student, {}).get(probe.name)
        theirs = {t: results[t][probe.name] for t in teachers if probe.name in results.get(t, {})}
        if mine is None or not theirs:
            continue
        metric = probe.metric
        best = max(theirs, key=lambda t: theirs[t].metrics[metric])
        ratios = {t: _ratio(mine.metrics[metric], r.metrics[metric]) for t, r in theirs.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            paired = mine.resamples[metric] / theirs[best].resamples[metric]
        out[probe.name] = {
            "value": ratios[best],
            "ci": interval(paired),
            "metric": metric,
            "student": mine.metrics[metric],
            "best_teacher": theirs[best].metrics[metric],
            "best_teacher_name": best,
            "teachers": ratios,
        }
    return out


def _pictures(
    out: Path,
    source: Source,
    test: Mapping[str, Any],
    models: Mapping[str, Backbone],
    targets: Targets,
    rows: Sequence[int],
    results: Mapping[str, Mapping[str, Result]],
    student: str,
) -> list[dict[str, Any]]:
    """Save the arrays that the report pictures; return what it says beside them."""
    keys = {targets.keys[row] for row in rows}
    found: dict[str, Any] = {}
    for sample in source.samples(test["split"]):
        if sample["key"] in keys:
            found[sample["key"]] = torch.as_tensor(sample["image"])
        if len(found) == len(keys):
            break
    images = torch.stack([found[targets.keys[row]] for row in rows])
    arrays = {"images/test": images.permute(0, 2, 3, 1).numpy()}
    adaptors = getattr(models[student], "adaptors", {})
    for name, colours in pictures.pca_maps(models, adaptors, images.float() / 255, student).items():
        arrays[f"pca/{name}"] = colours
    if targets.masks is not None:
        arrays["masks/truth"] = np.stack([targets.masks[row] for row in rows])
    guesses = {}
    for name, by in results.items():
        shown = {key: value for result in by.values() for key, value in result.show.items() if value is not None}
        if "masks" in shown:
            arrays[f"masks/{name}"] = shown["masks"]
        if "zeroshot" in shown:
            guesses[name] = shown["zeroshot"]
    pictures.save(out, arrays)
    classes = source.index.classes
    return [
        {
            "key": targets.keys[row],
            "caption": targets.captions[row] if targets.captions else None,
            "label": (
                None if targets.labels is None else _name(classes, int(targets.labels[row]))
            ),
            "zeroshot": {name: guess[i] for name, guess in guesses.items()},
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip


def _name(classes: Sequence[str] | None, label: int) -> str:
    return classes[label] if classes and label < len(classes) else str(label)


def _build(probe: str | Probe, templates: Sequence[str]) -> Probe:
    if not isinstance(probe, str):
        return probe
    if probe not in PROBES:
        raise UserError(f"probes: {probe!r}; {nearest(probe, PROBES)}")
    return PROBES[probe](**({"templates": templates} if probe == "zeroshot" else {}))


def _check_names(
    models: Mapping[str, Backbone],
    student: str,
    teachers: Sequence[str],
    random: str | None,
    text: Mapping[str, TextTower],
    limits: Mapping[str, int] | None,
) -> None:
    named = [("student", student), *(("teachers", t) for t in teachers), *([("random", random)] if random else [])]
    for role, name in named:
        if name not in models:
            raise UserError(f"{role}: {name!r} is not among the models; {nearest(name, models)}")
    for role, limit in (limits or {}).items():
        if role not in ROLES:
            raise UserError(f"limits: {role!r}; {nearest(role, ROLES)}")
        if limit < 1:
            raise UserError(f"limits.{role}: {limit}; valid: 1 or more")


def _role(name: str, student: str, teachers: Sequence[str], random: str | None) -> str:
    return {student: "student", random: "random"}.get(name, "teacher" if name in teachers else "other")


def _provenance(model: Backbone, role: str) -> dict[str, Any]:
    known = {
        key: getattr(model, key) for key in ("source", "licence", "sha256") if isinstance(getattr(model, key, 0), str)
    }
    count = sum(t.numel() for _, t in tensors_of(model) if isinstance(t, torch.nn.Parameter)) or None
    return {
        "role": role, "fingerprint": weights_hash(model), "input": model.input.as_dict(), "parameters": count, **known,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for package in ("agglom", "torch", "timm", "open_clip_torch", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _ratio(mine: float, theirs: float) -> float | None:
    return mine / theirs if theirs > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _plain(value: Any) -> Any:
    """What json can say: numpy numbers become Python's, tuples lists, values that aren't finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
