"""What every objective beside the frozen teachers promises, and what it can look at."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Callable, Collection, Iterator, Mapping, TypeVar, cast

import torch
from torch import Tensor, nn

from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

log = logging.getLogger("agglom.fit")

When = int | float
Own = TypeVar("Own", bound="Objective")


@dataclass
class Scene:
    """A training step as an objective sees it.

    Attributes:
        batch: as the data module made it, images in [0, 1].
        features: gives the student's, of the view that it shares with the frozen teachers; with gradient. They are
            computed once a step, and only if somebody asks.
        student: the student, for further views.
        average: an EMA copy of all that is trained, such as `average["student"]`. No gradient.
        frame: name -> (view (B, 3, r, r), shift (B, 2) in cells of the student's grid or None): a view of the same
            images in a frame of its own, see `agglom.shifts`.
        snapshot: (name, every) -> a copy of the averaged student, taken at the objective's first step and again every
            so many steps (None: never).
        own: the averaged copy of the objective itself, for its heads.
        step: optimiser steps before this one.
        since: steps since the objective's first.
        key: step, micro-batch and rank, for draws that follow from them.
    """

    batch: dict[str, Any]
    features: Callable[[], StudentFeatures]
    student: nn.Module
    average: nn.ModuleDict
    frame: Callable[[str], tuple[Tensor, Tensor | None]]
    snapshot: Callable[[str, int | None], nn.Module]
    own: nn.Module
    step: int
    since: int
    key: tuple[object, ...]


class Objective(nn.Module):
    """A term of the total loss beside the frozen teachers: a loss an image, from the student and its average.

    Built as `SomeObjective(student, **options)`. A subclass implements `forward`. Heads that it has are trained and
    averaged with the student. While its weight is 0 (before `start`, from `stop` on) it isn't called at all.

    Args:
        student: widths of the student.
        weight: of the mean over images in the total.
        start: first optimiser step, as a number of steps or as a fraction of the run (a float below 1).
        ramp: steps over which the weight grows in a line from 0 to `weight`; the first of them has weight / ramp.
        stop: the step from which it no longer runs; left out: to the end.
        copy_average: at its first step the average becomes a copy of the student (SigLIP 2).

    Attributes:
        needs: what it can't do without: "crops" (`data.crops`), "patches" (a ViT), "captions" (`txt` in `data.fields`).
        partial: whether it reads the student only in part, so that some of it may have no gradient.
        anchors: whether it teaches something from outside (a frozen encoder, captions) that the average must follow.

    Raises:
        UserError: a negative weight or ramp, a start or stop out of order.
    """

    needs: set[str] = set()
    partial = False
    anchors = False

    def __init__(
        self,
        student: Dims,
        *,
        weight: float = 1.0,
        start: When = 0,
        ramp: int = 0,
        stop: When | None = None,
        copy_average: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("start", start), ("ramp", ramp), ("stop", stop)):
            if value is not None and value < 0:
                raise UserError(f"{name}: {value}; valid: >= 0; change it")
        if stop is not None and type(stop) is type(start) and stop <= start:
            raise UserError(f"stop: {stop}; valid: after start {start}; change one")
        self.weight, self.start, self.ramp, self.stop = weight, start, ramp, stop
        self.copy_average = copy_average

    def shared(self) -> list[nn.Module]:
        """Modules that never change, so that an average of the objective needs no second ones: frozen encoders."""
        return []

    def __deepcopy__(self: Own, memo: dict[int, Any]) -> Own:
        """All but what is shared."""
        memo.update({id(module): module for module in self.shared()})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def weight_at(self, step: int, total: int) -> float:
        """Its weight at an optimiser step of a run of `total` steps."""
        first = steps(self.start, total)
        if step < first or (self.stop is not None and step >= steps(self.stop, total)):
            return 0.0
        return self.weight * (min(1.0, (step - first + 1) / self.ramp) if self.ramp else 1.0)

    def forward(self, scene: Scene) -> Tensor:
        """The loss of each image, (B,) float32."""
        raise NotImplementedError

    def diagnosis(self) -> dict[str, Tensor]:
        """Scalars of the last step for the log, without gradient."""
        return {}

    def alarms(self, values: dict[str, float], since: int) -> list[str]:
        """What is wrong with the numbers of `diagnosis`, `since` steps after its first, a line each."""
        return []


def objective_metrics(
    objectives: nn.ModuleDict, ran: Mapping[str, tuple[float, Tensor]], *, step: int, total: int
) -> dict[str, Tensor]:
    """What is logged of the objectives of a step; their alarms go to the log.

    Args:
        objectives: name -> objective.
        ran: name -> (weight, per-image loss) of those that took part.
        step: optimiser steps before.
        total: optimiser steps of the run.
    """
    metrics: dict[str, Tensor] = {}
    for name, (weight, value) in ran.items():
        objective = cast(Objective, objectives[name])
        metrics |= {f"train/{name}/loss": value.detach().mean(), f"train/{name}/weight": torch.tensor(weight)}
        found = objective.diagnosis()
        metrics |= {f"train/{name}/{key}": number for key, number in found.items()}
        numbers = {key: float(number) for key, number in found.items()}
        for line in objective.alarms(numbers, step - steps(objective.start, total)):
            log.warning("step %d: model.objectives.%s: %s", step, name, line)
    return metrics


def conflicts(
    teachers: Collection[str],
    objectives: Collection[str],
    *,
    anchored: bool,
    ema_decay: float | None,
    ema_schedule: str,
    anneal_anyway: bool,
) -> Iterator[str]:
    """What speaks against these objectives beside these teachers with this average, a line each with full keys.

    `anchored`: one of the objectives teaches from outside (`Objective.anchors`), as all teachers do.
    """
    if not objectives:
        return
    if ema_decay is None:
        yield "model.ema_decay: null, but model.objectives need an average; valid: 0 <= decay < 1; set it"
    if (teachers or anchored) and ema_schedule == "cosine" and not anneal_anyway:
        yield (
            "model.ema_schedule: cosine, but objectives learn from the average beside frozen teachers or captions, and "
            "near 1 it no longer follows what these teach; valid: fixed, or model.ema_anneal_anyway: true"
        )
    for name in objectives:
        if name in teachers:
            yield f"model.objectives.{name}: also the name of a teacher; valid: another name; rename one"


def steps(when: When, total: int) -> int:
    """A number of steps, or a fraction of `total`."""
    return round(when * total) if isinstance(when, float) and when <= 1 else int(when)


def layer_norm(spatial: Tensor) -> Tensor:
    """(B, C, H, W) -> the same, each token with mean 0 and variance 1 over its channels; float32, no affine part."""
    last = spatial.float().movedim(1, -1)
    return torch.nn.functional.layer_norm(last, last.shape[-1:]).movedim(-1, 1)
