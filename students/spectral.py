"""Spectral reparametrisation: a linear layer's largest singular value is a parameter of its own.

W' = W * (softplus(g) + 0.05) / sigma(W), where sigma is the largest singular value by power iteration. Keeps attention
entropy from collapsing in long trainings of large ViTs (sigma-Reparam, arXiv:2303.06296; this form is RADIO's).
"""

from __future__ import annotations

from typing import Iterator, cast

import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agglom.errors import UserError

FLOOR = 0.05  # a layer's largest singular value stays above it
ABOVE_FLOOR = 1e-3  # where a smaller one starts, so that g is finite and keeps a gradient
ITERATIONS = 100  # at the start
TINY = 1e-6  # below this, sigma is no divisor; a matrix of zeros stays one


def raw_scale(sigma: Tensor) -> Tensor:
    """g with softplus(g) + 0.05 = sigma; a sigma up to 0.051 counts as 0.051."""
    above = (sigma - FLOOR).clamp_min(ABOVE_FLOOR)
    return above + torch.log(-torch.expm1(-above))  # log(exp(above) - 1) without overflow


def power_iteration(matrices: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards the leading singular vectors: matrices (P, O, I), u (P, O) -> new u, and v (P, I)."""
    v = F.normalize(torch.einsum("poi,po->pi", matrices, u), dim=1)
    return F.normalize(torch.einsum("poi,pi->po", matrices, v), dim=1), v


def leading(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left vectors (P, O), singular values (P,) and right vectors (P, I) of (P, O, I), by power iteration.

    Near enough: whatever is missing of sigma is missing of the divisor too, so W' = W all the same, and u and v come
    nearer with every step of the training. An exact decomposition of all layers of a ViT-B takes half a minute.
    """
    if matrices.is_meta:  # shapes are all there is
        return matrices[:, :, 0], matrices[:, 0, 0], matrices[:, 0]
    tall = matrices.shape[1] > matrices.shape[2]
    gram = matrices.mT @ matrices if tall else matrices @ matrices.mT  # of the shorter side
    gram = gram / gram.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone
    x = torch.randn(gram.shape[:2], generator=generator).to(gram.device)
    for _ in range(ITERATIONS):
        x = F.normalize(torch.einsum("poq,pq->po", gram, x), dim=1)
    u, v = power_iteration(matrices, torch.einsum("poi,pi->po", matrices, x) if tall else x)
    return u, torch.einsum("po,poi,pi->p", u, matrices, v), v


class Spectral(nn.Module):
    """The parametrisation of one weight, for `torch.nn.utils.parametrize`.

    A function of weight, g, u and v only: what is recomputed for a checkpointed backward pass is the same again.

    Args:
        weight: (O, I) at the start.
        parts: how many matrices the weight stacks, each with a scale of its own.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        matrices = weight.detach().float().unflatten(0, (parts, -1))  # (P, O / P, I)
        left, sigma, right = leading(matrices)
        self.g = nn.Parameter(raw_scale(sigma).unsqueeze(1))  # (P, 1): weight decay leaves 1-D parameters alone
        self.register_buffer("u", left.clone(memory_format=torch.contiguous_format))
        self.register_buffer("v", right.clone(memory_format=torch.contiguous_format))

    def forward(self, weight: Tensor) -> Tensor:
        """W (O, I) -> W' (O, I), in the same dtype; gradient reaches W also through sigma."""
        with _full_precision(weight):
            matrices = weight.float().unflatten(0, (len(self.g), -1))
            # Clones, because a later forward pass moves u and v before this one's backward.
            sigma = torch.einsum("po,poi,pi->p", self.u.float().clone(), matrices, self.v.float().clone())
            scale = (F.softplus(self.g.float()) + FLOOR) / sigma.clamp_min(TINY).unsqueeze(1)  # (P, 1)
            return (matrices * scale.unsqueeze(2)).flatten(0, 1).to(weight.dtype)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Let u and v follow the weight by one step."""
        with _full_precision(weight):
            matrices = weight.float().unflatten(0, (len(self.g), -1))
            u, v = power_iteration(matrices, self.u.float())
        self.u.copy_(u)
        self.v.copy_(v)


def reparametrize(backbone: nn.Module, name: str) -> None:
    """Give every linear layer in `backbone.blocks` a spectral scale, in place; outputs stay what they are.

    A fused qkv counts as three matrices, the fused first layer of a gated MLP as two. A matrix whose largest singular
    value is at most 0.051 is the exception: it starts at 0.051.

    Raises:
        UserError: there are no such layers.
    """
    layers = [
        (layer, 3 if key == "qkv" else 2 if isinstance(parent, GluMlp) and key == "fc1" else 1)
        for parent in getattr(backbone, "blocks", nn.Identity()).modules()
        for key, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    if not layers:
        raise UserError(
            f"student.spectral_reparam: true, but {name} has no linear layers in blocks; valid: false, or a ViT; "
            f"remove the key"
        )
    for layer, parts in layers:
        spectral = Spectral(layer.weight, parts)
        with torch.no_grad():  # or the gradient of a matrix that was raised would be as many times too large
            layer.weight.copy_(spectral(layer.weight))
        parametrize.register_parametrization(layer, "weight", spectral)


def iterate_spectral(module: nn.Module) -> None:
    """One power iteration for every reparametrised layer below `module`; due once a training step."""
    for layer in spectral_layers(module):
        weights = cast(parametrize.ParametrizationList, layer.parametrizations["weight"])  # type: ignore[index]
        cast(Spectral, weights[0]).iterate(weights.original)


def spectral_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The reparametrised layers below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            chain = layer.parametrizations["weight"]  # type: ignore[index]
            if isinstance(cast(nn.ModuleList, chain)[0], Spectral):
                yield layer


def _full_precision(weight: Tensor) -> torch.autocast:
    """No autocast where `weight` lives: bf16 has too few digits for a norm that everything is divided by."""
    return torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False)
