"""What becomes of a teacher's output before a loss sees it: normalisers."""

from agglom.targets.base import Identity, Normalizer
from agglom.targets.standardize import Standardize

__all__ = ["Identity", "Normalizer", "Standardize"]
