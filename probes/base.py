"""What every probe promises, and what it is handed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator, Literal, Mapping, Sequence

import numpy as np

from agglom.features import Backbone, TextTower
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.source import Source

Through = Literal["encoder", "adaptor", "both"]


@dataclass(frozen=True)
class Subject:
    """One model under evaluation, with everything that was computed for it.

    Attributes:
        name: of the model in the report; "STUDENT > TEACHER" through an adaptor.
        model: itself, for probes that show it images; frozen-feature probes leave it alone.
        features: "train", "val" and "test" -> its features.
        targets: "train", "val" and "test" -> labels, masks and captions, the same for every model.
        through: teacher -> the test features of this model through its adaptor for that teacher.
        adaptor: the teacher through whose adaptor it is looked at; None: the encoder alone.
        peers: every model and, through an adaptor, every "STUDENT > TEACHER" -> role -> features; this one included.
        source: where the images are, for probes that read them.
        plan: role -> which split it is and which rows of it, see `agglom.probes.splits_of`.
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
    adaptor: str | None = None
    peers: Mapping[str, Mapping[str, FeatureSet]] = field(default_factory=dict)
    source: Source | None = None
    plan: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text: Mapping[str, TextTower] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    seg_classes: tuple[str, ...] | None = None
    show: tuple[int, ...] = ()
    seed: int = 0

    def samples(self, role: str, fields: Sequence[str] = (), *, raw: bool = False) -> Iterator[dict[str, Any]]:
        """The samples of a role in order, decoded: `key`, `image` uint8 (3, H, W) and these fields.

        Args:
            role: "train", "val" or "test".
            fields: such as "seg" or "boxes".
            raw: in the size in which they are stored; else as all probes see them.
        """
        assert self.source is not None
        entry = self.plan[role]
        for number, sample in enumerate(self.source.samples(entry["split"], fields=fields, raw=raw)):
            if in_part(number, entry["rows"]):
                yield sample


def in_part(number: int, rows: str) -> bool:
    """Whether a sample of a split belongs to "all", to "every 5th" or to the other "4 of 5"."""
    return rows == "all" or (number % 5 == 4) == (rows == "every 5th")


@dataclass(frozen=True)
class Result:
    """What a probe found.

    Attributes:
        metrics: name -> value, fractions in [0, 1] where the probe is bounded.
        protocol: everything else that defines the numbers: features used, hyper-parameter grid, what was chosen.
        resamples: metric -> (R,) its values over bootstrap resamples of the test images (for intervals). Resample i
            is the same for every model, so that ratios can be paired.
        show: what the report pictures: name -> array or plain data, in the order of `Subject.show`.
        series: what the report draws as curves: name -> [(x, y), ...].
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    resamples: dict[str, np.ndarray] = field(default_factory=dict)
    show: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


class Probe:
    """A small evaluation of a frozen backbone. A subclass sets the attributes and implements both methods.

    Attributes:
        name: the key in the report.
        metric: the headline metric, which retention is taken of.
        several: the headline metric where an image may have several classes; None: the same, or it takes no such data.
        fields: the sample fields it reads ("cls", "seg", "txt", "boxes").
        spatial: whether it needs the feature maps of all images kept, not only vectors.
        blocks: of how many last blocks it looks at the vectors.
        sees: the "encoder" alone, models through an "adaptor", or "both" (a subject each).
        bounded: whether its metrics are fractions in [0, 1], which the report shows in percent.
    """

    name: str
    metric: str
    several: str | None = None
    fields: tuple[str, ...] = ()
    spatial: bool = False
    blocks: int = 0
    sees: Through = "encoder"
    bounded: bool = True

    def missing(self, subject: Subject) -> str | None:
        """Why this subject can't be evaluated, in a few words, or None."""
        return None

    def evaluate(self, subject: Subject) -> Result:
        """Evaluate. Hyper-parameters are chosen on "val"; "test" is looked at once, by what was chosen."""
        raise NotImplementedError


def headline(probe: Probe, targets: Mapping[str, Targets]) -> str:
    """The metric that a probe's results are known by on these data."""
    several = any(found.multi_label for found in targets.values())
    return probe.several if several and probe.several else probe.metric


def label_problem(subject: Subject) -> str | None:
    """Why the labels can't be classified, or None."""
    for role, targets in subject.targets.items():
        if targets.labels is None:
            return f"the {role} split has no .cls"
        present = _present(targets.labels)
        if role == "train" and len(present) < 2:
            only = "".join(f" ({_class_name(subject, label)})" for label in present)
            return f"the train split has a single class{only}" if only else "no train image has a class"
        if not len(present):
            return f"no {role} image has a class"
    return None


def _present(labels: np.ndarray) -> list[int]:
    """The classes that occur."""
    return (np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(0))).tolist()


def _class_name(subject: Subject, label: int) -> str:
    return subject.classes[label] if subject.classes and label < len(subject.classes) else str(label)


def class_count(subject: Subject) -> int:
    """K: the named classes, or one more than the largest label of any split."""
    known = [t.labels for t in subject.targets.values() if t.labels is not None and len(t.labels)]
    largest = max(int(labels.max()) if labels.ndim == 1 else labels.shape[1] - 1 for labels in known)
    return max(len(subject.classes or ()), largest + 1)


def unseen(subject: Subject, *, role: str = "test") -> str | None:
    """Classes of a role's labels that the train split has no image of, in words; or None."""
    train, other = subject.targets["train"].labels, subject.targets[role].labels
    assert train is not None and other is not None
    absent = sorted(set(_present(other)) - set(_present(train)))
    if not absent:
        return None
    of_them = np.isin(other, absent) if other.ndim == 1 else other[:, absent].any(1)
    first = subject.targets[role].keys[int(of_them.argmax())]
    names = [_class_name(subject, label) for label in absent[:5]]
    return f"{', '.join(names)}{', ...' if len(absent) > 5 else ''} (first in {role} sample {first})"


def majority(labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class: what "chance" means in the report."""
    return float(np.bincount(labels).max() / len(labels))
