"""mmsegmentation without a compiled mmcv: what has to be in place before `import mmseg`."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError, brief

NEEDED = ("mmseg", "mmcv", "mmengine", "ftfy", "regex")  # modules of what the extra lists
FIX = "install it with: pip install 'agglom[mmseg]'"


class MissingExtra(UserError, ImportError):
    """mmsegmentation can't be imported: an ImportError to code, one line to a user."""


def import_mmseg() -> None:
    """Import mmseg. mmcv-lite, which has no operators of its own, gets stand-ins for the two that mmseg imports.

    mmsegmentation 1.2.2 refuses mmcv 2.2 and newer, and older ones have no wheels for current versions of torch, so the
    extra installs mmcv-lite. Where a compiled mmcv is found, nothing is replaced.

    Raises:
        MissingExtra: mmsegmentation, or something that it needs, is missing or broken.
    """
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise MissingExtra(f"mmsegmentation: {', '.join(absent)} is not installed; {FIX}")
    try:
        if find_spec("mmcv._ext") is None:
            sys.modules.setdefault("mmcv.ops", _stand_in())
        with warnings.catch_warnings():  # deformable attention, which no model of mmseg needs in order to be imported
            warnings.filterwarnings("ignore", message="Fail to import ``MultiScaleDeformableAttention``")
            import_module("mmseg.models")
    except (ImportError, AssertionError) as err:  # mmseg asserts the versions of mmcv and mmengine
        raise MissingExtra(f"mmsegmentation: {brief(err)}; {FIX}") from err


def point_sample(maps: Tensor, points: Tensor, align_corners: bool = False, **options: Any) -> Tensor:
    """Values of maps at points, as PointRend and Mask2Former read them.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2) or (N, H', W', 2), x and y from 0 to 1 over the whole map.
        align_corners, options: of `torch.nn.functional.grid_sample`.

    Returns:
        (N, C, P) or (N, C, H', W').
    """
    grid = points.unsqueeze(2) if points.ndim == 3 else points
    values = F.grid_sample(maps, 2 * grid - 1, align_corners=align_corners, **options)
    return values.squeeze(3) if points.ndim == 3 else values


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss (Lin et al., arXiv:1708.02002) on class numbers instead of torchvision's one-hot targets.

    Args:
        logits: (N, C).
        target: (N,) int64; a number from C on is background, negative for every class.
        weight: None; mmseg weights classes outside.
        reduction: "none" (N, C), "sum", or "mean": the sum over N.

    Raises:
        NotImplementedError: a weight.
    """
    from torchvision.ops import sigmoid_focal_loss as of_one_hot

    if weight is not None:
        raise NotImplementedError("sigmoid_focal_loss with a weight of each class needs a compiled mmcv")
    one_hot = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    loss = of_one_hot(logits, one_hot, alpha=alpha, gamma=gamma, reduction="none")
    return loss if reduction == "none" else loss.sum() / (len(logits) if reduction == "mean" else 1)


def _stand_in() -> ModuleType:
    """`mmcv.ops` with two operators. Asked for others it says what mmseg is prepared for: no such module."""
    module = ModuleType("mmcv.ops", "Stand-ins for the operators of a compiled mmcv.")

    def absent(name: str) -> Any:
        if name.startswith("__"):  # introspection and the import system ask for these
            raise AttributeError(name)
        raise ModuleNotFoundError(f"mmcv.ops.{name} needs a compiled mmcv; mmcv-lite has none", name="mmcv.ops")

    module.point_sample, module.sigmoid_focal_loss = point_sample, sigmoid_focal_loss  # type: ignore[attr-defined]
    module.__getattr__ = absent  # type: ignore[method-assign]
    return module
