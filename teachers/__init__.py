"""Frozen encoders that a student learns from."""

if __name__ == "teachers":
    raise ImportError("import agglom.teachers, not teachers: this folder is part of the agglom package")
