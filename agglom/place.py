"""Where a training batch stands in the plan: its teachers, their factors, and whether the trunk learns."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from agglom.plan import Part, Plan, slot


class Place(NamedTuple):
    """What a batch's place in the plan comes to.

    Attributes:
        names: the teachers that see it.
        others: those that see another rank's batch of the same micro-batch.
        step: optimiser steps before it.
        micro: number of the micro-batch within the step.
        frozen: whether only the heads learn.
        scales: a factor for each teacher's mean loss, or None for 1.
    """

    names: Sequence[str]
    others: Sequence[str] = ()
    step: int = 0
    micro: int = 0
    frozen: bool = False
    scales: Sequence[float] | None = None


def locate(
    plan: Plan,
    part: Part | None,
    names: Sequence[str],
    *,
    step: int,
    micro: int,
    micros: int,
    ranks: int,
    shares: bool,
) -> Place:
    """The place of a batch.

    Args:
        plan: of the run.
        part: what the data module made; None (a loader of the user's own) is the stage's first partition.
        names: all teachers.
        step: optimiser steps before this batch.
        micro: number of the micro-batch within the step.
        micros: micro-batches of a step on each rank.
        ranks: how many there are.
        shares: whether the balance shares one weight among the teachers that an image has (`Balance.shares`).

    Raises:
        RuntimeError: the batch was made for another stage than the step belongs to.
    """
    index = plan.stage_at(step)
    if part is not None and part.stage != index:
        raise RuntimeError(f"a batch of stage {part.stage} at step {step}, which belongs to stage {index}")
    frozen = step - plan.starts[index] < plan.stages[index].freeze_steps
    if plan.alone():
        return Place(names, step=step, micro=micro, frozen=frozen)
    partition = 0 if part is None else part.partition
    own = plan.teachers(index, partition, names)
    scales = plan.scales(index, partition, micros * ranks, names)
    if shares:  # an image that only some of the stage's teachers see counts for their part of the whole
        share = len(own) / len(plan.present(index, names))
        scales = [scale * share for scale in scales]
    parts = {slot(micro, rank, ranks) % len(plan.parts[index]) for rank in range(ranks)}
    looking = {name for number in parts for name in plan.teachers(index, number, names)}
    return Place(own, [name for name in names if name in looking - {*own}], step, micro, frozen, scales)


def own_images(own_data: Mapping[str, Sequence[str]], batch: Mapping[str, Any]) -> Tensor | None:
    """(T, B) bool: whether an image comes from a shard of the teacher's own data; None if nobody has any.

    Args:
        own_data: every teacher -> names of its own shards, with * and ?.
        batch: with the name of each image's `shard`.
    """
    if not any(own_data.values()):
        return None
    rows = [[any(fnmatchcase(s, pattern) for pattern in own) for s in batch["shard"]] for own in own_data.values()]
    return torch.tensor(rows).to(batch["image"].device, non_blocking=True)
