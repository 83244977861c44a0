"""The frozen contract: what every teacher promises, kept in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agglom.features import Dims, Features, InputSpec, prepare


class Teacher(nn.Module):
    """A frozen encoder that owns its input contract.

    A subclass sets the attributes, hands its network to `freeze` and implements `encode`. Frozen for good: no
    parameter asks for gradients, `train()` leaves it in eval mode, and its tensors are in no `state_dict` (so in
    no checkpoint and in no optimiser).

    Attributes:
        input: mean, std, size, stride; applied by `forward`.
        summary_dim: D, or None where there is no summary (SAM).
        spatial_dim: C, or None where there is no feature map.
        source: where the weights came from ("timm:NAME", a path, "random"), for the manifest.
        sha256: of the weights as loaded (see `fingerprint`).
        licence: SPDX name or URL of the weights' licence, "unknown" where nobody said.
    """

    input: InputSpec
    summary_dim: int | None
    spatial_dim: int | None
    source: str = "random"
    licence: str = "unknown"

    @property
    def dims(self) -> Dims:
        return Dims(self.summary_dim, self.spatial_dim)

    def freeze(self, network: nn.Module) -> nn.Module:
        """Put a network into the frozen state; called by a subclass once it is built."""
        return network.eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Features:
        """Resized and normalised pixels (B, 3, h, w) -> Features. The subclass's only duty."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W) in [0, 1] -> Features, without gradients."""
        return self.encode(prepare(images, self.input))
