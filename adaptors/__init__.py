"""From the student's space into a teacher's."""

if __name__ == "adaptors":
    raise ImportError("import agglom.adaptors, not adaptors: this folder is part of the agglom package")

from agglom.adaptors.attention import AttentionAdaptor
from agglom.adaptors.base import Adaptor
from agglom.adaptors.conv import ConvAdaptor
from agglom.adaptors.ladder import LadderAdaptor
from agglom.adaptors.linear import LinearAdaptor
from agglom.adaptors.mlp import MLPAdaptor
from agglom.adaptors.orthogonal import OrthogonalAdaptor

__all__ = [
    "Adaptor",
    "AttentionAdaptor",
    "ConvAdaptor",
    "LadderAdaptor",
    "LinearAdaptor",
    "MLPAdaptor",
    "OrthogonalAdaptor",
]
