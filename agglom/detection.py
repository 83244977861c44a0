"""A frozen model as the backbone of torchvision's detectors: maps of several strides, one width.

Detectors want strides that are powers of two. A model whose cells cover 14 pixels is shown images shrunk by 14 / 16, so
that its map has stride 16; one that resizes whatever it is given to a fixed size answers with a map of the whole image,
which is brought to the grid that its stride stands for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork

from agglom.errors import UserError
from agglom.features import Backbone, align, ask, resize, sides

FINEST = 4  # pixels; a cell of the finest map of a pyramid made of one map
LEVELS = 4
ANCHORED = 5  # maps that torchvision's own anchors are for


class SimpleFeaturePyramid(nn.Module):
    """Maps of four strides out of one (ViTDet, Li et al. 2022, section 3).

    Twice and four times as fine by one and two transposed convolutions, twice and four times as coarse by max pooling;
    then a 1x1 and a 3x3 convolution, each with a LayerNorm over channels.

    Attributes:
        strides: pixels that a cell of each map covers, finest first: from 4 on, but at most four times as fine as the
            map it is made of.

    Args:
        width: channels of the map.
        stride: of the map, a power of two.
        channels: of what comes out.
    """

    def __init__(self, *, width: int, stride: int, channels: int) -> None:
        super().__init__()
        finest = max(FINEST, stride // 4)
        self.strides = [finest * 2**i for i in range(LEVELS)]
        self.levels = nn.ModuleList(_level(width, stride, wanted, channels) for wanted in self.strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One (B, width, H, W) -> four (B, channels, ceil(H * stride / s), ceil(W * stride / s))."""
        (spatial,) = maps
        return [level(spatial) for level in self.levels]


