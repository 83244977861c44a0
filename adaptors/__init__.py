"""From the student's space into a teacher's."""

if __name__ == "adaptors":
    raise ImportError("import agglom.adaptors, not adaptors: this folder is part of the agglom package")

from agglom.adaptors.base import Adaptor, fold
from agglom.adaptors.mlp import MLPAdaptor

__all__ = ["Adaptor", "MLPAdaptor", "fold"]
