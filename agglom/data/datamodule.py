"""Shards to batches for the trainer."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal, Mapping

from lightning.pytorch import LightningDataModule

from agglom.data.batches import Batches
from agglom.data.colours import ColourOptions
from agglom.data.crops import CropOptions, MultiCrop
from agglom.data.index import Index, read_index, validate_layout
from agglom.data.loader import Loader, eval_loader
from agglom.data.mixture import GapOptions, MixedStream, Shares, Source, shares_of
from agglom.data.processes import readers
from agglom.data.ranks import of_all_ranks
from agglom.data.samples import check_fields
from agglom.data.streams import Cached, TrainStream, train_stream
from agglom.data.views import EvalView, TrainView
from agglom.draws import keyed
from agglom.errors import UserError
from agglom.plan import Plan, Stage, slot

log = logging.getLogger("agglom.data")


@dataclass(frozen=True)
class ViewOptions:
    """The random crop, flip and colours of a training image, which student and teachers see; see `TrainView`.

    Args:
        scale: least and greatest part of the image's area that is kept; [1, 1] takes the centre square, no crop.
        ratio: least and greatest width / height of the crop.
        flip: probability of mirroring left and right.
        colours: jitter, grey, blur and solarisation; null for none. On an accelerator they are made there, a batch at a
            time, unless the features come from a cache, whose views must be the same to the last bit.
    """

    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    colours: ColourOptions | None = None

    @property
    def fixed(self) -> bool:
        """Whether an image always looks the same."""
        return self.scale == self.ratio == (1, 1) and self.flip == 0 and self.colours is None

    def view(self, size: int) -> TrainView:
        """What draws such views of `size` x `size` pixels."""
        return TrainView(size=size, scale=self.scale, ratio=self.ratio, flip=self.flip, colours=self.colours)


def view_options(section: Mapping[str, Any]) -> ViewOptions:
    """The options of a configuration's `data.view`, as plain data.

    Raises:
        TypeError, ValueError: it isn't what a configuration may say.
    """

    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    options = tuples(section)
    if options.get("colours") is not None:
        options["colours"] = ColourOptions(**tuples(options["colours"]))
    return ViewOptions(**options)


class ShardDataModule(LightningDataModule):
    """Batches `{"image": uint8 (B, 3, size, size), "key": list[str], ...}` from WebDataset shards.

    The training stream never ends: its length is set in steps (`trainer.max_steps`), and all its batches are full.
    Training batches also say which `part` of the plan they are (`agglom.plan.Part`), and from a step on they may have
    `crops`: `{"global": uint8 (B, G, 3, global_size, global_size), "local": uint8 (B, L, 3, local_size, local_size)}`.

    A resumed run goes on with the very batches that an uninterrupted one would have had. With other readers (workers x
    ranks), shards, seed or shuffle buffer it says so and goes on with an order that it has not seen, not with a
    repetition of its first one. To find its place a reader decodes nothing and reads only the shards of what its
    shuffle buffer held; it takes about a second a million samples that the reader has drawn.

    Args:
        data: shard folder, or an address (`s3://`, `gs://`, `https://`, ...), written by `agglom data ...`.
        batch_size: samples a batch (per rank).
        size: height and width of the images, in pixels.
        train_split: split to train on.
        val_split: split to validate on, or null for no validation.
        fields: what a batch holds besides `key`: any of image, cls, txt, seg, boxes.
        view: random crop and flip in training. Validation takes the centre square.
        num_workers: processes that read and decode (per rank); needs as many training shards as workers x ranks. "auto"
            takes a core each but for one a rank, at most 8; a resume on a machine with others has another order.
        val_samples: validate on the first so many samples only; null for all.
        seed: order and views follow from it.
        shuffle: encoded samples that each worker keeps to draw from.
        max_bad_fraction: unreadable samples are skipped and counted; a greater part of them stops the run.
        prefetch: batches that each worker keeps ready.
        stages: spans of steps with their own sizes and numbers of images; in a YAML they stand at the top level, as
            `stages`. Validation keeps to `size` and `batch_size`.
        margin: pixels that training images have around the view on each side, for crops that are shifted
            (`model.shift`).
        crops: further crops of training images, for self-distillation; null for none. They are drawn apart from `view`,
            which stays the same with and without them.
        sources: name -> shards to train on, each with its share of the samples; left out: `train_split` of `data`.
            Validation is on `data` in any case. Batches then have a `source` (int64 (B,), its place in this table), and
            keys begin with the source's name.
        follow_gap: let the shares follow where the student is farthest from its teachers; null for fixed ones.
        cache: feature cache (`agglom cache`) that holds what teachers say of the training images; null for none. Views
            are then drawn among those that it has, and a batch has their `features` (teacher -> summary, spatial) and
            `cached` (bool a sample).
        cache_missing: what to do with an image whose features are missing, stale or damaged: stop with an "error", or
            "recompute" them with the teacher itself (counted).
    """

    def __init__(
        self,
        *,
        data: str,
        batch_size: int,
        size: int,
        train_split: str = "train",
        val_split: str | None = "val",
        fields: tuple[str, ...] = ("image",),
        view: ViewOptions = ViewOptions(),  # noqa: B008  frozen, and jsonargparse shows its fields
        num_workers: int | Literal["auto"] = "auto",
        val_samples: int | None = None,
        seed: int = 0,
        shuffle: int = 1000,
        max_bad_fraction: float = 0.01,
        prefetch: int = 2,
        stages: list[Stage] | None = None,
        margin: int = 0,
        crops: CropOptions | None = None,
        sources: dict[str, Source] | None = None,
        follow_gap: GapOptions | None = None,
        cache: str | None = None,
        cache_missing: Literal["error", "recompute"] = "error",
    ) -> None:
        super().__init__()
        self.automatic = num_workers == "auto"
        num_workers = 1 if isinstance(num_workers, str) else num_workers  # until `setup` knows the ranks
        limits = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "seed": (seed, 0)}
        for name, (value, least) in {**limits, "margin": (margin, 0)}.items():
            if value < least:
                raise UserError(f"data.{name}: {value}; valid: {least} or more")
        self.data, self.train_split, self.val_split = data, train_split, val_split
        self.batch_size, self.num_workers, self.prefetch = batch_size, num_workers, prefetch
        self.fields, self.val_samples = tuple(fields), val_samples
        self.seed, self.shuffle, self.max_bad_fraction = seed, shuffle, max_bad_fraction
        self.train_view, self.val_view = view.view(size), EvalView(size=size)
        self.plan = Plan(stages or (), size=size, batch_size=batch_size, seed=seed)
        self.margin = margin
        if crops is not None and "image" not in self.fields:
            raise UserError(f"data.fields: {list(self.fields)}; valid: with image, as data.crops needs it; add it")
        self.crops = None if crops is None else MultiCrop(crops)
        self.cache, self.cache_missing = cache, cache_missing
        self.sources, self.follow_gap = dict(sources or {}), follow_gap
        self.weights = shares_of(self.sources)
        if self.sources and cache is not None:
            raise UserError("data.cache: given, but it can't be of several data.sources; valid: null; remove one")
        if follow_gap is not None and len(self.sources) < 2:
            raise UserError("data.follow_gap: given, but there are no two data.sources; valid: null; remove it")
        self.index: Index | None = None
        self._indices: dict[str, Index] = {}
        self.shares = Shares(self.weights)
        self._stream: TrainStream | MixedStream | None = None
        self._samples_before = 0  # when the batches were this many:
        self._batches_before = 0
        self._order_before: dict[str, Any] | None = None
        self._source: Batches | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the index and see that the layout works.

        Raises:
            UserError: see `read_index`, `check_fields`, `validate_layout` and `crops_start`.
        """
        self.index = read_index(self.data)
        if stage in (None, "fit"):
            if self.automatic:
                indices = [(self._index(source.data), source.split) for source in self._training().values()]
                shards = min(sum(s.count > 0 for s in index.splits.get(split, ())) for index, split in indices)
                local = self.trainer.num_devices if self.trainer else 1
                self.num_workers = readers(shards, ranks=self.world_size, local_ranks=local)
            for source in self._training().values():
                index = self._index(source.data)
                problems = validate_layout(
                    index, source.split, num_workers=self.num_workers, world_size=self.world_size
                )
                if problems:
                    raise UserError("; ".join(problems))
                check_fields(index, source.split, self.fields)
            _ = self.crops_start  # an open end is refused here, not in the middle of the loop's own set-up
        if self.val_split is not None:
            check_fields(self.index, self.val_split, self.fields)

    def train_dataloader(self) -> Loader:
        """Endless, shuffled, full batches, each as the plan wants it."""
        order = self._order()
        start = self.samples_seen if order is None else order["start"]
        aside = self._device() != "cpu"
        self.train_view.aside = aside and self.cache is None
        if self.crops is not None:
            self.crops.aside = aside
        if self.sources:
            streams = {name: self._one(source, name, start) for name, source in self.sources.items()}
            before = self._order_before or {}
            if before.get("of", {}).get("data.sources") == self._identity()["data.sources"]:
                self.shares.restore(before["shares"])  # whatever else has changed
            self._stream = MixedStream(streams, self.shares, seed=self.seed, start=start)
        else:
            self._stream = self._one(self._training()[""], "", start)
            self._stream.cached = self._cached(self.train_split)
        self._source = Batches(
            self._stream,
            self.plan,
            micros=self.micros,
            first=self._batches(),
            margin=self.margin,
            crops=self.crops,
            crops_start=self.crops_start or 0,
            workers=max(1, self.num_workers),
            origin=None if order is None else order["origin"],
        )
        if order is not None:
            self._source.resume(order["round"], order["drawn"][self._stream.rank])
        return Loader(
            self._source, num_workers=self.num_workers, prefetch=self.prefetch, pin_memory=self._device() == "cuda"
        )

    def _training(self) -> dict[str, Source]:
        """What is trained on, by name."""
        return self.sources or {"": Source(self.data, split=self.train_split)}

    def _one(self, source: Source, name: str, start: int) -> TrainStream:
        """One source's stream; its order differs from that of another of the same shards."""
        return train_stream(
            self._index(source.data),
            source.split,
            fields=self.fields,
            seed=keyed("source", name, self.seed) % 2**31 if name else self.seed,
            transform=self.train_view,
            shuffle=self.shuffle,
            max_bad_fraction=self.max_bad_fraction,
            start=start,
        )

    def _order(self) -> dict[str, Any] | None:
        """The order of samples to go on with, None where there is none or it would be another one."""
        order = self._order_before
        if order is None or self._batches() != self._batches_before:
            return None
        now = self._identity()
        if changed := [name for name, value in order["of"].items() if value != now.get(name)]:
            log.warning("other %s than before: going on with a new order of the samples", ", ".join(changed))
            return None
        return order

    def _identity(self) -> dict[str, Any]:
        """What the order of samples depends on, besides where it began."""
        shards = [
            [shard.file, shard.count]
            for source in self._training().values()
            for shard in self._index(source.data).shards(source.split)
        ]
        readers = f"{max(1, self.num_workers)} workers x {self.world_size} ranks"
        digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
        return {"shards": digest, "readers": readers, "data.seed": self.seed, "data.shuffle": self.shuffle} | (
            {"data.sources": dict(zip(self.sources, self.weights, strict=True))} if self.sources else {}
        )

    def val_dataloader(self) -> Loader | list[Any]:
        """Each sample once over all ranks, in the order of the shards. Ranks may differ by one batch."""
        if self.val_split is None:
            return []
        return eval_loader(
            self._index(),
            self.val_split,
            fields=self.fields,
            batch_size=self.batch_size,
            transform=self.val_view,
            num_workers=self.num_workers,
            limit=self.val_samples,
            max_bad_fraction=self.max_bad_fraction,
            pin_memory=self._device() == "cuda",
            cached=self._cached(self.val_split),
        )

    def _cached(self, split: str) -> Cached | None:
        """Where a split's features come from, None where the cache has none of it."""
        if self.cache is None:
            return None
        from agglom.cache import FeatureReader, read_cache_index

        reader = FeatureReader(read_cache_index(self.cache))
        return reader.drawn(split, recompute=self.cache_missing == "recompute") if reader.views(split) else None

    @property
    def world_size(self) -> int:
        """Ranks of the trainer, 1 without one."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def micros(self) -> int:
        """Batches of an optimiser step, 1 without a trainer."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def crops_start(self) -> int | None:
        """The first optimiser step whose batches have crops, None where none have.

        Raises:
            UserError: it is a fraction, and there is no trainer with `max_steps`.
        """
        if self.crops is None:
            return None
        return self.crops.options.first_step(self.trainer.max_steps if self.trainer else None)

    @property
    def samples_seen(self) -> int:
        """Samples that training has consumed, over all ranks and resumed runs."""
        return self._samples_before + self._samples(self._batches_before, self._batches())

    def _samples(self, first: int, end: int) -> int:
        """Samples of the batches `first` up to `end`, over all ranks."""
        total, ranks = 0, self.world_size
        while first < end:
            step, micro = divmod(first, self.micros)
            stage = self.plan.stage_at(step)
            # the numbers are the same in all steps of a stage, so whole steps are counted at once
            later = self.plan.starts[stage + 1] if stage + 1 < len(self.plan.starts) else -(-end // self.micros)
            whole = min(later, end // self.micros) - step if micro == 0 else 0
            micros = range(self.micros) if whole > 0 else [micro]
            images = sum(self.plan.part(step, slot(m, r, ranks)).batch_size for m in micros for r in range(ranks))
            total += images * max(whole, 1)
            first += self.micros * whole if whole > 0 else 1
        return total

    @property
    def bad_samples(self) -> int:
        """Training samples that this rank's workers skipped because they could not be read, since the last start."""
        return self._stream.bad if self._stream else 0

    @property
    def bad_kinds(self) -> dict[str, int]:
        """The same by kind (`agglom.data.faults.KINDS`)."""
        return self._stream.bad_kinds if self._stream else {}

    @property
    def uncached_samples(self) -> int:
        """Training samples of this rank without usable features in the cache, since the last start."""
        return self._stream.uncached if self._stream else 0

    def state_dict(self) -> dict[str, Any]:
        """How far training is, and where every reader is in its order; all ranks call it together."""
        batches = self._batches()
        order = self._order_before
        if self._source is not None and self._stream is not None:
            drawn = self._source.position(batches)
            everyone = of_all_ranks(drawn)
            place: dict[str, Any] = {
                "start": self._stream.start,
                "round": self._stream.round,
                "origin": self._source.origin,
            }
            place |= {"shares": self.shares.state()} if self.sources else {}
            order = {"of": self._identity(), **place, "drawn": everyone}
        return {"samples_seen": self.samples_seen, "batches": batches, **({} if order is None else {"order": order})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; where the order can't be the same, with one of its own (their number is in its seed)."""
        self._samples_before, self._batches_before = state_dict["samples_seen"], state_dict["batches"]
        self._order_before = state_dict.get("order")

    def _batches(self) -> int:
        """Batches per rank that the trainer has processed; it restores this number itself, after our state."""
        if self.trainer is None:
            return self._batches_before
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return max(self._batches_before, total.processed)  # type: ignore[attr-defined]

    @property
    def ahead(self) -> int:
        """Batches that may be in the making beyond those that training has had."""
        return max(1, self.num_workers) * self.prefetch + 4  # Lightning fetches one or two itself

    def _index(self, data: str | None = None) -> Index:
        """Of `data`, or of another address."""
        if self.index is None:
            self.index = read_index(self.data)
        if data in (None, self.data):
            return self.index
        if data not in self._indices:
            self._indices[data] = read_index(data)
        return self._indices[data]

    def _device(self) -> str:
        return self.trainer.strategy.root_device.type if self.trainer else "cpu"
