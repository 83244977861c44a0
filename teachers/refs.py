"""Teachers by a short reference, as the commands take them."""

from __future__ import annotations

from typing import Any

from agglom.errors import UserError
from agglom.teachers.base import Teacher

FORMS = "timm:NAME, open_clip:NAME/TAG, sam:NAME, tiny:NAME, torch:package.module:factory"


def from_ref(ref: str, **options: Any) -> Teacher:
    """Build a teacher from its reference.

    Args:
        ref: "timm:NAME" (NAME may be hf-hub:... or local-dir:...), "open_clip:NAME/TAG", "sam:NAME", "tiny:clip",
            "torch:package.module:factory" or "torch:FILE".
        options: more arguments for the teacher's class.

    Raises:
        UserError: no such kind, or what the class raises.
    """
    kind, _, name = ref.partition(":")
    if not name or kind not in ("timm", "open_clip", "sam", "tiny", "torch"):
        raise UserError(f"model {ref!r} is no reference; valid: {FORMS}")
    if kind == "timm":
        from agglom.teachers.timm import TimmTeacher

        return TimmTeacher(name=name, **options)
    if kind == "sam":
        from agglom.teachers.sam import SamTeacher

        return SamTeacher(name=name, **options)
    if kind == "torch":
        from agglom.teachers.torch_module import TorchTeacher

        return TorchTeacher(module=name, **options)
    if kind == "tiny":
        from agglom.teachers.tiny import TinyTeacher

        return TinyTeacher(name=name, **options)  # type: ignore[arg-type]  # it refuses other names itself
    from agglom.teachers.open_clip import OpenClipTeacher

    if ":" not in name and "/" in name:  # hf-hub:ORG/NAME and local-dir:PATH carry their weights
        name, _, tag = name.rpartition("/")
        options = {"tag": tag, **options}
    return OpenClipTeacher(name=name, **options)
