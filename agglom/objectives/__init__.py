"""Per-image losses: (prediction, target) -> (B,). One family a file."""

from agglom.objectives.base import Loss
from agglom.objectives.pointwise import MSE, Cosine, CosineSmoothL1, DampenedMSE, FlattenedCosineSmoothL1, SmoothL1

__all__ = ["MSE", "Cosine", "CosineSmoothL1", "DampenedMSE", "FlattenedCosineSmoothL1", "Loss", "SmoothL1"]
