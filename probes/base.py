"""What every probe promises, and what it is handed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Protocol, runtime_checkable

import numpy as np

from agglom.features import Backbone, TextTower
from agglom.probes.extract import FeatureSet, Targets


@dataclass(frozen=True)
class Subject:
    """One model under evaluation, with everything that was computed for it.

    Attributes:
        name: of the model in the report.
        model: itself, for probes that train through it; frozen-feature probes leave it alone.
        features: "train", "val" and "test" -> its features.
        targets: "train", "val" and "test" -> labels, masks and captions, the same for every model.
        through: teacher -> the test features of this model through its adaptor for that teacher.
        text: teacher -> text tower.
        classes: names of the labels, or None.
        seg_classes: names of the mask values, or None.
        show: rows of the test split whose predictions the report pictures.
        seed: for whatever a probe draws.
    """

    name: str
    model: Backbone
    features: Mapping[str, FeatureSet]
    targets: Mapping[str, Targets]
    through: Mapping[str, FeatureSet] = field(default_factory=dict)
    text: Mapping[str, TextTower] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    seg_classes: tuple[str, ...] | None = None
    show: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a probe found.

    Attributes:
        metrics: name -> value, fractions in [0, 1].
        protocol: everything else that defines the numbers: features used, hyper-parameter grid, what was chosen.
        resamples: metric -> (R,) its values over bootstrap resamples of the test images (for intervals). Resample i
            is the same for every model, so that ratios can be paired.
        show: what the report pictures: name -> array or plain data, in the order of `Subject.show`.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    resamples: dict[str, np.ndarray] = field(default_factory=dict)
    show: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Probe(Protocol):
    """A small evaluation of a frozen backbone.

    Attributes:
        name: the key in the report.
        metric: the headline metric, which retention is taken of.
        fields: the sample fields it reads ("cls", "seg", "txt", "boxes").
        spatial: whether it needs feature maps, not only vectors.
    """

    name: str
    metric: str
    fields: tuple[str, ...]
    spatial: bool

    def missing(self, subject: Subject) -> str | None:
        """Why this subject can't be evaluated, in a few words, or None."""
        ...

    def evaluate(self, subject: Subject) -> Result:
        """Evaluate. Hyper-parameters are chosen on "val"; "test" is looked at once, by what was chosen."""
        ...


def label_problem(subject: Subject) -> str | None:
    """Why the labels can't be classified, or None."""
    for role, targets in subject.targets.items():
        if targets.labels is None:
            return f"the {role} split has no .cls"
        if role == "train" and len(np.unique(targets.labels)) < 2:
            return "the train split has a single class"
    return None


def class_count(subject: Subject) -> int:
    """K: the named classes, or one more than the largest label of any split."""
    largest = max(int(t.labels.max()) for t in subject.targets.values() if t.labels is not None and len(t.labels))
    return max(len(subject.classes or ()), largest + 1)


def majority(labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class: what "chance" means in the report."""
    return float(np.bincount(labels).max() / len(labels))
