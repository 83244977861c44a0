"""Heads that turn frozen feature maps into classes of pixels, and pictures larger than a model's input."""

from __future__ import annotations

from typing import Callable, Iterator, Literal, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.features import Backbone, ask, sides

HeadKind = Literal["linear", "fpn"]
HEADS: tuple[HeadKind, ...] = ("linear", "fpn")


class Segmenter(nn.Module):
    """A trained head over a model that is asked without gradient and is no part of the module.

    Attributes:
        crop: pixels of a side of the square that it is shown.
        stride: of which the sides of any other image have to be multiples.
    """

    crop: int
    stride: int

    def frozen(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> the model's maps (B, C_i, H_i, W_i), the same for all heads of its kind."""
        raise NotImplementedError

    def logits(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> (B, K, h, w) on a grid of the head's own."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps -> logits (B, K, *size)."""
        return F.interpolate(self.logits(maps), size, mode="bilinear", align_corners=False)


class LinearSegmenter(Segmenter):
    """Batch norm and a 1x1 convolution on the model's own map: the usual linear probe (DINOv2, section 7.4).

    Args:
        model: any with a feature map.
        classes: K.
        side: pixels of a side of the crop for models that take any size; others keep their own.
        device: where the model is.
    """

    def __init__(self, model: Backbone, classes: int, side: int, device: torch.device) -> None:
        super().__init__()
        self.model: Callable[[Tensor], list[Tensor]]
        self.__dict__["model"] = model
        spec = model.input
        self.stride = spec.stride if spec.size is None else 1  # which it resizes to its own
        self.crop = max(spec.size) if spec.size is not None else -(-side // spec.stride) * spec.stride
        (spatial,) = self.frozen(torch.zeros(1, 3, self.crop, self.crop, device=device))
        self.norm = nn.BatchNorm2d(spatial.shape[1])
        self.classify = nn.Conv2d(spatial.shape[1], classes, 1)
        self.to(device)

    def frozen(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            spatial = ask(self.model, images).features.spatial  # type: ignore[arg-type]
        assert spatial is not None
        return [spatial.float()]

    def logits(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.norm(maps[0]))


class FpnSegmenter(Segmenter):
    """A small semantic FPN (Kirillov et al. 2019, section 3.2): the levels of a pyramid, each through a convolution,
    brought to the finest grid and summed, then a 1x1 convolution.

    Args:
        model, classes, side, device: see `LinearSegmenter`.
        channels: of the pyramid and of the sum.
    """

    def __init__(self, model: Backbone, classes: int, side: int, device: torch.device, channels: int = 64) -> None:
        from agglom.detection import DetectionBackbone

        super().__init__()
        self.backbone = DetectionBackbone(model, channels=channels, pool=0)
        self.crop = max(self.backbone.canvas(side))
        self.stride = self.backbone.stride
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in self.backbone.strides
        )
        self.classify = nn.Conv2d(channels, classes, 1)
        self.to(device)

    def frozen(self, images: Tensor) -> list[Tensor]:
        return self.backbone.maps(images)

    def logits(self, maps: Sequence[Tensor]) -> Tensor:
        scaled = [scale(x) for scale, x in zip(self.backbone.scale, maps, strict=True)]
        levels = [branch(x) for branch, x in zip(self.branches, self.backbone.pyramid(scaled), strict=True)]
        finest = sides(levels[0])
        total = levels[0]
        for level in levels[1:]:
            total = total + F.interpolate(level, finest, mode="bilinear", align_corners=False)
        return self.classify(total)


def segmenter(kind: HeadKind, model: Backbone, classes: int, side: int, device: torch.device) -> Segmenter:
    """A head with weights drawn from torch's generator."""
    return (LinearSegmenter if kind == "linear" else FpnSegmenter)(model, classes, side, device)


def windows(size: tuple[int, int], crop: int, stride: int) -> list[tuple[int, int]]:
    """Upper left corners of windows that cover an image, as mmsegmentation's slide inference places them.

    Args:
        size: (height, width) of the image, neither less than `crop`.
        crop: pixels of a side of a window.
        stride: pixels from one to the next; the last of a row or column ends where the image does.
    """
    rows, columns = ([*range(0, side - crop, stride), side - crop] for side in size)
    return [(y, x) for y in rows for x in columns]


def merge(parts: Iterator[tuple[tuple[int, int], Tensor]], size: tuple[int, int]) -> Tensor:
    """Windows' logits (B, K, c, c) at their corners -> (B, K, *size), the mean where they overlap."""
    total: Tensor | None = None
    for (y, x), logits in parts:
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *size)
            count = logits.new_zeros(size)
        height, width = sides(logits)
        total[..., y : y + height, x : x + width] += logits
        count[y : y + height, x : x + width] += 1
    assert total is not None
    return total / count
