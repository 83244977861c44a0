"""Backbones being trained."""

if __name__ == "students":
    raise ImportError("import agglom.students, not students: this folder is part of the agglom package")
