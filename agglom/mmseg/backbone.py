"""Any model reference as a backbone of mmsegmentation."""

from __future__ import annotations

from typing import Any, Callable, Sequence, cast

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from agglom.errors import UserError
from agglom.export import Exported
from agglom.features import ask, sides
from agglom.mmseg.registry import MODELS
from agglom.runs import resolve
from agglom.teachers.base import still


@MODELS.register_module("Backbone")
class Backbone(BaseModule):
    """`agglom.Backbone`: an export, a run or a model by name, giving feature maps to mmseg's necks and heads.

    The model normalises by itself, so it wants pixels in [0, 1] from the data preprocessor: `mean=[0, 0, 0]`,
    `std=[255, 255, 255]`, `bgr_to_rgb=True`. A model with a fixed input size resizes every crop to it, so a crop of
    that size is the natural one; any other model takes multiples of its stride (`size_divisor`).

    A frozen model is kept outside of the module tree, as a teacher is: optimiser, checkpoints and gradient
    synchronisation never meet it, and a checkpoint holds neck and head alone.

    Args:
        model: a reference: the path of an export or a run, `timm:NAME`, `open_clip:NAME/TAG`, `tiny:NAME`.
        blocks: how many maps to give. 1: the model's own map. More: those of its last blocks under the final norm (a
            ViT) or of its last stages at their own strides (a CNN), first to last.
        repeat: how often to give the one map, for heads that want several, behind mmseg's `Feature2Pyramid`.
        frozen: features are constants; else the model is trained, which only exports and runs can be.
        init_cfg: not for us: the weights are the model's own.

    Raises:
        UserError: a reference that can't be resolved, a combination without meaning; at the first images: pixels
            outside of [0, 1], a size that isn't a multiple of the stride, a model without maps or with fewer blocks.
    """

    def __init__(
        self, model: str, *, blocks: int = 1, repeat: int = 1, frozen: bool = True, init_cfg: Any = None
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise UserError(f"backbone.init_cfg: {init_cfg!r}; valid: none, the weights are those of {model}")
        if min(blocks, repeat) < 1 or max(blocks, repeat) > 1 < min(blocks, repeat):
            raise UserError(f"backbone: blocks {blocks}, repeat {repeat}; valid: positive, and one of them 1")
        self.ref, self.blocks, self.repeat, self.frozen = model, blocks, repeat, frozen
        module = resolve(model)
        self.input = module.input
        if frozen:
            self.__dict__["model"] = still(cast(nn.Module, module))
        elif isinstance(module, Exported):
            still(module.heads)  # the adaptors take no part
            self.model = module
        else:
            raise UserError(f"backbone.frozen: false; {model} is a frozen teacher; give an export or a run to train")
        self._checked = False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) in [0, 1] -> maps (B, C, h, w), as many as `blocks` or `repeat` says."""
        self._check_size(images)
        if not self._checked:
            self._check_pixels(images)
            self._checked = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            answer = ask(self.model, images, blocks=self.blocks if self.blocks > 1 else 0)
        found = answer.blocks if self.blocks > 1 else [answer.features] * self.repeat
        maps = tuple(features.spatial for features in found)
        if any(x is None for x in maps):
            raise UserError(f"backbone.model: {self.ref} has no feature map")
        if len(maps) < max(self.blocks, self.repeat):
            raise UserError(f"backbone.blocks: {self.blocks}; {self.ref} tells of {len(maps)}")
        return cast("tuple[Tensor, ...]", maps)

    def _check_size(self, images: Tensor) -> None:
        height, width = sides(images)
        stride = self.input.stride
        if self.input.size is None and (height % stride or width % stride):
            raise UserError(
                f"data_preprocessor: images of {height} x {width} pixels; {self.ref} takes multiples of {stride}; "
                f"set size_divisor: {stride} there, and in its test_cfg"
            )

    def _check_pixels(self, images: Tensor) -> None:
        """Once, since the answer has to come from the device."""
        low, high = images.amin().item(), images.amax().item()
        if low < 0 or high > 1:
            raise UserError(
                f"data_preprocessor: pixels from {low:.3g} to {high:.3g}; valid: 0 to 1; set mean [0, 0, 0] and std "
                "[255, 255, 255]: the backbone normalises by itself"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        if self.frozen:
            self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


@MODELS.register_module("BatchNorm")
class BatchNorm(BaseModule):
    """`agglom.BatchNorm`: a neck that norms each map, the first half of the usual linear probe (BN, 1x1 convolution).

    The scales of frozen features differ by orders of magnitude between models, and within one between channels; normed,
    all can be trained with the same rates.

    Args:
        channels: C of each map.
        norm: "BN", or "SyncBN" on several GPUs.
    """

    def __init__(self, channels: Sequence[int], norm: str = "BN") -> None:
        super().__init__()
        self.norms = nn.ModuleList(build_norm_layer({"type": norm}, width)[1] for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """maps (B, C, h, w) -> the same, normed."""
        return tuple(norm(x) for norm, x in zip(self.norms, maps, strict=True))
