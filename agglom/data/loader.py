"""torch's DataLoader over a stream, with the two things it lacks: a new order each time, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Sequence

from torch.utils.data import DataLoader

from agglom.data.index import Index
from agglom.data.samples import collate
from agglom.data.streams import Stream, TrainStream, eval_stream
from agglom.data.views import View
from agglom.errors import UserError


class Loader(DataLoader):
    """Batches of a stream, assembled in the workers.

    Args:
        stream: a training stream (full batches only) or an evaluation stream (the rest too).
        batch_size: samples a batch (per rank).
        num_workers: processes that read and decode (per rank); 0 reads in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches, for a faster copy to an accelerator.
    """

    def __init__(
        self, stream: Stream, *, batch_size: int, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False
    ) -> None:
        super().__init__(
            stream,
            batch_size=batch_size,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            drop_last=isinstance(stream, TrainStream),
            collate_fn=collate,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if isinstance(self.dataset, TrainStream):
            self.dataset.begin()
        try:
            yield from super().__iter__()
        except UserError as err:  # a worker's arrives wrapped in its traceback
            raise UserError(str(err).strip().splitlines()[-1].removeprefix("agglom.errors.UserError: ")) from err


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
) -> Loader:
    """Batches (see `collate`) of `eval_stream`: what a probe or a validation reads."""
    stream = eval_stream(
        root, split, fields=fields, transform=transform, limit=limit, max_bad_fraction=max_bad_fraction
    )
    return Loader(stream, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)
