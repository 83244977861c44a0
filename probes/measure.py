"""Several probes on several models under one protocol."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from agglom.data.ranks import distributed
from agglom.errors import UserError, nearest
from agglom.features import Backbone, TextTower
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.detection import DetectionProbe
from agglom.probes.fidelity import FidelityProbe
from agglom.probes.gather import ROLES, Gathered, ThroughModel, gather, splits_of
from agglom.probes.geometry import GeometryProbe
from agglom.probes.knn import KnnProbe
from agglom.probes.linear import LinearProbe
from agglom.probes.linear_sgd import LinearSgdProbe
from agglom.probes.retrieval import RetrievalProbe
from agglom.probes.retrieval_linear import LinearRetrievalProbe
from agglom.probes.segmentation import SegmentationProbe
from agglom.probes.segmentation_sgd import SegmentationSgdProbe
from agglom.probes.source import Source
from agglom.probes.towers import CachedText
from agglom.probes.zeroshot import ZeroShotProbe
from agglom.schema import find_class

log = logging.getLogger("agglom.probes")

PROBES: dict[str, Callable[..., Any]] = {  # name -> class of a Probe
    "detection": DetectionProbe,
    "fidelity": FidelityProbe,
    "geometry": GeometryProbe,
    "knn": KnnProbe,
    "linear": LinearProbe,
    "linear_sgd": LinearSgdProbe,
    "retrieval": RetrievalProbe,
    "retrieval_linear": LinearRetrievalProbe,
    "segmentation": SegmentationProbe,
    "segmentation_sgd": SegmentationSgdProbe,
    "zeroshot": ZeroShotProbe,
}


@dataclass(frozen=True)
class Measured:
    """What the probes found, and all that they looked at.

    Attributes:
        probes: as they ran.
        source: the data.
        plan: role -> split and rows, with counts.
        got: features and targets.
        subjects: every model, and every trained one through each of its adaptors.
        results: subject -> probe -> what it found.
        skipped: probe, model and reason of what couldn't be evaluated.
        seconds: probe -> subject -> seconds.
        extraction: seconds that the features took.
    """

    probes: list[Probe]
    source: Source
    plan: dict[str, dict[str, Any]]
    got: Gathered
    subjects: list[Subject]
    results: dict[str, dict[str, Result]]
    skipped: list[dict[str, str]]
    seconds: dict[str, dict[str, float]]
    extraction: float


def measure(
    models: Mapping[str, Backbone],
    data: str | Path,
    probes: Sequence[str | Probe],
    cache: Path,
    *,
    text: Mapping[str, TextTower] | None = None,
    random: str | None = None,
    limits: Mapping[str, int] | None = None,
    templates: str | Sequence[str] = "simple",
    size: int | None = None,
    show: int = 0,
    seed: int = 0,
) -> Measured | None:
    """Features of all models, then every probe on each; the arguments are those of `run_probes`.

    Returns:
        None in all processes but the first where several share the extraction out.

    Raises:
        UserError: unknown probe or split; bad data (see `extract`).
    """
    text = dict(text or {})
    built = [_build(probe, templates) for probe in probes]
    _check_limits(limits)
    fields = {"txt"} | {field for probe in built for field in probe.fields}  # txt: captions in the report
    source = Source.open(data, size=size, fields=tuple(sorted(fields)))
    plan = splits_of(source.index)
    source = replace(source, limits={plan[role]["split"]: n for role, n in (limits or {}).items() if role in plan})
    rank, world_size = distributed()
    clock = time.monotonic()
    adaptors = _looked_through(models, built, text, random)
    got = gather(models, source, plan, built, adaptors, cache, rank=rank, world_size=world_size)
    extraction = time.monotonic() - clock
    if rank:
        return None
    count = len(got.targets["test"].keys)
    rows = tuple(int(i) for i in np.unique(np.linspace(0, count - 1, min(show, count)).round())) if show else ()
    speaking = {teacher: CachedText(tower, cache, models.get(teacher)) for teacher, tower in text.items()}
    got.places |= {tower.place for tower in speaking.values()}
    subjects = _subjects(models, got, source, plan, speaking, random, rows, seed)
    results, skipped, seconds = _evaluate(built, subjects)
    for warning in sorted(
        {r.protocol["warning"] for by in results.values() for r in by.values() if "warning" in r.protocol}
    ):
        log.warning("%s: %s", data, warning)
    return Measured(built, source, plan, got, subjects, results, skipped, seconds, extraction)


def _looked_through(
    models: Mapping[str, Backbone], probes: Sequence[Probe], text: Mapping[str, TextTower], random: str | None
) -> dict[str, list[str]]:
    """Model -> teachers through whose adaptors it is looked at. An untrained one only where a text tower answers."""
    sees = any(probe.sees != "encoder" for probe in probes)
    speaks = any(probe.name in ("zeroshot", "retrieval") for probe in probes)
    return {
        name: [t for t in getattr(model, "adaptors", {}) if (sees and name != random) or (speaks and t in text)]
        for name, model in models.items()
    }


def _subjects(
    models: Mapping[str, Backbone],
    got: Gathered,
    source: Source,
    plan: dict[str, dict[str, Any]],
    text: Mapping[str, TextTower],
    random: str | None,
    rows: tuple[int, ...],
    seed: int,
) -> list[Subject]:
    """Every model, and every trained one through each of its adaptors."""

    def subject(name: str, model: Backbone, **more: Any) -> Subject:
        return Subject(
            name=name,
            model=model,
            features=got.features[name],
            targets=got.targets,
            peers=got.features,
            source=source,
            plan=plan,
            text=text,
            classes=source.index.classes,
            seg_classes=source.index.seg_classes,
            show=rows,
            seed=seed,
            **more,
        )

    out = []
    for name, model in models.items():
        inside = {teacher: key for key, (owner, teacher) in got.through.items() if owner == name}
        out.append(subject(name, model, through={t: got.features[key]["test"] for t, key in inside.items()}))
        if name != random:
            out += [subject(key, ThroughModel(model, t), adaptor=t) for t, key in inside.items()]
    return out


def _evaluate(
    probes: Sequence[Probe], subjects: Sequence[Subject]
) -> tuple[dict[str, dict[str, Result]], list[dict[str, str]], dict[str, dict[str, float]]]:
    results: dict[str, dict[str, Result]] = {}
    skipped: list[dict[str, str]] = []
    seconds: dict[str, dict[str, float]] = {}
    for probe in probes:
        for subject in subjects:
            if probe.sees != "both" and (probe.sees == "encoder") != (subject.adaptor is None):
                continue
            reason = probe.missing(subject)
            if reason is not None:
                skipped.append({"probe": probe.name, "model": subject.name, "reason": reason})
                continue
            clock = time.monotonic()
            results.setdefault(subject.name, {})[probe.name] = probe.evaluate(subject)
            seconds.setdefault(probe.name, {})[subject.name] = round(time.monotonic() - clock, 3)
    return results, skipped, seconds


def _build(probe: str | Probe, templates: str | Sequence[str]) -> Probe:
    if not isinstance(probe, str):
        return probe
    if "." in probe:
        cls = find_class(probe, Probe)
        if cls is None or not issubclass(cls, Probe):
            raise UserError(
                f"probes: {probe}: {'no such class' if cls is None else 'no Probe'}; valid: package.module.Class of a "
                "Probe; put its folder on PYTHONPATH"
            )
        return cls()
    if probe not in PROBES:
        raise UserError(f"probes: {probe!r}; {nearest(probe, PROBES)}, or package.module.Class of your own")
    return PROBES[probe](**({"templates": templates} if probe == "zeroshot" else {}))


def _check_limits(limits: Mapping[str, int] | None) -> None:
    for role, limit in (limits or {}).items():
        if role not in ROLES:
            raise UserError(f"limits: {role!r}; {nearest(role, ROLES)}")
        if limit < 1:
            raise UserError(f"limits.{role}: {limit}; valid: 1 or more")
