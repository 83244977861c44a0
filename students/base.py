"""What every student promises."""

from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor, nn

from agglom.features import Dims, InputSpec, StudentFeatures


class Student(nn.Module):
    """The backbone being trained.

    Attributes:
        input: its own mean, std, stride and native size; applied by `forward`.
        dims: widths, number of summary tokens and depth, for building adaptors.
        tap_names: the blocks that `taps` may name, first to last.
        backbone: the timm model itself, which is what an export writes.
    """

    input: InputSpec
    dims: Dims
    tap_names: tuple[str, ...]
    backbone: Any  # an nn.Module whose attributes are timm's

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> StudentFeatures:
        """images (B, 3, H, W) in [0, 1] -> StudentFeatures; normalises itself."""
        raise NotImplementedError
