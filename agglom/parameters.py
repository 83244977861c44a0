"""Which parameters learn how fast and with how much decay."""

from __future__ import annotations

from typing import Any, Sequence

from timm.models import group_parameters
from torch import nn

from agglom.students import Student


def parameter_groups(
    student: Student,
    heads: Sequence[nn.Module],
    balance: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups: with and without weight decay, and with a learning rate by the student's layer.

    No decay for what is one-dimensional (biases, norms, scales) and what student and adaptors exempt (class token,
    registers, position embedding).

    Args:
        student: the backbone.
        heads: of every teacher and objective; they have the full learning rate.
        balance: may have parameters (uncertainty weighting).
        lr: the full learning rate.
        weight_decay: for the rest.
        layer_decay: d: the student's layer i of n (0 is its stem) learns at d^(n - i) of the rate, n being the heads.
            The layers are timm's.
    """
    exempt = student.no_weight_decay()
    layers = _layers(student) if layer_decay is not None else {}
    depth = 1 + max(layers.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}

    def add(parameter: nn.Parameter, decays: bool, scale: float = 1.0) -> None:
        if parameter.requires_grad:
            groups.setdefault((lr * scale, weight_decay if decays else 0.0), []).append(parameter)

    for name, parameter in student.named_parameters():
        scale = 1.0 if layer_decay is None else layer_decay ** (depth - layers.get(name, 0))
        add(parameter, parameter.ndim > 1 and name not in exempt, scale)
    for head in heads:
        own: set[str] = getattr(getattr(head, "adaptor", head), "no_weight_decay", set)()
        for name, parameter in head.named_parameters():
            add(parameter, parameter.ndim > 1 and name.removeprefix("adaptor.") not in own)
    for parameter in balance.parameters():
        add(parameter, parameter.ndim > 1)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _layers(student: Student) -> dict[str, int]:
    """Name of a parameter -> its layer, counted from the stem (0)."""
    backbone = student.backbone
    named = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    return {f"backbone.{name}": layer for name, layer in named.items()}
