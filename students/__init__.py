"""Backbones being trained."""

if __name__ == "students":
    raise ImportError("import agglom.students, not students: this folder is part of the agglom package")

from agglom.students.base import Student
from agglom.students.folding import fold_weights
from agglom.students.timm import TimmStudent, attend_plainly, masked_patches

__all__ = ["Student", "TimmStudent", "attend_plainly", "fold_weights", "masked_patches"]
