"""Stages and partitions: which teachers see which images, at what size, how many, at every step of a run.

A stage is a span of optimiser steps. A partition is a part of each step's images: it lives on some of the ranks, or,
on fewer ranks than partitions, in some of a step's micro-batches. Everything here is a function of the step, so that
the data workers, the training module and a resumed run agree without talking to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Iterator, NamedTuple, Sequence

from agglom.draws import keyed
from agglom.errors import UserError, nearest


@dataclass(frozen=True)
class Partition:
    """A part of each step's images. What is left out is taken from the stage.

    Attributes:
        teachers: names of the teachers that see these images; left out: all.
        resolutions: pixels of a side at which the student sees them; of several, each step draws one.
        size: pixels of a side of the images in the batch, which teachers resize from; greater than the resolution, the
            student sees them scaled down. Left out: the resolution, or `data.size` where there is none either.
        batch_size: images a micro-batch and rank; left out: `data.batch_size`.
    """

    teachers: list[str] | None = None
    resolutions: list[int] | None = None
    size: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Stage:
    """A span of optimiser steps.

    Attributes:
        steps: its length; may be left out for the last stage, which then ends with the run.
        teachers: see Partition.
        resolutions: see Partition.
        size: see Partition.
        batch_size: see Partition.
        partitions: parts of each step's images; left out: one, of the stage's own values.
        lr: peak learning rate; left out: `model.lr`.
        warmup_steps: of this stage's schedule; left out: `model.warmup_steps`.
        restart: begin the learning-rate schedule anew; false goes on with that of the stage before.
        freeze_steps: steps at its beginning in which only the heads learn.
        reset_statistics: forget what normalisers and losses have measured in the stage before.
    """

    steps: int | None = None
    teachers: list[str] | None = None
    resolutions: list[int] | None = None
    size: int | None = None
    batch_size: int | None = None
    partitions: list[Partition] = field(default_factory=list)
    lr: float | None = None
    warmup_steps: int | None = None
    restart: bool = True
    freeze_steps: int = 0
    reset_statistics: bool = True

    def parts(self) -> list[Partition]:
        """Its partitions with the stage's values filled in; at least one."""
        own = Partition(self.teachers, self.resolutions, self.size, self.batch_size)
        names = [field.name for field in fields(Partition)]
        return [
            replace(own, **{name: value for name in names if (value := getattr(part, name)) is not None})
            for part in self.partitions
        ] or [own]


class Part(NamedTuple):
    """What a micro-batch is; the data module writes it into the batch under "part".

    Attributes:
        stage: index of the stage.
        partition: index of the partition within the stage.
        resolution: pixels of a side at which the student sees the images.
        size: pixels of a side of the images, without the margin.
        batch_size: how many images.
    """

    stage: int
    partition: int
    resolution: int
    size: int
    batch_size: int


class Plan:
    """The stages of a run, by step.

    Args:
        stages: may be empty: one stage of the whole run.
        size: `data.size`.
        batch_size: `data.batch_size`.
        seed: of the resolutions drawn.
    """

    def __init__(self, stages: Sequence[Stage], *, size: int = 0, batch_size: int = 0, seed: int = 0) -> None:
        self.stages = list(stages) or [Stage()]
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.parts = [stage.parts() for stage in self.stages]
        self.starts = [0]
        for stage in self.stages[:-1]:
            self.starts.append(self.starts[-1] + (stage.steps or 0))

    def stage_at(self, step: int) -> int:
        """Index of the stage that an optimiser step (0 is the first) belongs to; the last one has no end."""
        return sum(step >= start for start in self.starts[1:])

    def part(self, step: int, slot: int) -> Part:
        """What slot number `slot` of a step is; slots are a step's micro-batches over all ranks, see `slot`."""
        stage = self.stage_at(step)
        index = slot % len(self.parts[stage])
        part = self.parts[stage][index]
        drawn = self._drawn(part.resolutions, step, index)
        size = part.size or drawn or self.size
        return Part(stage, index, drawn or size, size, part.batch_size or self.batch_size)

    def _drawn(self, resolutions: Sequence[int] | None, step: int, partition: int) -> int | None:
        """One of the resolutions, the same on every rank and in every run of this seed."""
        if not resolutions:
            return None
        return resolutions[keyed(self.seed, step, partition) % len(resolutions)]

    def teachers(self, stage: int, partition: int, names: Sequence[str]) -> list[str]:
        """The teachers of a partition, in the order of `names`."""
        chosen = self.parts[stage][partition].teachers
        return list(names) if chosen is None else [name for name in names if name in chosen]

    def present(self, stage: int, names: Sequence[str]) -> list[str]:
        """The teachers of a stage, over all its partitions, in the order of `names`."""
        parts = [self.teachers(stage, index, names) for index in range(len(self.parts[stage]))]
        return [name for name in names if any(name in part for part in parts)]

    def scales(self, stage: int, partition: int, slots: int, names: Sequence[str]) -> list[float]:
        """For each teacher, what its mean loss over a slot's images is multiplied by; 0 for teachers not in there.

        A step averages the gradients of its slots (over ranks and micro-batches). With these factors the result is the
        gradient of the sum over teachers of the mean over all images that a teacher saw in the step, however many
        ranks or micro-batches its partitions have. All 1 where there is one partition.
        """
        parts = self.parts[stage]
        if slots % len(parts):
            raise UserError(
                f"stages.{stage}.partitions: {len(parts)} of them, but a step has {slots} micro-batches over all "
                f"ranks; valid: a multiple of {len(parts)}; set trainer.accumulate_grad_batches"
            )
        images = [part.batch_size or 1 for part in parts]  # all have a number of their own, or none: see `problems`
        seen = dict.fromkeys(names, 0)
        for index, number in enumerate(images):
            for name in self.teachers(stage, index, names):
                seen[name] += number
        here = set(self.teachers(stage, partition, names))
        return [len(parts) * images[partition] / seen[name] if name in here else 0.0 for name in names]

    def alone(self) -> bool:
        """Whether every stage is one partition of all teachers: nothing of the heads is ever left out."""
        return all(len(parts) == 1 and parts[0].teachers is None for parts in self.parts)

    def spans(self, total: int) -> list[tuple[int, int]]:
        """(first step, length) of each stage's learning-rate schedule, in a run of `total` steps."""
        bounds = [*self.starts, max(total, self.starts[-1])]
        begun: list[int] = []
        for index, stage in enumerate(self.stages):
            begun.append(bounds[index] if stage.restart or index == 0 else begun[-1])
        return [(start, max(b for i, b in enumerate(bounds[1:]) if begun[i] == start) - start) for start in begun]


