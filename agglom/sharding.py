"""The trained weights spread over ranks: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

from typing import Any

from agglom.errors import UserError


def shard(distiller: Any, mesh: Any) -> None:
    """Shard a distiller's student and heads in place, once: a unit a block of the student, one a head.

    Frozen teachers stay whole on every rank: they have neither gradients nor optimiser state, which are most of what
    sharding saves, and their weights would have to be gathered in each step.

    Args:
        distiller: `agglom.distiller.Distiller`.
        mesh: one-dimensional device mesh of the ranks.

    Raises:
        UserError: averaged weights, objectives or a balance that learns: they need the weights whole on each rank.
    """
    from torch.distributed.fsdp import fully_shard  # takes a while to import
    from torch.distributed.tensor import DTensor

    whole = {
        "model.ema_decay": (distiller.ema is not None, "null"),
        "model.objectives": (len(distiller.objectives) > 0, "none"),
        "model.balance": (any(True for _ in distiller.balance.parameters()), "one without weights of its own"),
    }
    for key, (given, valid) in whole.items():
        if given:
            raise UserError(
                f"{key}: given, but trainer.strategy shards the weights, and it needs them whole on each rank; valid: "
                f"{valid}, or trainer.strategy: ddp"
            )
    student = distiller.student
    if isinstance(next(student.parameters()), DTensor):
        return
    for block in getattr(student.backbone, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    for head in distiller.heads.values():
        if any(True for _ in head.parameters()):
            fully_shard(head, mesh=mesh)
