"""torch's DataLoader over a stream, with the two things it lacks: a new order each time, and errors of one line."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch.utils.data import DataLoader, IterableDataset

from agglom.data.batches import Batches
from agglom.data.index import Index
from agglom.data.samples import collate
from agglom.data.streams import Cached, Stream, TrainStream, eval_stream
from agglom.data.views import View
from agglom.errors import UserError


class _Failure(NamedTuple):
    """A user error on its way out of a worker."""

    message: str


class _Carried(IterableDataset):
    """A source whose user errors come as items: raised in a worker they would arrive as a page of traceback."""

    def __init__(self, source: Stream | Batches) -> None:
        super().__init__()
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.source
        except UserError as err:
            yield from repeat(_Failure(str(err)))  # for ever: whichever worker is asked has an answer


def _collate(samples: Sequence[Any]) -> Mapping[str, Any] | _Failure:
    failure = next((sample for sample in samples if isinstance(sample, _Failure)), None)
    return failure or collate(samples)


def _as_it_is(batch: Any) -> Any:
    return batch


STOPPING = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)  # Ctrl-C's and a scheduler's


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Signals that stop a job reach all of its processes; the trainer still needs batches to end its step.

    A worker is gone 15 s after a SIGTERM all the same, so that nothing that waits for it hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(15))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals that stop a job wait; a process that is started meanwhile lets them wait until it says otherwise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Loader(DataLoader):
    """Batches of an evaluation stream (the last may be smaller) or of a plan's training stream, made in the workers.

    Args:
        source: samples, or batches already.
        batch_size: samples a batch (per rank); None for `Batches`, whose plan says it.
        num_workers: processes that read and decode (per rank); 0 reads in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches, for a faster copy to an accelerator.
    """

    def __init__(
        self,
        source: Stream | Batches,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _Carried(source),
            batch_size=batch_size,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            drop_last=isinstance(source, TrainStream),
            collate_fn=_as_it_is if batch_size is None else _collate,
            worker_init_fn=_leave_signals_to_the_trainer,
            # left to itself it takes workers' seeds from the generator that dropout draws from, at each beginning
            generator=torch.Generator().manual_seed(0),
        )
        self.source = source

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if isinstance(self.source, (TrainStream, Batches)):
            self.source.begin()
        with _held_back():  # workers that have just been started would die of one
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, _Failure):
                break
            if isinstance(self.source, Batches):
                self.source.handed_out(batch)
            yield batch
        else:
            return
        # Workers end at once when their iterator dies here. Held by the traceback of the error, it dies in a garbage
        # collection, which closes the queues first, and torch waits five seconds a worker (seen with 2.14).
        self._iterator = None
        del batches
        raise UserError(batch.message)


def eval_loader(
    root: str | Path | Index,
    split: str,
    *,
    fields: Sequence[str],
    batch_size: int,
    transform: View | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_fraction: float = 0.01,
    pin_memory: bool = False,
    cached: Cached | None = None,
) -> Loader:
    """Batches (see `collate`) of `eval_stream`: what a probe or a validation reads."""
    stream = eval_stream(
        root, split, fields=fields, transform=transform, limit=limit, max_bad_fraction=max_bad_fraction
    )
    stream.cached = cached
    return Loader(stream, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)
