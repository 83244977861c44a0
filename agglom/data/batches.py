"""Training batches as a plan of stages wants them, assembled where the samples are decoded."""

from __future__ import annotations

from itertools import count, islice
from typing import Any, Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from agglom.data.crops import MultiCrop
from agglom.data.samples import collate
from agglom.data.streams import TrainStream
from agglom.plan import Plan, slot


class Batches(IterableDataset):
    """Full batches of an endless stream, each of the size and number of images that the plan has for its step.

    A worker knows which batches are its own: torch's loader takes batch b from worker b mod workers. So a stage begins
    with the very batch of its first step, however many batches are prefetched.

    Args:
        stream: where the samples come from; its view's size is set for each batch (left alone where the plan has none).
        plan: see `agglom.plan`.
        micros: batches of an optimiser step (`trainer.accumulate_grad_batches`).
        first: number of the first batch, counted from the beginning of training.
        margin: pixels around the view on each side.
        crops: what makes the batches' `crops`, or None for batches without them.
        crops_start: the first optimiser step with crops; none are made before.
    """

    def __init__(
        self,
        stream: TrainStream,
        plan: Plan,
        *,
        micros: int = 1,
        first: int = 0,
        margin: int = 0,
        crops: MultiCrop | None = None,
        crops_start: int = 0,
    ) -> None:
        super().__init__()
        self.crops, self.crops_start = crops, crops_start
        self.stream, self.plan, self.micros, self.margin = stream, plan, micros, margin
        self._next = torch.full((1,), first).share_memory_()  # workers of a second iteration see how far it is
        self._first = self._next.clone().share_memory_()  # of this iteration: some workers start late

    def begin(self) -> None:
        """Called before workers start to read."""
        self._first.copy_(self._next)
        self.stream.begin()

    def handed_out(self) -> None:
        """Called for every batch that leaves the loader."""
        self._next += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = iter(self.stream)
        for number in count(int(self._first) + worker, workers):
            step, micro = divmod(number, self.micros)
            part = self.plan.part(step, slot(micro, self.stream.rank, self.stream.world_size))
            if part.size and self.stream.transform is not None:
                self.stream.transform.size = part.size + 2 * self.margin
            self.stream.crops = self.crops if step >= self.crops_start else None
            # the stream transforms a sample when it is asked for it, so these have the size and crops just set
            yield {**collate(list(islice(samples, part.batch_size))), "part": part}