def slot(micro: int, rank: int, ranks: int) -> int:
    """Number of a micro-batch among all of a step: micro-batch `micro` of rank `rank`."""
    return micro * ranks + rank


def problems(stages: Sequence[Stage], *, max_steps: int | None, teachers: Sequence[str]) -> Iterator[str]:
    """What is wrong with a list of stages by itself, a line each, with full keys."""
    total = 0
    for index, stage in enumerate(stages):
        key, last = f"stages.{index}", index == len(stages) - 1
        if stage.steps is None and not last:
            yield f"{key}.steps: missing; valid: > 0 (only the last stage may leave it out); add the key"
        elif stage.steps is not None and stage.steps <= 0:
            yield f"{key}.steps: {stage.steps}; valid: > 0; change it"
        total += max(stage.steps or 0, 0)
        length = stage.steps
        if length is None and max_steps is not None:
            length = max_steps - total
            if length <= 0:
                yield (
                    f"{key}.steps: missing, and the stages before it take all of trainer.max_steps {max_steps}; "
                    f"shorten them or raise trainer.max_steps"
                )
        for name, value in (("warmup_steps", stage.warmup_steps), ("freeze_steps", stage.freeze_steps)):
            if value is not None and value < 0:
                yield f"{key}.{name}: {value}; valid: >= 0; change it"
            elif value and length is not None and 0 < length <= value:
                yield f"{key}.{name}: {value}; valid: less than the stage's {length} steps; lower it"
        if stage.lr is not None and stage.lr <= 0:
            yield f"{key}.lr: {stage.lr}; valid: > 0; change it"
        for number, part in enumerate(stage.partitions):
            yield from _part_problems(f"{key}.partitions.{number}", part, teachers)
        yield from _part_problems(
            key, Partition(stage.teachers, stage.resolutions, stage.size, stage.batch_size), teachers
        )
        sizes = [part.batch_size for part in stage.parts()]
        if None in sizes and any(sizes):
            yield f"{key}.partitions: batch_size {sizes}; valid: all of them or none; give each its own"
        for number, part in enumerate(stage.parts()):
            at = f"{key}.partitions.{number}" if stage.partitions else key
            for pixels in part.resolutions or ():
                if part.size is not None and pixels > part.size:
                    yield f"{at}.resolutions: {pixels}; valid: at most the size {part.size}; lower it or raise size"
    if max_steps is not None and total > max_steps:
        yield f"stages: {total} steps in all; valid: at most trainer.max_steps {max_steps}; raise it or shorten a stage"


def _part_problems(key: str, part: Partition, teachers: Sequence[str]) -> Iterator[str]:
    if part.teachers is not None:
        if not part.teachers:
            yield f"{key}.teachers: empty; valid: names of teachers, or no such key for all; name one"
        for name in part.teachers:
            if name not in teachers:
                yield f"{key}.teachers: {name!r}; {nearest(name, teachers)}; take one"
    if part.resolutions is not None and not part.resolutions:
        yield f"{key}.resolutions: empty; valid: pixels, or no such key; name one"
    for name, values in (
        ("resolutions", part.resolutions or ()),
        ("size", [part.size]),
        ("batch_size", [part.batch_size]),
    ):
        for value in values:
            if value is not None and value <= 0:
                yield f"{key}.{name}: {value}; valid: > 0; change it"
