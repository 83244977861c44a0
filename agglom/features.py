"""The words every room speaks: what a model takes in, what it gives back, and how two grids are made to meet.

Teachers, students, adaptors and probes meet through the types of this file and through nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Mapping, NamedTuple, Protocol, Sequence, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What a model says of a batch of B images.

    Attributes:
        summary: (B, D) one vector an image, or None where the model has no such notion (SAM).
        spatial: (B, C, H, W) a feature map, NCHW, or None.
    """

    summary: Tensor | None
    spatial: Tensor | None


class StudentFeatures(NamedTuple):
    """What a student says of a batch of B images, before any adaptor.

    Attributes:
        summary: (B, K, D) the K summary tokens (a CNN has K = 1: its pooled features).
        spatial: (B, C, H, W) the last feature map.
        taps: name of a block -> (summary (B, K, D), spatial (B, C, H, W)) of that block's output, for the
            blocks asked for.
    """

    summary: Tensor
    spatial: Tensor
    taps: Mapping[str, tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class InputSpec:
    """A model's input contract. Every model takes pixels in [0, 1] and does the rest itself.

    Attributes:
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        size: (height, width) in pixels that images are resized to, or None when any multiple of `stride` will do.
        stride: pixels a feature-map cell covers.
        interpolation: "bilinear" or "bicubic" (antialiased) for the resize.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size: tuple[int, int] | None = None
    stride: int = 16
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size is not None and (self.size[0] % self.stride or self.size[1] % self.stride):
            raise ValueError(f"input size {self.size} is not divisible by the stride {self.stride}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation {self.interpolation!r}; valid: 'bilinear', 'bicubic'")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the feature map for an image of `size` pixels."""
        height, width = self.size or size
        return height // self.stride, width // self.stride

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Dims:
    """Widths that an adaptor is built for.

    Attributes:
        summary: D of the summary, or None.
        spatial: C of the feature map, or None.
        tokens: K, how many summary tokens (students; 1 for teachers).
        depth: how many blocks can be tapped (students; 0 for teachers).
        taps: (summary width, spatial width) of each block that can be tapped, first to last (students).
    """

    summary: int | None
    spatial: int | None
    tokens: int = 1
    depth: int = 0
    taps: tuple[tuple[int, int], ...] = ()


@runtime_checkable
class TextTower(Protocol):
    """The language side of an image-text model: what zero-shot and retrieval need.

    A tower may also have `scale_and_bias`, two floats that make a cosine the model's own logit.
    """

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, D) L2-normalised text embeddings in the space of the same model's image summary."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """What a probe can look at: any teacher, student or export."""

    @property
    def input(self) -> InputSpec:
        """The input contract."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """images (B, 3, H, W) in [0, 1] -> Features; resizes and normalises itself."""
        ...


class Answer(NamedTuple):
    """Everything that one forward pass of a model can say.

    Attributes:
        features: what the model itself answers.
        blocks: features of its last blocks (a ViT's, under its final norm) or stages (a CNN's, each on a grid of its
            own), first to last; empty where none were asked for or the model can't tell.
        adaptors: teacher -> the model through its adaptor for that teacher.
    """

    features: Features
    blocks: list[Features]
    adaptors: dict[str, Features]


def ask(model: Backbone, images: Tensor, *, blocks: int = 0, adaptors: Sequence[str] = ()) -> Answer:
    """One forward pass of any model; those with an `answer` method also tell of blocks, and share it with adaptors."""
    if hasattr(model, "answer"):
        return model.answer(images, blocks=blocks, adaptors=adaptors)
    through: Mapping[str, Any] = getattr(model, "adaptors", {})
    return Answer(model(images), [], {name: through[name](images) for name in adaptors})


def sides(x: Tensor) -> tuple[int, int]:
    """(height, width) of images or maps (B, C, H, W)."""
    return x.shape[-2], x.shape[-1]


def prepare(images: Tensor, spec: InputSpec) -> Tensor:
    """Pixels in [0, 1] -> what the model with this contract wants.

    Args:
        images: (B, 3, H, W) floats in [0, 1].
        spec: the contract. With `size` None the image keeps its size, which must be a multiple of the stride.

    Returns:
        (B, 3, h, w), same dtype, resized (antialiased) where the size differs, then normalised.

    Raises:
        ValueError: the size is free and not divisible by the stride.
    """
    size = sides(images)
    if spec.size is not None:
        images = resize(images, spec.size, spec.interpolation)
    elif size[0] % spec.stride or size[1] % spec.stride:
        raise ValueError(f"image size {size} is not divisible by the stride {spec.stride}")
    mean = torch.tensor(spec.mean, dtype=images.dtype).to(images.device, non_blocking=True)
    std = torch.tensor(spec.std, dtype=images.dtype).to(images.device, non_blocking=True)
    return (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Pixels in [0, 1], (B, 3, H, W) -> (B, 3, *size), antialiased; the same tensor where the size is right already."""
    if sides(images) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode=interpolation, antialias=True).clamp(0, 1)


def pooled(features: Features, cells: int) -> Features:
    """The same with `cells` x `cells` cells of the map averaged into one."""
    if cells == 1 or features.spatial is None:
        return features
    return Features(features.summary, F.avg_pool2d(features.spatial, cells))


def align(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a feature map (B, C, H, W) to another grid by bilinear interpolation (antialiased when it shrinks).

    A head runs at the student's own grid and only its output is aligned; the other order is not equivalent
    (AM-RADIO, section 3.3).
    """
    here = sides(spatial)
    if here == tuple(grid):
        return spatial
    shrinks = grid[0] < here[0] or grid[1] < here[1]
    if shrinks and spatial.device.type == "cpu" and spatial.element_size() < 4:  # torch has no such kernel
        return align(spatial.float(), grid).to(spatial.dtype)
    return F.interpolate(spatial, tuple(grid), mode="bilinear", antialias=shrinks, align_corners=False)
