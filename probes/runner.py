"""What the probes found of several models, into one report.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import torch

from agglom.errors import UserError, nearest
from agglom.features import Backbone, TextTower
from agglom.probes.base import Probe, Result, headline
from agglom.probes.features import Targets
from agglom.probes.fingerprint import device_of, tensors_of, weights_hash
from agglom.probes.measure import measure
from agglom.probes.shown import collect
from agglom.probes.statistics import RESAMPLES, interval
from agglom.whole import whole

SCHEMA_VERSION = 1


def run_probes(
    models: Mapping[str, Backbone],
    data: str | Path,
    probes: Sequence[str | Probe] = ("knn", "linear", "segmentation", "zeroshot"),
    out: str | Path = "probes",
    *,
    student: str,
    teachers: Sequence[str] = (),
    random: str | None = None,
    text: Mapping[str, TextTower] | None = None,
    limits: Mapping[str, int] | None = None,
    templates: str | Sequence[str] = "simple",
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
        probes: names from `measure.PROBES`, `package.module.Class` of other ones, or probes.
        out: folder of the report.
        student: the model that retention is computed for.
        teachers: the models it is compared with.
        random: the model that stands for "no training at all".
        text: teacher -> its text tower.
        limits: "train", "val", "test" -> only the first so many samples.
        templates: prompts of the zero-shot probe: "simple", "full", a file with one a line, or a list.
        size: pixels that images are resized and cropped to; None: they all have one size already.
        show: how many test images the report pictures.
        cache: folder of the feature cache; by default `out/cache`, which is then kept free of entries that this
            call didn't use.
        seed: of random pixels and bootstrap.

    Returns:
        the report, as written; empty in all processes but the first where several share the extraction out.

    Raises:
        UserError: unknown probe, model name or split; no probe could run; bad data (see `extract`).
    """
    out, started = Path(out), time.monotonic()
    _check_names(models, student, teachers, random)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"{out}: can't be written ({err.strerror or err}); choose another --out") from err
    folder = Path(cache) if cache is not None else out / "cache"
    found = measure(
        models, data, probes, folder, text=text, random=random, limits=limits, templates=templates, size=size,
        show=show, seed=seed,
    )  # fmt: skip
    if found is None:
        return {}
    if cache is None:
        for entry in set(folder.iterdir()) - found.got.places:
            shutil.rmtree(entry, ignore_errors=True)
    built, source, plan, got, results = found.probes, found.source, found.plan, found.got, found.results
    targets = found.got.targets
    if not results:
        reasons = "; ".join(f"{s['probe']} of {s['model']}: {s['reason']}" for s in found.skipped[:4])
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
        "series": {n: {p: r.series for p, r in by.items() if r.series} for n, by in results.items()},
        "through": {
            s.name: {"model": got.through[s.name][0], "adaptor": s.adaptor} for s in found.subjects if s.adaptor
        },
        "retention": _retentions(built, results, student, teachers, targets),
        "skipped": found.skipped,
        "protocol": {
            probe.name: {
                "metric": headline(probe, targets),
                "bounded": probe.bounded,
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
            "device": {
                "cpu_threads": torch.get_num_threads(),
                "machine": platform.machine(),
                "models": sorted({str(device_of(model)) for model in models.values()}),
            },
        },
        "seconds": {"extraction": round(found.extraction, 2), "probes": found.seconds},
    }
    report["retention_mean"] = _mean([r["value"] for r in report["retention"].values()])
    report["examples"] = collect(out, found, models, student, teachers)
    report["seconds"]["total"] = round(time.monotonic() - started, 2)
    report = _plain(report)
    with whole(out / "report.json", owner="report") as scratch:
        scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _retentions(
    probes: Sequence[Probe],
    results: Mapping[str, Mapping[str, Result]],
    student: str,
    teachers: Sequence[str],
    targets: Mapping[str, Targets],
) -> dict[str, dict[str, Any]]:
    out = {}
    for probe in probes:
        if not probe.bounded:
            continue
        mine = results.get(student, {}).get(probe.name)
        theirs = {t: results[t][probe.name] for t in teachers if probe.name in results.get(t, {})}
        if mine is None or not theirs:
            continue
        metric = headline(probe, targets)
        best = max(theirs, key=lambda t: theirs[t].metrics[metric])
        ratios = {t: _ratio(mine.metrics[metric], r.metrics[metric]) for t, r in theirs.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            paired = {
                t: interval(mine.resamples[metric] / r.resamples[metric])
                for t, r in theirs.items()
                if metric in mine.resamples and metric in r.resamples
            }
        out[probe.name] = {
            "value": ratios[best],
            "ci": paired.get(best),
            "metric": metric,
            "student": mine.metrics[metric],
            "best_teacher": theirs[best].metrics[metric],
            "best_teacher_name": best,
            "teachers": ratios,
            "teachers_ci": paired,
        }
    return out


def _check_names(
    models: Mapping[str, Backbone],
    student: str,
    teachers: Sequence[str],
    random: str | None,
) -> None:
    named = [("student", student), *(("teachers", t) for t in teachers), *([("random", random)] if random else [])]
    for role, name in named:
        if name not in models:
            raise UserError(f"{role}: {name!r} is not among the models; {nearest(name, models)}")


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
