"""What becomes of a teacher's output before a loss sees it: normalisers."""

from agglom.targets.base import Identity, Normalizer
from agglom.targets.covariance import PHIS, Whiten
from agglom.targets.memory import Memory
from agglom.targets.standardize import Standardize

__all__ = ["PHIS", "Identity", "Memory", "Normalizer", "Standardize", "Whiten"]
