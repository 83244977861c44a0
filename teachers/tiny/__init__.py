"""The tiny zoo: three small ViTs trained on the fashion scenes with three different objectives."""

if __name__ == "tiny":
    raise ImportError("import agglom.teachers.tiny, not tiny: this folder is part of the agglom package")

from agglom.teachers.tiny.teacher import NAMES, TinyTeacher

__all__ = ["NAMES", "TinyTeacher"]
