"""Gram anchoring (DINOv3): how an image's tokens resemble each other stays as an earlier student had it."""

from __future__ import annotations

import torch
from torch import Tensor

from agglom.errors import UserError
from agglom.features import Dims, align, resize, sides
from agglom.objectives.relation import gram
from agglom.selfdistill.base import Objective, Scene, When


class GramAnchor(Objective):
    """Gram matrix of the student's tokens against that of an anchor: a snapshot of its average.

    Source: DINOv3, 2508.10104, section 4.

    Args:
        student: widths of the student.
        weight: of the mean over images in the total.
        start: first optimiser step, or a fraction of the run; the anchor is the average of that moment.
        ramp: steps over which the weight grows.
        stop: the step from which it no longer runs.
        copy_average: see Objective.
        refresh_every: steps after which the anchor is taken anew; null: never.
        scale: the anchor sees the images so many times larger and its map is brought down to the student's grid:
            smoother, sharper tokens. Needs a student of any size.
        clip_negative: negative cosines count as 0 on both sides.

    Raises:
        UserError: see Objective; `refresh_every` or `scale` below 1.
    """

    def __init__(
        self,
        student: Dims,
        *,
        weight: float = 1.0,
        start: When = 0,
        ramp: int = 0,
        stop: When | None = None,
        copy_average: bool = False,
        refresh_every: int | None = 10_000,
        scale: int = 1,
        clip_negative: bool = False,
    ) -> None:
        super().__init__(student, weight=weight, start=start, ramp=ramp, stop=stop, copy_average=copy_average)
        for name, value in (("refresh_every", refresh_every), ("scale", scale)):
            if value is not None and value < 1:
                raise UserError(f"{name}: {value}; valid: at least 1; change it")
        self.refresh_every, self.scale, self.clip_negative = refresh_every, scale, clip_negative

    def forward(self, scene: Scene) -> Tensor:
        view, _ = scene.frame("")  # the student's own
        size = (view.shape[-2] * self.scale, view.shape[-1] * self.scale)
        with torch.no_grad():
            anchor = scene.snapshot("gram_anchor", self.refresh_every)
            target = anchor(resize(view, size, "bicubic")).spatial.float()
        ours = scene.features().spatial
        return gram(ours, align(target, sides(ours)), clip_negative=self.clip_negative)
