"""All that belongs to one teacher during training: adaptor, normalisers, losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from agglom.adaptors import Adaptor
from agglom.features import Dims, Features, StudentFeatures
from agglom.objectives import Loss
from agglom.targets import Normalizer
from agglom.teachers import Teacher

AdaptorFactory = Callable[[Dims, Dims, int, Sequence[str]], Adaptor]
NormalizerFactory = Callable[[int], Normalizer]
LossFactory = Callable[[], Loss]


@dataclass
class TeacherConfig:
    """One entry of `teachers`. What is left out falls back to the value of the same name beside `teachers`.

    Attributes:
        encoder: the frozen encoder.
        summary_weight: weight of its summary loss; left out: 1 where the encoder has a summary, else 0.
        spatial_weight: weight of its spatial loss; left out: 1 where the encoder has a feature map, else 0.
        adaptor: class of the adaptor and its options.
        normalizer: class of the normaliser of its targets and its options.
        summary_loss: class of the summary loss and its options.
        spatial_loss: class of the spatial loss and its options.
    """

    encoder: Teacher
    summary_weight: float | None = None
    spatial_weight: float | None = None
    adaptor: AdaptorFactory | None = None
    normalizer: NormalizerFactory | None = None
    summary_loss: LossFactory | None = None
    spatial_loss: LossFactory | None = None


class Head(nn.Module):
    """The trained and the estimated parts of one teacher: everything but its frozen encoder.

    Attributes:
        weights: weight of the "summary" and of the "spatial" loss; a part of weight 0 is not built.
    """

    def __init__(
        self,
        *,
        student: Dims,
        teacher: Dims,
        token: int,
        tap_names: Sequence[str],
        weights: dict[str, float],
        adaptor: AdaptorFactory,
        normalizer: NormalizerFactory,
        losses: dict[str, LossFactory],
    ) -> None:
        super().__init__()
        widths = {kind: getattr(teacher, kind) for kind, weight in weights.items() if weight > 0}
        self.weights = {kind: weights[kind] for kind in widths}
        used = Dims(widths.get("summary"), widths.get("spatial"))
        self.adaptor = adaptor(student, used, token, tap_names)
        self.normalizers = nn.ModuleDict({kind: normalizer(width) for kind, width in widths.items()})
        self.losses = nn.ModuleDict({kind: losses[kind]() for kind in widths})

    @torch.no_grad()
    def targets(self, features: Features) -> Features:
        """The teacher's features (B, D), (B, C, H, W) -> normalised, fp32; the statistics learn in training.

        A step's targets are normalised with the statistics from before that step.
        """
        out: dict[str, Tensor | None] = {"summary": None, "spatial": None}
        for kind, normalizer in self.normalizers.items():
            value = getattr(features, kind)
            last = value.movedim(1, -1)  # (..., C)
            target = normalizer.normalize(last).movedim(-1, 1)
            if self.training:
                normalizer.update(last)
                self.losses[kind].update(target)
            out[kind] = target
        return Features(**out)

    def forward(self, student: StudentFeatures, target: Features) -> dict[str, Tensor]:
        """Unweighted losses, "summary" and "spatial" as far as they are trained: each (B,), fp32."""
        grid = None if target.spatial is None else tuple(target.spatial.shape[-2:])
        prediction = self.adaptor(student, grid)
        return {kind: loss(getattr(prediction, kind), getattr(target, kind)) for kind, loss in self.losses.items()}

    def combine(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum over kinds: (B,)."""
        return torch.stack([self.weights[kind] * loss for kind, loss in losses.items()]).sum(0)
