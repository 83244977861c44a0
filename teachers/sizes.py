"""Input sizes and resize modes as users and libraries state them -> what `InputSpec` allows."""

from __future__ import annotations

import warnings
from typing import Literal

from agglom.errors import UserError

Size = int | tuple[int, int] | Literal["any"] | None


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """int -> square; (height, width) stays."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def legal_size(asked: Size, default: int | tuple[int, int], stride: int, who: str) -> tuple[int, int]:
    """The (height, width) a network with this stride will see.

    Args:
        asked: what the user set, or None or "any" for the default.
        default: the model's own size. Where its stride doesn't divide it (a patch-14 ViT at 384 drops 6 pixels), the
            nearest multiple is taken, with a warning.
        stride: pixels a cell.
        who: "TimmTeacher vit_...", for the message.

    Raises:
        UserError: an asked-for size is not a positive multiple of the stride.
    """
    explicit = asked is not None and asked != "any"
    size = pair(asked if explicit else default)  # type: ignore[arg-type]
    near = tuple(max(stride, (side + stride // 2) // stride * stride) for side in size)
    if near == size:
        return size
    if explicit:
        raise UserError(f"{who}: input_size {size} is not a multiple of the stride {stride}; nearest: {near}")
    warnings.warn(f"{who}: its own size {size} is not a multiple of the stride {stride}; using {near}", stacklevel=3)
    return near  # type: ignore[return-value]


def legal_interpolation(name: str, who: str) -> str:
    """timm and open_clip also know "lanczos", "random" and others, which tensors can't be resized with."""
    if name in ("bilinear", "bicubic"):
        return name
    warnings.warn(f"{who}: interpolation {name!r} is not available on tensors; using 'bicubic'", stacklevel=3)
    return "bicubic"
