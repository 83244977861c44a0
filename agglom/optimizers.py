"""The optimiser by its name in timm, as one kernel for all parameters where torch has one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from agglom.errors import UserError, nearest


def check_optimizer(name: str) -> None:
    """Raises UserError where timm has no optimiser of this name."""
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise UserError(f"model.optimizer: {name!r}; {nearest(name, known)}; take one")


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimiser over `groups`, whose own rates and decays hold; `betas` where it has them.

    Fused where torch has such a kernel (Adam, AdamW, SGD, Adagrad): a third of the time on a CPU, and no step counter
    that the host reads.
    """
    info = get_optimizer_info(name)
    options: dict[str, Any] = {"betas": betas} if info.has_betas else {}
    kind: Any = info.opt_class
    # of the fused kernels only Adam's takes DTensors, which are told here without importing them
    sharded = any(hasattr(p, "full_tensor") for group in groups for p in group["params"])
    fused = "fused" in inspect.signature(kind).parameters and (not sharded or issubclass(kind, torch.optim.Adam))
    if fused:
        options["fused"] = True
    optimizer: Any = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **options)
    if fused:
        # Its kernel could undo a gradient scaler's scale, and Lightning refuses to clip gradients where it would. So
        # the scaler does it beforehand, as for all other optimisers.
        optimizer._step_supports_amp_scaling = False
    return optimizer
