"""What every loss promises, and the two steps that all of them share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Loss(nn.Module):
    """A loss an image: `(prediction, target) -> (B,)`.

    One class serves summaries (B, D) and maps (B, C, H, W): the channel is dimension 1, a map is compared token by
    token and averaged over its tokens. Inside everything is float32 (float64 if the input is), the target gets no
    gradient, and equal inputs give 0. A class only holds options; the maths is the function of the same name.

    Losses with running statistics (`AngleBalanced`) take them in through `update`, so that `forward` is pure.
    """

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each image.

        Args:
            prediction: (B, C) or (B, C, H, W), any float dtype.
            target: as `prediction`.
            mask: (B, H, W) bool, the tokens that count; an image without any has loss 0. Maps only.

        Returns:
            (B,) float32.

        Raises:
            ValueError: the shapes don't fit.
        """
        raise NotImplementedError

    def update(self, target: Tensor, mask: Tensor | None = None) -> None:
        """Take a training step's targets into the running statistics; called before `forward`. No-op by default."""


def ready(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both sides in float32 or wider, the target detached, tokens outside the mask set to 0.

    Clearing the tokens here rather than their losses later keeps a NaN in the padding out of the gradient too.

    Raises:
        ValueError: shapes differ, or a mask isn't (B, H, W) of the map.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    prediction, target = widen(prediction), widen(target.detach())
    if target.is_inference():  # a tensor made under inference mode can't be saved for backward
        target = target.clone()
    if mask is not None:
        check_mask(prediction, mask)
        outside = ~mask.unsqueeze(1)
        prediction, target = prediction.masked_fill(outside, 0), target.masked_fill(outside, 0)
    return prediction, target


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Raises ValueError unless `mask` is a bool (B, H, W) for the map `x` (B, C, H, W)."""
    if x.ndim != 4 or mask.dtype != torch.bool or mask.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)} does not fit {tuple(x.shape)}: bool (B, H, W) wanted")


def over_tokens(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over an image's (valid) tokens: (B,) or (B, H, W) -> (B,); 0 for an image without a valid token."""
    if mask is not None:
        count = mask.flatten(1).sum(1).clamp(min=1)
        return values.masked_fill(~mask, 0).flatten(1).sum(1) / count
    return values if values.ndim == 1 else values.flatten(1).mean(1)
