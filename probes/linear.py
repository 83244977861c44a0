"""Linear classification of frozen features: logistic regression, everything chosen on val.

Memory. Beside the features, which stay on disk (mapped), there is one standardised copy of the train rows of one
choice of features, 4 N D bytes (D is the sum of both widths for "both"), the covariance of D^2 and temporaries that do
not grow with N. A training set that is too large for that copy is a case for `linear_sgd`, which makes none.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject, label_problem
from agglom.probes.solver import Head, Standardise, chunks, fit_logistic
from agglom.probes.task import Task


class LinearProbe(Probe):
    """Top-1 of logistic regression on standardised features, fitted on train.

    Where images have several classes: a regression of each class against the rest, mean average precision.

    Args:
        l2: candidate strengths of L2; the objective is mean cross-entropy + l2 / 2 ||W||^2.
        features: candidates among "summary", "mean" (mean patch) and "both"; those that a model lacks are left out.
    """

    name, metric, several, fields, sees = "linear", "top1", "map", ("cls",), "both"

    def __init__(
        self,
        *,
        l2: Sequence[float] = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001),
        features: Sequence[str] = ("summary", "mean", "both"),
    ) -> None:
        self.l2, self.features = tuple(l2), tuple(features)

    def missing(self, subject: Subject) -> str | None:
        return label_problem(subject)

    def evaluate(self, subject: Subject) -> Result:
        """The metric (and mean per-class recall) on test, with the features and L2 that were best on val."""
        task = Task.of(subject)
        usable = [which for which in self.features if which in subject.features["train"].choices]
        on_val: dict[str, dict[str, float]] = {}
        best: tuple[float, Any] | None = None
        for which in usable:
            scale, heads = self._fit(subject, which, task)
            val = subject.features["val"].vectors(which)
            for strength, head in zip(self.l2, heads, strict=True):
                found = task.score(_answers(task, head, scale, val), "val")
                on_val.setdefault(which, {})[f"{strength:g}"] = found
                if best is None or found > best[0]:  # a tie keeps the earlier: the stronger, the simpler
                    best = found, (which, strength, scale, head)
        assert best is not None
        which, strength, scale, head = best[1]
        answers = _answers(task, head, scale, subject.features["test"].vectors(which))
        metrics, resamples = task.judge(answers, subject.seed)
        return Result(
            metrics=metrics,
            protocol={
                "features": which,
                "chosen": {"features": which, "l2": strength},
                "grid": {"features": usable, "l2": list(self.l2)},
                f"val_{task.metric}": on_val,
                "at_edge": strength in (min(self.l2), max(self.l2)),
                "solver": "L-BFGS to the optimum, features standardised by the train split",
                "chance": task.chance,
                **task.notes,
            },
            resamples=resamples,
        )

    def _fit(self, subject: Subject, which: str, task: Task) -> tuple[Standardise, list[Head]]:
        train = subject.features["train"].vectors(which, copy=True)  # the only copy; fitting overwrites it
        scale = Standardise.of(train)
        y = task.target("train")
        return scale, fit_logistic(scale.into(train), y, classes=task.classes, l2=self.l2, overwrite=True)


def _answers(task: Task, head: Head, scale: Standardise, x: Tensor) -> Tensor:
    """(N, D) -> answers to all rows."""
    width = 2 * x.shape[1] + 2 * len(head.bias)
    return torch.cat([task.answer(head(scale(x[rows]))) for rows in chunks(len(x), width)])
