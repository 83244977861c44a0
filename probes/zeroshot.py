"""Zero-shot classification: class names in prompt templates, through an image-text teacher's text tower."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.features import TextTower
from agglom.probes.base import Probe, Result, Subject, majority
from agglom.probes.statistics import accuracy_resamples
from agglom.probes.templates import read_templates
from agglom.probes.towers import embed, readable, unreadable


class ZeroShotProbe(Probe):
    """Top-1 and top-5 of the class whose averaged prompt embedding is nearest by cosine.

    Whose summary a text tower reads: `towers.readable`. The first tower gives `top1` and `top5`, further ones
    `top1@NAME`.

    Args:
        templates: "simple", "full", a file with one a line, or a list; each with one `{}` for the class name.
    """

    name, metric, fields = "zeroshot", "top1", ("cls",)

    def __init__(self, *, templates: str | Sequence[str] = "simple") -> None:
        self.templates = read_templates(templates)
        self._classifiers: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def missing(self, subject: Subject) -> str | None:
        if subject.targets["test"].labels is None:
            return "the test split has no .cls"
        if subject.targets["test"].multi_label:
            return "the .cls are lists, and zero-shot classification wants one class an image"
        if not subject.classes:
            return "the data's index names no classes"
        return unreadable(subject)

    def evaluate(self, subject: Subject) -> Result:
        """One accuracy a text tower; nothing is trained or chosen."""
        assert subject.classes is not None
        labels = torch.from_numpy(np.array(subject.targets["test"].labels))
        metrics: dict[str, float] = {}
        resamples: dict[str, np.ndarray] = {}
        sides = readable(subject)
        examples = None
        for tower, (features, _) in sides.items():
            classifier = self._classifier(subject.text[tower], subject.classes)
            scores = F.normalize(features.vectors("summary"), dim=1) @ classifier.T  # (N, K)
            suffix = "" if examples is None else f"@{tower}"
            for top in (1, 5):
                if top < len(subject.classes):
                    correct = (scores.topk(top, dim=1).indices == labels[:, None]).any(1).numpy()
                    metrics[f"top{top}{suffix}"] = float(correct.mean())
                    resamples[f"top{top}{suffix}"] = accuracy_resamples(correct, subject.seed)
            if examples is None:
                examples = [_best(scores[row], subject.classes) for row in subject.show]
        return Result(
            metrics=metrics,
            protocol={
                "features": {tower: side for tower, (_, side) in sides.items()},
                "templates": list(self.templates),
                "prompts": "mean of normalised embeddings over the templates, normalised again",
                "chance": majority(labels.numpy()),
            },
            resamples=resamples,
            show={"zeroshot": examples},
        )

    def _classifier(self, tower: TextTower, classes: tuple[str, ...]) -> Tensor:
        key = (id(tower), classes)
        if key not in self._classifiers:
            self._classifiers[key] = classifier(tower, classes, self.templates)
        return self._classifiers[key]


@torch.inference_mode()
def classifier(tower: TextTower, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(K, D) normalised: for each class, the mean over templates of its normalised prompt embeddings."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    embedded = embed(tower, prompts).view(len(classes), len(templates), -1)
    return F.normalize(embedded.mean(1), dim=1).clone()


def _best(scores: Tensor, classes: Sequence[str], top: int = 3) -> list[tuple[str, float]]:
    found = scores.topk(min(top, len(classes)))
    return [(classes[i], round(s, 4)) for s, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]
