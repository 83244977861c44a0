"""What is asked of the labels: the one class of an image (accuracy), or all of its classes (mean average precision)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

import numpy as np
import torch
from torch import Tensor

from agglom.probes.base import Subject, class_count, majority, unseen
from agglom.probes.ranking import map_resamples, mean_average_precision
from agglom.probes.statistics import accuracy_resamples


@dataclass(frozen=True)
class Task:
    """Labels of all roles, and how answers to them are judged.

    Attributes:
        labels: role -> (N,) int64 or (N, K) bool, the same for all roles.
        classes: K.
        multi: whether an image may have several classes.
        notes: what to say of the labels beside any number.
    """

    labels: Mapping[str, np.ndarray]
    classes: int
    multi: bool
    notes: dict[str, Any]

    @classmethod
    def of(cls, subject: Subject) -> Task:
        """Of a subject whose labels have no `label_problem`."""
        classes, multi = class_count(subject), any(targets.multi_label for targets in subject.targets.values())
        labels = {role: targets.labels for role, targets in subject.targets.items() if targets.labels is not None}
        if multi:
            labels = {role: _wide(found, classes) for role, found in labels.items()}
        absent = unseen(subject)
        notes = {} if absent is None else {"warning": f"no train image of {absent}; such test images count as wrong"}
        return cls(labels, classes, multi, notes)

    @property
    def metric(self) -> str:
        """ "top1" or "map"."""
        return "map" if self.multi else "top1"

    @property
    def chance(self) -> float:
        """What answers that know nothing reach on test: of the most frequent class, or ranked at random."""
        truth = self.labels["test"]
        return float(truth.mean(0)[truth.any(0)].mean()) if self.multi else majority(truth)

    def target(self, role: str) -> Tensor:
        """The labels as a tensor."""
        return torch.from_numpy(np.array(self.labels[role]))

    def answer(self, logits: Tensor) -> Tensor:
        """Logits (..., n, K) -> what is kept of them: the largest's class (..., n), or all."""
        return logits if self.multi else logits.argmax(-1)

    def score(self, answers: Tensor, role: str) -> float:
        """Answers to all images of a role -> the metric."""
        found, truth = answers.cpu().numpy(), self.labels[role]
        return mean_average_precision(found, truth) if self.multi else float((found == truth).mean())

    def judge(self, answers: Tensor, seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Answers to all test images -> metrics, and resamples of the headline one."""
        found, truth = answers.cpu().numpy(), self.labels["test"]
        if self.multi:
            return {"map": self.score(answers, "test")}, {"map": map_resamples(found, truth, seed)}
        correct = found == truth
        recalls = [correct[truth == label].mean() for label in np.unique(truth)]
        metrics = {"top1": float(correct.mean()), "macro": float(np.mean(recalls))}
        return metrics, {"top1": accuracy_resamples(correct, seed)}


def _wide(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N,) int or (N, k) bool -> (N, classes) bool."""
    out = np.zeros((len(labels), classes), bool)
    if labels.ndim == 1:
        out[np.arange(len(labels)), labels] = True
    else:
        out[:, : labels.shape[1]] = labels
    return out
