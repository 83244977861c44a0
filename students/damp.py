"""DAMP: multiplicative noise on the weights while training, for a student that bears perturbed weights and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agglom.errors import UserError


class Damp(nn.Module):
    """W -> W * (1 + N(0, sigma^2)), drawn anew at every use in training mode; W itself in evaluation mode.

    A parametrisation for `torch.nn.utils.parametrize`; an exported layer is plain (`agglom.students.fold_weights`).

    Source: DAMP, 2406.16540, as C-RADIOv4 uses it, which doesn't say its sigma.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.sigma * torch.randn_like(weight)) if self.training else weight


def add_noise(backbone: nn.Module, sigma: float, name: str) -> None:
    """Give every linear layer in `backbone.blocks` noisy weights, in place.

    Raises:
        UserError: sigma outside (0, 1), or no such layers.
    """
    if not 0 < sigma < 1:
        raise UserError(f"student.damp: {sigma}; valid: null, or above 0 and below 1; change it")
    layers = [m for m in getattr(backbone, "blocks", nn.Identity()).modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise UserError(f"student.damp: {sigma}, but {name} has no linear layers in blocks; valid: null, or a ViT")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Damp(sigma))
