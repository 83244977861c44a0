"""Whether an export can take the images that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from agglom.errors import UserError
from agglom.features import sides
from agglom.students import TimmStudent


class BadImages(UserError, ValueError):
    """Images that the student can't take."""


def check_images(images: Tensor, student: TimmStudent) -> None:
    """Whether the student can take these images.

    Raises:
        BadImages: not (B, 3, H, W) floats, a size that is no multiple of the stride where it is free, a dtype that is
            not the weights', float16 on a CPU.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise BadImages(f"images of shape {tuple(images.shape)}; valid: (B, 3, H, W); a single one: images[None]")
    if not images.is_floating_point():
        raise BadImages(f"images are {_dtype(images)}; valid: floats in [0, 1]; divide by 255")
    (height, width), spec = sides(images), student.input
    if spec.size is None and (height % spec.stride or width % spec.stride):
        raise BadImages(
            f"images of {height} x {width} pixels; valid: multiples of {spec.stride}, the student's stride; resize them"
        )
    weights, kind = next(student.parameters()), images.device.type
    if kind == "cpu" and torch.float16 in (images.dtype, weights.dtype):
        raise BadImages("float16 on the CPU; valid: float32 or bfloat16 there; call .float(), or move to a GPU")
    available = torch.amp.is_autocast_available(kind)  # not on the meta device, which refuses the question
    if images.dtype != weights.dtype and not (available and torch.is_autocast_enabled(kind)):
        raise BadImages(
            f"images are {_dtype(images)} and the weights {_dtype(weights)}; make them one, or run under torch.autocast"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
