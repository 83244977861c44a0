"""Layers whose weights are computed (spectral scales, weight noise) -> plain layers, for an export."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from agglom.students.damp import Damp
from agglom.students.spectral import Spectral


def fold_weights(module: nn.Module) -> nn.Module:
    """Replace our parametrised linear layers below `module` by plain ones with the weights of evaluation mode.

    In place, and safe on a deep copy. `parametrize.remove_parametrizations` is not: it takes the property off the
    layer's class, which a copy shares with the layer that it was copied from.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Linear) or not parametrize.is_parametrized(layer, "weight"):
            continue
        chain = list(layer.parametrizations["weight"])  # type: ignore[index, arg-type]
        if not any(isinstance(step, (Spectral, Damp)) for step in chain):
            continue
        layer.eval()
        weight = layer.weight.detach()
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.weight = nn.Parameter(weight)
    return module