class TopDownPyramid(nn.Module):
    """A feature pyramid network over maps that have several strides already (Lin et al. 2017).

    Args:
        widths: channels of the maps, finest first.
        strides: of the maps.
        channels: of what comes out.
    """

    def __init__(self, *, widths: Sequence[int], strides: Sequence[int], channels: int) -> None:
        super().__init__()
        self.strides = list(strides)
        self.network = FeaturePyramidNetwork(list(widths), channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, widths[i], H_i, W_i) -> (B, channels, H_i, W_i), finest first."""
        return list(self.network(OrderedDict((str(i), x) for i, x in enumerate(maps))).values())


class DetectionBackbone(nn.Module):
    """Images -> maps, for `torchvision.models.detection`: FasterRCNN, FCOS, RetinaNet.

    A model whose last four stages have grids of their own (a CNN, Swin) gives those, under a top-down pyramid; any
    other its last map, under a `SimpleFeaturePyramid`. Of a frozen model only the pyramid is trained and saved: the
    model is asked without gradient, its mode and parameters are left alone and it is no part of the state dict, but it
    moves along with `to`. One that isn't frozen is a submodule like any other.

    It normalises images itself, so give the detector `image_mean=[0] * 3, image_std=[1] * 3`.

    Attributes:
        out_channels: of each map.
        strides: pixels that a cell of each map covers.

    Args:
        model: any teacher, student or export that has a feature map.
        channels: of each map.
        pool: so many more maps, each twice as coarse as the one before; None: as many as make five, which torchvision's
            own choice of anchors counts on.
        frozen: leave the model as it is; False trains it along, which no teacher allows.

    Raises:
        UserError: the model has no feature map.
    """

    model: Backbone
    strides: list[int]

    def __init__(self, model: Backbone, *, channels: int = 256, pool: int | None = None, frozen: bool = True) -> None:
        super().__init__()
        self.frozen_model = frozen
        if frozen:
            self.__dict__["model"] = model  # not a submodule: neither trained nor saved
        else:
            self.model = model
        self.out_channels = channels
        self.stride = 2 ** round(math.log2(model.input.stride))
        self.map_strides = [self.stride]  # of the model's own maps, until they are known
        with torch.no_grad():
            maps = self.maps(torch.zeros(1, 3, *self.canvas(16 * self.stride), device=_device(model)))
        self.map_strides = [round(self.stride * sides(maps[-1])[0] / sides(x)[0]) for x in maps]
        widths = [x.shape[1] for x in maps]
        # frozen maps come in any scale
        self.scale = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in widths)
        self.pyramid: Any = (
            SimpleFeaturePyramid(width=widths[0], stride=self.stride, channels=channels)
            if len(maps) == 1
            else TopDownPyramid(widths=widths, strides=self.map_strides, channels=channels)
        )
        self.strides = list(self.pyramid.strides)
        self.pool = max(0, ANCHORED - len(self.strides)) if pool is None else int(pool)
        self.strides += [2 ** (i + 1) * self.strides[-1] for i in range(self.pool)]
        self.to(_device(model))

    def canvas(self, side: int) -> tuple[int, int]:
        """(height, width) of the images that lose nothing on the way: the model's size, or this side rounded up."""
        size = self.model.input.size
        if size is None:
            side = -(-side // self.stride) * self.stride
            return side, side
        height, width = self.model.input.grid(size)
        return height * self.stride, width * self.stride

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> the model's own maps, finest first, (B, C_i, ceil(H / s_i), ceil(W / s_i)).

        Raises:
            ValueError: H or W is no multiple of the stride.
        """
        height, width = sides(images)
        if height % self.stride or width % self.stride:
            raise ValueError(f"image size {(height, width)} is not divisible by {self.stride}; pad it")
        spec = self.model.input
        if spec.size is None and spec.stride != self.stride:
            cells = height // self.stride, width // self.stride
            images = resize(images, (cells[0] * spec.stride, cells[1] * spec.stride), spec.interpolation)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_model):
            answer = ask(self.model, images, blocks=LEVELS)
        maps = {sides(x.spatial): x.spatial for x in answer.blocks if x.spatial is not None}
        if len(maps) < 2:
            if answer.features.spatial is None:
                raise UserError("detection: the model has no feature map; take one that has")
            maps = {sides(answer.features.spatial): answer.features.spatial}
        found = sorted(maps.values(), key=lambda x: -x.shape[-1])
        if spec.size is None or len(found) != len(self.map_strides):
            return [x.float() for x in found]
        return [
            align(x.float(), (-(-height // s), -(-width // s))) for x, s in zip(found, self.map_strides, strict=True)
        ]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) in [0, 1], H and W multiples of the coarsest stride or of `canvas` -> "0", "1", ... finest
        first, and "pool", "pool1", ...: (B, out_channels, ceil(H / stride), ceil(W / stride)) each."""
        maps = [scale(x) for scale, x in zip(self.scale, self.maps(images), strict=True)]
        levels = self.pyramid(maps)
        out = OrderedDict((str(i), x) for i, x in enumerate(levels))
        coarsest = levels[-1]
        for i in range(self.pool):
            out[f"pool{i or ''}"] = coarsest = nn.functional.max_pool2d(coarsest, 1, 2)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DetectionBackbone:
        if self.frozen_model and isinstance(self.model, nn.Module):
            self.model._apply(fn)
        return super()._apply(fn, recurse)


def detection_backbone(
    path: str | Path, *, channels: int = 256, pool: int | None = None, frozen: bool = True
) -> DetectionBackbone:
    """An export as the backbone of a torchvision detector.

    ```python
    from torchvision.models.detection import FasterRCNN

    backbone = agglom.detection_backbone("runs/demo/export")
    detector = FasterRCNN(backbone, num_classes=11, image_mean=[0] * 3, image_std=[1] * 3, min_size=64, max_size=64)
    ```

    Args:
        path: export folder, or a run directory that holds one.
        channels: of each map.
        pool: see `DetectionBackbone`.
        frozen: train the pyramid alone; False trains the student along (never its adaptors).

    Raises:
        UserError: no export there.
    """
    from agglom.export import load

    model = load(path)
    model.heads.requires_grad_(False)
    return DetectionBackbone(model, channels=channels, pool=pool, frozen=frozen)


class Anchors(AnchorGenerator):
    """Anchors in the middle of cells of known strides.

    torchvision's own divide the image by the grid, which is off where a grid is rounded up, and put anchors at the
    cells' upper left corners.

    Args:
        strides: of the maps.
        scale: an anchor's side, in strides.
        ratios: height / width of the anchors of a cell.
    """

    def __init__(self, strides: Sequence[int], *, scale: float = 1, ratios: Sequence[float] = (1.0,)) -> None:
        super().__init__(tuple((scale * s,) for s in strides), (tuple(ratios),) * len(strides))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image (cells of all maps x ratios, 4) x0, y0, x1, y1 in pixels."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        levels = self.grid_anchors([sides(x) for x in feature_maps], [(s, s) for s in self.strides])  # type: ignore
        anchors = torch.cat([boxes + s / 2 for boxes, s in zip(levels, self.strides, strict=True)])
        return [anchors] * len(image_list.image_sizes)


def _level(width: int, stride: int, wanted: int, channels: int) -> nn.Sequential:
    """From the map of a stride to the one of another."""
    layers: list[nn.Module] = []
    while stride > wanted:
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width, stride = width // 2, stride // 2
    while stride < wanted:
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
        stride *= 2
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels))


def _device(model: Backbone) -> torch.device:
    from agglom.probes.fingerprint import device_of

    return device_of(model)
