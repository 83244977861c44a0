"""Several shard sources as one training stream, each with its share of the samples; shares may change on the way."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from agglom.data.crops import MultiCrop
from agglom.data.streams import TrainStream
from agglom.data.views import View
from agglom.draws import keyed
from agglom.errors import UserError


@dataclass(frozen=True)
class Source:
    """Shards to train on, one of several.

    Args:
        data: shard folder or address.
        weight: share of the samples, relative to the other sources' weights.
        split: split to train on.
    """

    data: str
    weight: float = 1.0
    split: str = "train"


@dataclass(frozen=True)
class GapOptions:
    """How shares follow the gap between student and teachers; see `follow`.

    Args:
        every: optimiser steps between two updates.
        strength: what is left of the shares to follow the gap; the rest stays with the sources' weights, as a floor.
        most: largest relative gap that counts.
    """

    every: int = 1000
    strength: float = 0.5
    most: float = 3.0


def shares_of(sources: Mapping[str, Source]) -> list[float]:
    """The sources' weights, as parts of 1.

    Raises:
        UserError: a weight that is no positive number.
    """
    for name, source in sources.items():
        if not 0 < source.weight < float("inf"):
            raise UserError(f"data.sources.{name}.weight: {source.weight}; valid: > 0; change it or remove the source")
    total = sum(source.weight for source in sources.values())
    return [source.weight / total for source in sources.values()]


def follow(shares: Tensor, gaps: Tensor, weights: Tensor, *, strength: float, most: float) -> Tensor:
    """New shares: psi = shares * exp(min(gaps, most)); strength * psi / sum(psi) + (1 - strength) * weights.

    A source never has less than (1 - strength) of its weight. Equal gaps keep shares that are the weights.

    Source: DDK, 2407.16154, section 3.2, where gaps are ratios of perplexities of language models, and the weights are
    all alike. `most` is ours: the exponential of a ratio explodes.

    Args:
        shares: (S,) that sum to 1.
        gaps: (S,) about 1, larger for sources where the student is farther from its teachers; NaN where nothing is
            known, which counts as the mean of the others.
        weights: (S,) that sum to 1.
        strength: in [0, 1].
        most: cut-off of the gaps.

    Returns:
        (S,) that sum to 1.
    """
    known = gaps.isfinite()
    gaps = torch.where(known, gaps, gaps[known].mean() if known.any() else torch.ones_like(gaps))
    psi = shares * gaps.clamp(max=most).exp()
    return strength * psi / psi.sum() + (1 - strength) * weights


class Shares:
    """Which shares hold for which batch: a table in shared memory that all workers of a rank read.

    Workers make batches ahead of training, so new shares are written for a batch that nobody has begun; what a batch is
    drawn with depends on its number alone.
    """

    ROWS = 64  # versions that are kept; only the newest few batches are ever asked for

    def __init__(self, shares: Sequence[float]) -> None:
        self._table = torch.zeros(self.ROWS, 1 + len(shares), dtype=torch.float64).share_memory_()
        self._table[:, 0] = -1
        self._table[0] = torch.tensor([0, *shares], dtype=torch.float64)

    def put(self, batch: int, shares: Sequence[float]) -> None:
        """`shares` hold from batch number `batch` on, until others do."""
        oldest = int(self._table[:, 0].argmin())
        self._table[oldest] = torch.tensor([batch, *shares], dtype=torch.float64)

    def at(self, batch: int) -> list[float]:
        """The shares of a batch."""
        first = self._table[:, 0]
        row = int(torch.where((first >= 0) & (first <= batch), first, -1).argmax())
        return self._table[row, 1:].tolist()

    def state(self) -> list[list[float]]:
        """All rows, for a checkpoint."""
        return [row for row in self._table.tolist() if row[0] >= 0]

    def restore(self, rows: Sequence[Sequence[float]]) -> None:
        """Go on from `state`."""
        self._table[:, 0] = -1
        self._table[: len(rows)] = torch.tensor(rows, dtype=torch.float64)


class MixedStream(IterableDataset):
    """Samples of several training streams, each drawn from a source at random by the shares of its batch.

    The source of a reader's n-th sample is a function of seed, start, round, slot, n and the shares alone, and each
    source has an order of its own; so a position is one number a source, and one for all. Samples say their `source`
    (() int64), and their keys begin with its name: two sources may have the same keys.

    Attributes:
        batch: number of the batch that is being made; its shares hold.
        crops: see `TrainStream`.
    """

    def __init__(self, sources: Mapping[str, TrainStream], shares: Shares, *, seed: int, start: int) -> None:
        super().__init__()
        self.names, self.streams = list(sources), list(sources.values())
        self.shares, self.seed, self.start = shares, seed, start
        self.rank, self.world_size = self.streams[0].rank, self.streams[0].world_size
        self.batch = 0
        self.taken = 0
        self._resumed: tuple[int, list[int]] = (-1, [])

    @property
    def round(self) -> int:
        """How often the stream was begun: each of its streams, as often."""
        return self.streams[0].round

    @property
    def drawn(self) -> list[int]:
        """Samples that this process has given, and what its streams have drawn."""
        return [self.taken, *(stream.drawn for stream in self.streams)]

    @property
    def transform(self) -> View | None:
        return self.streams[0].transform

    @property
    def crops(self) -> MultiCrop | None:
        return self.streams[0].crops

    @crops.setter
    def crops(self, crops: MultiCrop | None) -> None:
        for stream in self.streams:
            stream.crops = crops

    @property
    def seen(self) -> int:
        return sum(stream.seen for stream in self.streams)

    @property
    def bad(self) -> int:
        return sum(stream.bad for stream in self.streams)

    @property
    def bad_kinds(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for stream in self.streams:
            for kind, number in stream.bad_kinds.items():
                kinds[kind] = kinds.get(kind, 0) + number
        return kinds

    @property
    def uncached(self) -> int:
        return 0

    def begin(self) -> None:
        """See `TrainStream`."""
        for stream in self.streams:
            stream.begin()

    def resume(self, number: int, drawn: Sequence[Any], turn: int) -> None:
        """See `TrainStream`; `drawn` is that of each reader, 0 for one that has drawn nothing."""
        drawn = [reader or [0] * (1 + len(self.streams)) for reader in drawn]
        self._resumed = number, [reader[0] for reader in drawn]
        for index, stream in enumerate(self.streams):
            stream.resume(number, [reader[1 + index] for reader in drawn], turn)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is None:
            self.begin()
        return self.samples()

    def samples(self) -> Iterator[dict[str, Any]]:
        """The samples of this reader in the round that has begun."""
        slot = self.streams[0].slot()
        number, positions = self._resumed
        self.taken = positions[slot.worker] if number == self.round else 0
        readers = [stream.samples() for stream in self.streams]
        while True:
            bounds = list(accumulate(self.shares.at(self.batch)))
            draw = random.Random(keyed("source", self.seed, self.start, self.round, slot.number, self.taken)).random()
            index = next((i for i, bound in enumerate(bounds) if draw * bounds[-1] < bound), len(bounds) - 1)
            sample = next(readers[index])
            self.taken += 1
            yield {**sample, "key": f"{self.names[index]}/{sample['key']}", "source": torch.tensor(index)}
