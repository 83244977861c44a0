"""Per-image losses: (prediction, target) -> (B,). One family a file."""

from agglom.objectives.angle import AngleBalanced
from agglom.objectives.base import Loss
from agglom.objectives.pointwise import MSE, Cosine, CosineSmoothL1, DampenedMSE, FlattenedCosineSmoothL1, SmoothL1
from agglom.objectives.prototypes import Center, PrototypeHead
from agglom.objectives.relation import ARKD, RKD, Gram

__all__ = [
    "ARKD",
    "MSE",
    "RKD",
    "AngleBalanced",
    "Center",
    "Cosine",
    "CosineSmoothL1",
    "DampenedMSE",
    "FlattenedCosineSmoothL1",
    "Gram",
    "Loss",
    "PrototypeHead",
    "SmoothL1",
]
