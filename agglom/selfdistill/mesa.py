"""Consistency with the averaged student under shifts (MESA, as in C-RADIOv4)."""

from __future__ import annotations

import torch
from torch import Tensor

from agglom.features import sides
from agglom.heads import meet
from agglom.objectives.pointwise import mse
from agglom.selfdistill.base import Objective, Scene, layer_norm


class Mesa(Objective):
    """Squared distance between the student's tokens and those of its average, each layer-normed.

    The average sees its own shifted crop of the same images (`model.shift`), and only the overlap counts; without
    shifts it sees the student's view. Its tokens carry no gradient. The distance is a mean over channels, where the
    paper has the squared norm: its weight is not published.

    Source: C-RADIOv4, 2601.17237, section 2.4.
    """

    def forward(self, scene: Scene) -> Tensor:
        view, shift = scene.frame("mesa")
        with torch.no_grad():
            target = scene.average["student"](view).spatial
        ours = scene.features().spatial
        prediction, target, mask = meet(layer_norm(ours), layer_norm(target), "teacher", shift, sides(ours))
        return mse(prediction, target, mask)
