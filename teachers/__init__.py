"""Frozen encoders that a student learns from."""

if __name__ == "teachers":
    raise ImportError("import agglom.teachers, not teachers: this folder is part of the agglom package")

# Names load on first use: nobody who asks for a tiny teacher waits for timm and open_clip.
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agglom.teachers.base import Teacher as Teacher
    from agglom.teachers.base import on_meta as on_meta
    from agglom.teachers.cached import CachedTeacher as CachedTeacher
    from agglom.teachers.open_clip import OpenClipTeacher as OpenClipTeacher
    from agglom.teachers.provenance import compare as compare
    from agglom.teachers.provenance import fingerprint as fingerprint
    from agglom.teachers.provenance import manifest as manifest
    from agglom.teachers.refs import from_ref as from_ref
    from agglom.teachers.sam import SamTeacher as SamTeacher
    from agglom.teachers.timm import TimmTeacher as TimmTeacher
    from agglom.teachers.tiny import TinyTeacher as TinyTeacher
    from agglom.teachers.torch_module import TorchTeacher as TorchTeacher

_HOMES = {
    "Teacher": "base",
    "TimmTeacher": "timm",
    "OpenClipTeacher": "open_clip",
    "SamTeacher": "sam",
    "TorchTeacher": "torch_module",
    "TinyTeacher": "tiny",
    "CachedTeacher": "cached",
    "from_ref": "refs",
    "fingerprint": "provenance",
    "manifest": "provenance",
    "compare": "provenance",
    "on_meta": "base",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
