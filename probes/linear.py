"""Linear classification of frozen features: logistic regression, everything chosen on val."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import torch

from agglom.probes.base import Probe, Result, Subject, class_count, label_problem, majority
from agglom.probes.solver import Standardise, fit_softmax
from agglom.probes.statistics import accuracy_resamples


class LinearProbe(Probe):
    """Top-1 of logistic regression on standardised features, fitted on train.

    Args:
        l2: candidate strengths of L2; the objective is mean cross-entropy + l2 / 2 ||W||^2.
        features: candidates among "summary", "mean" (mean patch) and "both"; those that a model lacks are left out.
    """

    name, metric, fields, sees = "linear", "top1", ("cls",), "both"

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
        """Top-1 and mean per-class recall on test, with the features and L2 that were best on val."""
        labels = {role: torch.from_numpy(np.array(subject.targets[role].labels)) for role in ("train", "val", "test")}
        usable = [which for which in self.features if which in subject.features["train"].choices]
        on_val: dict[str, dict[str, float]] = {}
        best: tuple[float, Any] | None = None
        for which in usable:
            train = subject.features["train"].vectors(which)
            scale = Standardise.of(train)
            heads = fit_softmax(scale(train), labels["train"], classes=class_count(subject), l2=self.l2)
            val = scale(subject.features["val"].vectors(which))
            for strength, head in zip(self.l2, heads, strict=True):
                accuracy = (head(val).argmax(1) == labels["val"]).float().mean().item()
                on_val.setdefault(which, {})[f"{strength:g}"] = accuracy
                if best is None or accuracy > best[0]:  # a tie keeps the earlier: the stronger, the simpler
                    best = accuracy, (which, strength, scale, head)
        assert best is not None
        which, strength, scale, head = best[1]
        predicted = head(scale(subject.features["test"].vectors(which))).argmax(1).numpy()
        truth = labels["test"].numpy()
        correct = predicted == truth
        return Result(
            metrics={
                "top1": float(correct.mean()),
                "macro": float(np.mean([correct[truth == label].mean() for label in np.unique(truth)])),
            },
            protocol={
                "features": which,
                "chosen": {"features": which, "l2": strength},
                "grid": {"features": usable, "l2": list(self.l2)},
                "val_top1": on_val,
                "at_edge": strength in (min(self.l2), max(self.l2)),
                "solver": "L-BFGS to the optimum, features standardised by the train split",
                "chance": majority(truth),
            },
            resamples={"top1": accuracy_resamples(correct, subject.seed)},
        )
