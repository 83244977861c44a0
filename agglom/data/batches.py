"""Training batches as a plan of stages wants them, assembled where the samples are decoded."""

from __future__ import annotations

from itertools import count, islice
from typing import Any, Iterator, Sequence

import torch
from torch.utils.data import IterableDataset, get_worker_info

from agglom.data.crops import MultiCrop
from agglom.data.mixture import MixedStream
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
        workers: processes that assemble batches; 1 where the trainer's own does.
        origin: number of the batch with which the stream's order began; left out: `first`.
    """

    MEMORY = 64  # batches that a trainer may have fetched and not processed; Lightning fetches one

    def __init__(
        self,
        stream: TrainStream | MixedStream,
        plan: Plan,
        *,
        micros: int = 1,
        first: int = 0,
        margin: int = 0,
        crops: MultiCrop | None = None,
        crops_start: int = 0,
        workers: int = 1,
        origin: int | None = None,
    ) -> None:
        super().__init__()
        self.crops, self.crops_start = crops, crops_start
        self.stream, self.plan, self.micros, self.margin = stream, plan, micros, margin
        self._next = torch.full((1,), first).share_memory_()  # workers of a second iteration see how far it is
        self._first = self._next.clone().share_memory_()  # of this iteration: some workers start late
        self.workers, self.origin = workers, first if origin is None else origin
        self._drawn: dict[int, Any] = {}  # number of a batch -> what its worker had drawn after it
        self._begun = False

    def resume(self, number: int, drawn: Sequence[Any]) -> None:
        """Begin with round `number` of the stream, whose readers have drawn so much; `origin` is where it began."""
        self.stream.resume(number, drawn, turn=(int(self._next) - self.origin) % self.workers)
        for reader, position in enumerate(drawn):  # the batch before the first, and so on, were theirs
            turn = (int(self._next) - 1 - self.origin - reader) % self.workers
            self._drawn[int(self._next) - 1 - turn] = position

    def position(self, batches: int) -> list[Any]:
        """What each reader had drawn when batch number `batches` was the next one."""
        last = [batches - 1 - (batches - 1 - self.origin - reader) % self.workers for reader in range(self.workers)]
        return [self._drawn.get(number, 0) for number in last]

    def begin(self) -> None:
        """Called before workers start to read."""
        self._first.copy_(self._next)
        if self._begun:  # another order, from here on
            self.origin, self._drawn = int(self._next), {}
        self._begun = True
        self.stream.begin()

    def handed_out(self, batch: dict[str, Any]) -> None:
        """Called for every batch that leaves the loader."""
        number = int(self._next)
        self._drawn[number] = batch.pop("drawn")
        self._drawn.pop(number - self.workers - self.MEMORY, None)
        self._next += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self.stream.samples()
        for number in count(int(self._first) + worker, workers):
            step, micro = divmod(number, self.micros)
            part = self.plan.part(step, slot(micro, self.stream.rank, self.stream.world_size))
            if part.size and self.stream.transform is not None:
                self.stream.transform.size = part.size + 2 * self.margin
            if isinstance(self.stream, MixedStream):
                self.stream.batch = number
            self.stream.crops = self.crops if step >= self.crops_start else None
            # the stream transforms a sample when it is asked for it, so these have the size and crops just set
            batch = collate(list(islice(samples, part.batch_size)))
            yield {**batch, "part": part, "drawn": self.stream.drawn}
