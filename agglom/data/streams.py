"""Samples out of shards: endless and shuffled for training, finite and exactly once for evaluation.

Who reads what. A *slot* is one loader worker of one rank.

* Training: all slots know the same random order of the shards, a new one each pass, and slot k of n takes every n-th
  shard of it. No shard is read twice in a pass, over passes every slot sees everything, and no slot waits for
  another. It needs at least one shard a slot (`agglom.data.validate_layout`).
* Evaluation: the samples are numbered through the split, and slot k of n takes the k-th of n equal ranges, wherever
  shards begin and end. Any number of shards will do, the counts of two slots differ by at most one, and all
  samples are seen exactly once.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_left
from itertools import count, islice
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from agglom.data.addresses import open_read
from agglom.data.crops import MultiCrop
from agglom.data.faults import KINDS, BadSample, Fault, printable
from agglom.data.index import Index, ShardInfo, read_index
from agglom.data.pictures import Broken
from agglom.data.ranks import Slot, distributed, slot_of
from agglom.data.reading import ShardReader
from agglom.data.samples import check_fields, decode_sample
from agglom.data.views import View, Window
from agglom.draws import keyed
from agglom.errors import UserError

log = logging.getLogger("agglom.data")

MAX_WORKERS = 256  # rows of the table of counts
SHOWN = 3  # reports of bad samples of a kind that a worker makes before it only counts
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


# an encoded sample and a generator -> the window of one of its cached views and that view's features; None and zeros
# where it has none
Cached = Callable[[Mapping[str, Any], "torch.Generator | None"], "tuple[Window | None, dict[str, dict[str, Tensor]]]"]


def train_stream(
    root: str | Path | Index,
    split: str,
    *,
    fields: Sequence[str] = ("image",),
    seed: int = 0,
    transform: View | None = None,
    shuffle: int = 1000,
    max_bad_fraction: float = 0.01,
    start: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
) -> TrainStream:
    """An endless, shuffled stream of decoded samples; every rank and worker reads other shards.

    A JPEG much larger than the view is decoded at half, a quarter or an eighth of its size, as far as the window keeps
    at least the view's pixels; windows don't depend on it. With masks, boxes, multi-crops or cached features, as in
    evaluation, it is decoded in full.

    Args:
        root: shard folder or address, or its index.
        split: for example "train".
        fields: what a sample should hold: any of image, cls, txt, seg, boxes.
        seed: order and views follow from it, the rank, the worker, `start` and how often the stream was begun.
        transform: applied to image, mask and boxes together.
        shuffle: encoded samples that a worker keeps to draw from.
        max_bad_fraction: samples that may be unreadable. They are skipped and counted; more stop the run.
        start: how far training is (samples or steps); after a resume it gives an order that was not seen before.
        rank, world_size: default: this process's.

    Raises:
        UserError: see `read_index` and `check_fields`; while reading, too many bad samples.
    """
    return TrainStream(
        root, split, fields, transform, max_bad_fraction, rank, world_size, seed=seed, shuffle=shuffle, start=start
    )


def eval_stream(
    root: str | Path | Index,
    split: str,
    *,
    fields: Sequence[str] = ("image",),
    transform: View | None = None,
    max_bad_fraction: float = 0.01,
    limit: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> EvalStream:
    """A finite stream, in the order of the shards: each sample once over all ranks and workers.

    Args:
        root, split, fields, transform, max_bad_fraction, rank, world_size: see `train_stream`.
        limit: only the first so many samples of the split.

    Raises:
        UserError: see `read_index` and `check_fields`; while reading, too many bad samples.
    """
    return EvalStream(root, split, fields, transform, max_bad_fraction, rank, world_size, limit=limit)


class Stream(IterableDataset):
    """What both streams share: place, decoding, and the account of bad samples (in shared memory over workers)."""

    def __init__(
        self,
        root: str | Path | Index,
        split: str,
        fields: Sequence[str],
        transform: View | None,
        max_bad_fraction: float,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        super().__init__()
        self.index = root if isinstance(root, Index) else read_index(root)
        check_fields(self.index, split, fields)
        self.split, self.fields, self.transform = split, tuple(fields), transform
        self.max_bad_fraction = max_bad_fraction
        here = distributed()
        self.rank = here[0] if rank is None else rank
        self.world_size = here[1] if world_size is None else world_size
        self.shards = [shard for shard in self.index.shards(split) if shard.count]
        self.total = sum(shard.count for shard in self.shards)
        if not self.total:
            raise UserError(f"{self.index.root}: split {split!r} has no samples")
        # a row a worker: samples read, samples without cached features; bad samples and reports of them, by kind
        self._counts = torch.zeros(MAX_WORKERS, 2, dtype=torch.int64).share_memory_()
        self._bad_counts = torch.zeros(MAX_WORKERS, len(KINDS), 2, dtype=torch.int64).share_memory_()
        self.cached: Cached | None = None

    @property
    def seen(self) -> int:
        """Samples that this rank's workers have read, bad ones included."""
        return int(self._counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """Samples that this rank's workers had to skip."""
        return int(self._bad_counts[..., 0].sum())

    @property
    def bad_kinds(self) -> dict[str, int]:
        """The same by kind (`agglom.data.faults.KINDS`), without those that there are none of."""
        return _by_kind(self._bad_counts[..., 0].sum(0))

    @property
    def uncached(self) -> int:
        """Samples whose cached features were missing or stale."""
        return int(self._counts[:, 1].sum())

    def slot(self) -> Slot:
        """This process's place among all readers."""
        return slot_of(self.rank, self.world_size)

    def _raw(self, shard: ShardInfo, stop: int, damage: list[Fault]) -> Iterator[dict[str, Any]]:
        """The samples of one shard before position `stop`, still encoded; what broke the tar goes into `damage`."""
        url = self.index.url(shard)
        try:
            with open_read(url) as stream:
                reader = ShardReader(stream, url)
                for position, raw in enumerate(reader):
                    if position >= shard.count:
                        raise UserError(
                            f"{url}: holds more than the {shard.count} samples of the index; `agglom data verify` says "
                            "which, or write it anew"
                        )
                    if position >= stop:
                        break
                    yield raw
                if reader.damage:
                    damage.append(reader.damage)
        except UserError:
            raise
        except Exception as err:  # open, network, exit status of a pipe
            damage.append(unreadable(err))

    def _decode(self, raw: dict[str, Any], slot: Slot, *, whole: bool = True) -> dict[str, Any] | None:
        """The decoded sample (see `decode_sample`), or None for a bad one."""
        try:
            return decode_sample(raw, self.fields, index=self.index, whole=whole)
        except BadSample as err:
            self._bad(raw, slot, err.fault)
            return None

    def _view(
        self, sample: dict[str, Any], raw: dict[str, Any], slot: Slot, generator: torch.Generator | None
    ) -> dict[str, Any] | None:
        """The sample as it is seen, or None for one whose image turns out to be bad."""
        row = self._counts[slot.worker % MAX_WORKERS]
        if self.transform is None:
            seen = {**sample, "image": sample["image"].contiguous()} if "image" in sample else sample
        elif self.cached is None:
            try:
                seen = self.transform.sample(sample, generator)
            except Broken as err:
                self._bad(raw, slot, Fault("bad image", str(err)))
                return None
        else:
            window, features = self.cached(raw, generator)
            row[1] += window is None
            seen = {
                **self.transform.sample(sample, generator, window), "features": features, "cached": window is not None
            }  # fmt: skip
        row[0] += 1
        return seen

    def _bad(self, raw: dict[str, Any], slot: Slot, fault: Fault) -> None:
        where = f"{raw['__url__']}: sample {raw['__key__']}"
        self._account(slot, 1, fault.kind, f"{where}: {fault.kind} ({fault.detail})")

    def _account(self, slot: Slot, number: int, kind: str, reason: str) -> None:
        worker = slot.worker % MAX_WORKERS
        counts = self._bad_counts[worker]
        self._counts[worker, 0] += number
        counts[_NUMBER[kind]] += torch.tensor([number, 1])
        seen, bad, reason = int(self._counts[worker, 0]), int(counts[:, 0].sum()), printable(reason)
        if bad > self.max_bad_fraction * max(seen, self.total / slot.total):
            kinds = ", ".join(f"{kind} {count}" for kind, count in _by_kind(counts[:, 0]).items())
            raise UserError(
                f"{bad} of {seen} samples read are bad ({kinds}), more than max_bad_fraction {self.max_bad_fraction:g} "
                f"of a pass; `agglom data verify` lists them; last: {reason}"
            )
        if counts[_NUMBER[kind], 1] <= SHOWN:
            log.warning("skipped %d bad sample%s: %s", number, "s" * (number > 1), reason)

    def _short(self, slot: Slot, shard: ShardInfo, missing: int, damage: list[Fault]) -> None:
        """A shard that ended before its time."""
        if missing > 0:
            fault = damage[0] if damage else Fault("wrong count", f"{missing} fewer than the index says")
            where = self.index.url(shard)
            self._account(
                slot, missing, fault.kind, f"{where}: {missing} samples can't be read: {fault.kind} ({fault.detail})"
            )


def unreadable(err: Exception) -> Fault:
    """What it means for a shard that it can't be opened."""
    said = f"{type(err).__name__}: {getattr(err, 'strerror', None) or err}"
    return Fault("missing shard" if isinstance(err, FileNotFoundError) else "unreadable shard", printable(said))


def _by_kind(counts: Tensor) -> dict[str, int]:
    return {kind: number for kind, number in zip(KINDS, counts.tolist(), strict=True) if number}


class TrainStream(Stream):
    """See `train_stream`.

    A reader's order is a function of seed, `start`, round and its slot alone, and so are the view and the crops of its
    n-th draw: they don't depend on what was broken, or on how samples became batches. What can't be read has its place
    in the order and is left out when its turn comes. So a position is one number a reader, and `resume` goes on there.

    Attributes:
        crops: what makes `crops` of each decoded image, beside the transformed one; None (at first) for no crops. May
            change between two samples.
        drawn: places of the order that this process has drawn, those before a `resume` and unreadable ones included.
    """

    def __init__(self, *common: Any, seed: int, shuffle: int, start: int) -> None:
        super().__init__(*common)
        if min(seed, start, shuffle) < 0:
            raise UserError(f"seed {seed}, start {start}, shuffle {shuffle}: valid: 0 or more")
        self.seed, self.shuffle, self.start = seed, shuffle, start
        self.crops: MultiCrop | None = None
        self.drawn = 0
        self._round = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._resumed: tuple[int, list[int]] = (-1, [])  # a round, and where its readers begin
        self._turn = 0

    @property
    def round(self) -> int:
        """How often the stream was begun."""
        return int(self._round)

    def begin(self) -> None:
        """Called before workers start to read: the next order is another one (`Loader` does it)."""
        self._round += 1

    def resume(self, number: int, drawn: Sequence[int], turn: int) -> None:
        """Let the next beginning be round `number` again, in its middle.

        Nothing is decoded on the way, and only what the shuffle buffers held is read again: the shards of the last few
        thousand samples. Finding the place costs about a second a million samples that a reader has drawn.

        Args:
            number: the round.
            drawn: what each reader of this rank has drawn of it.
            turn: which reader is the first worker now.
        """
        self._round.fill_(number - 1)
        self._resumed, self._turn = (number, list(drawn)), turn

    def slot(self) -> Slot:
        return slot_of(self.rank, self.world_size, self._turn if self.round == self._resumed[0] else 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is None:
            self.begin()
        return self.samples()

    def samples(self) -> Iterator[dict[str, Any]]:
        """The samples of this reader in the round that has begun."""
        slot = self.slot()
        if len(self.shards) < slot.total:
            raise UserError(
                f"{self.index.root}: split {self.split!r} has {len(self.shards)} shards for {slot.total} readers"
                " (workers x ranks); set data.num_workers lower or write more shards"
            )
        here = [self.seed, self.start, self.round]
        number, positions = self._resumed
        self.drawn = positions[slot.worker] if number == self.round else 0
        # crops have their own, so that the views stay what they are without crops
        view_generator, crop_generator = torch.Generator(), torch.Generator()
        for raw in self._shuffled(slot, here, self.drawn):
            draw = (*here, slot.number, self.drawn)
            self.drawn += 1
            if raw is None or (sample := self._decode(raw, slot, whole=self._whole())) is None:
                continue
            crops = {}
            if self.crops:
                crops = {"crops": self.crops(sample["image"], crop_generator.manual_seed(keyed("crops", *draw)))}
            if (seen := self._view(sample, raw, slot, view_generator.manual_seed(keyed("view", *draw)))) is not None:
                yield {**seen, **crops}

    def _whole(self) -> bool:
        """Whether anything but one view looks at the image: what lies on its pixels, crops, cached features of it."""
        view_only = self.transform is not None and self.cached is None and self.crops is None
        return not view_only or "seg" in self.fields or "boxes" in self.fields

    def _shuffled(self, slot: Slot, here: list[int], skip: int) -> Iterator[dict[str, Any] | None]:
        """What the reader draws from draw number `skip` on; None for what can't be read.

        Each draw takes one of a full buffer at random, and the next of the endless sequence takes its place.
        """
        # a buffer longer than a pass would only read everything several times before the first sample
        size = max(1, min(self.shuffle, self.total // slot.total))
        randrange = random.Random(_seed(here, 1, slot.number)).randrange
        places = list(range(size))
        for head in range(size, size + skip):
            at = randrange(size)
            places[at] = places[-1]
            places[-1] = head
        entries = self._entries(slot, here, skip, size + skip, sorted(places))
        held = dict(islice(entries, size))
        buffer = [held.pop(place) for place in places]
        while True:
            at = randrange(size)
            yield buffer[at]
            buffer[at] = buffer[-1]
            buffer[-1] = next(entries)[1]

    def _entries(
        self, slot: Slot, here: list[int], skip: int, head: int, held: list[int]
    ) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(place, sample or None) of the reader's endless sequence of shards: the `held` places, then all from `head`.

        Args:
            skip: what lies before is known from an earlier run and not counted (as bad, for example) again.
            head: greater than all of `held`, which are in order.
        """
        place, wanted = 0, set(held)  # of the shard's first sample
        for number in count():
            order = list(self.shards)
            random.Random(_seed(here, 2, number)).shuffle(order)  # the same for all slots
            found, begun = False, place
            for shard in order[slot.number :: slot.total]:
                first, place = place, place + shard.count
                stop = shard.count
                if place <= head:  # up to the last that is held
                    stop = max(0, held[last] - first + 1) if (last := bisect_left(held, place) - 1) >= 0 else 0
                if stop == 0:
                    continue
                damage: list[Fault] = []
                position = -1
                for position, raw in enumerate(self._raw(shard, stop, damage)):
                    if first + position >= head or first + position in wanted:
                        yield first + position, raw
                if place > skip:
                    self._short(slot, shard, stop - 1 - position, damage)
                for lost in range(first + position + 1, first + stop):
                    if lost >= head or lost in wanted:
                        yield lost, None
                found |= position >= 0
            if not found and begun >= skip:
                raise UserError(f"{self.index.root}: split {self.split!r}: nothing could be read in a whole pass")


def _seed(*parts: Any) -> int:
    """A seed from numbers (and lists of them) that differs wherever one of them does."""
    return int(np.random.SeedSequence(np.hstack(parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EvalStream(Stream):
    """See `eval_stream`."""

    def __init__(self, *common: Any, limit: int | None) -> None:
        super().__init__(*common)
        if limit is not None and limit < 1:
            raise UserError(f"limit: {limit}; valid: a positive number of samples")
        self.total = min(self.total, limit or self.total)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, sample in self.pairs():
            yield sample

    def pairs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each sample as it is stored and as it is seen."""
        slot = self.slot()
        begin, end = (self.total * n // slot.total for n in (slot.number, slot.number + 1))
        offset = 0  # of the shard's first sample
        for shard in self.shards:
            first, stop = max(begin - offset, 0), min(end - offset, shard.count)
            offset += shard.count
            if first >= stop:
                continue
            damage: list[Fault] = []
            position = -1
            for position, raw in enumerate(self._raw(shard, stop, damage)):
                if position < first or (sample := self._decode(raw, slot)) is None:
                    continue
                if (seen := self._view(sample, raw, slot, None)) is not None:
                    yield raw, seen
            self._short(slot, shard, stop - max(first, position + 1), damage)
