"""Features of several models over one split, computed in one pass and kept on disk.

A pass decodes each image once for all models. What a model said is kept in a folder keyed by the model, its input
contract and the data, so a second run reads it. Folders are written under another name and renamed when complete: a
half-written one is never read, and is removed by the next pass.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError
from agglom.features import Backbone, Features
from agglom.probes.fingerprint import behaviour_hash, data_hash, device_of, weights_hash

VERSION = 1  # of what is stored; older caches are ignored
HALF_MAX = 65_504.0  # largest float16


@dataclass(frozen=True)
class FeatureSet:
    """A model's features over N images.

    Attributes:
        summary: (N, D) float32, or None.
        mean: (N, C) float32, the mean over the feature map's cells, or None.
        spatial: (N, C, H, W) float16, memory-mapped, or None where there is none or it wasn't asked for.
    """

    summary: np.ndarray | None = None
    mean: np.ndarray | None = None
    spatial: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> FeatureSet:
        """The same for some of the images."""
        return FeatureSet(*(None if a is None else a[rows] for a in (self.summary, self.mean, self.spatial)))

    def vectors(self, which: str) -> Tensor:
        """(N, D) float32 of "summary", "mean" or "both" (side by side)."""
        parts = {"summary": [self.summary], "mean": [self.mean], "both": [self.summary, self.mean]}[which]
        return torch.from_numpy(np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1))

    @property
    def choices(self) -> tuple[str, ...]:
        """What `vectors` can give."""
        names = [n for n, a in (("summary", self.summary), ("mean", self.mean)) if a is not None]
        return (*names, "both") if len(names) == 2 else tuple(names)


@dataclass(frozen=True)
class Targets:
    """What is known of N images, the same for every model.

    Attributes:
        keys: N sample keys.
        labels: (N,) int64, or None.
        masks: (N, h, w) uint8, 255 = ignore, or None.
        captions: N strings, or None.
    """

    keys: list[str]
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None
    captions: list[str] | None = None

    def take(self, rows: np.ndarray) -> Targets:
        """The same for some of the images."""
        return Targets(
            [self.keys[i] for i in rows],
            None if self.labels is None else self.labels[rows],
            None if self.masks is None else self.masks[rows],
            None if self.captions is None else [self.captions[i] for i in rows],
        )


@dataclass(frozen=True)
class Source:
    """A shard folder as the probes read it.

    Attributes:
        root: folder or address.
        index: its `agglom.data.Index`.
        hash: of the data.
        size: pixels images are resized (short side) and centre-cropped to, masks with them; None keeps them as they
            are, and then they must all have one size.
        fields: "cls", "seg", "txt" where the data has them and a probe wants them.
        limits: split -> only its first so many samples.
    """

    root: str
    index: Any
    hash: str
    size: int | None = None
    fields: tuple[str, ...] = ()
    limits: Mapping[str, int] | None = None

    @classmethod
    def open(cls, root: Path | str, **options: Any) -> Source:
        """Read the index.

        Raises:
            UserError: no shards there.
        """
        from agglom.data import read_index

        index = read_index(root)
        return cls(root=os.fspath(root), index=index, hash=data_hash(index), **options)

    def rows(self, split: str) -> int:
        """How many samples of the split are read, at most."""
        limit = (self.limits or {}).get(split)
        count = self.index.counts[split]
        return count if limit is None else min(count, limit)

    def split_fields(self, split: str) -> tuple[str, ...]:
        """The wanted fields that this split has."""
        return tuple(f for f in self.fields if f in self.index.fields[split])

    def samples(self, split: str) -> Iterator[dict[str, Any]]:
        """The first samples of the split, in order: `key`, `image` uint8 (3, H, W) and the wanted fields."""
        from agglom.data import eval_stream

        # one reader, whatever the process group: probes run in one process and want every sample, in order
        fields = ("image", *self.split_fields(split))
        for sample in eval_stream(self.index, split, fields=fields, limit=self.rows(split), rank=0, world_size=1):
            yield sample if self.size is None else fit(sample, self.size)


def fit(sample: dict[str, Any], size: int) -> dict[str, Any]:
    """Resize the short side of image (bilinear, antialiased) and mask (nearest) to `size` pixels, crop the centre."""
    out = dict(sample)
    image = torch.as_tensor(sample["image"])[None].float()
    scale = size / min(image.shape[-2:])
    shape = [max(size, round(side * scale)) for side in image.shape[-2:]]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    window = (..., slice(top, top + size), slice(left, left + size))
    image = F.interpolate(image, shape, mode="bilinear", antialias=True)[window]
    out["image"] = image[0].round().clamp(0, 255).to(torch.uint8)
    if "seg" in sample:
        mask = torch.as_tensor(sample["seg"])[None, None].float()
        out["seg"] = F.interpolate(mask, shape, mode="nearest-exact")[window][0, 0].to(torch.uint8)
    return out


@dataclass(frozen=True)
class Wanted:
    """A model to extract, and whether its feature maps are kept beside its vectors."""

    model: Backbone
    spatial: bool = False


def extract(
    models: Mapping[str, Wanted], source: Source, split: str, cache: Path, *, batch: int = 128
) -> tuple[Targets, dict[str, FeatureSet], set[Path]]:
    """Features of every model over one split, and the split's targets.

    Args:
        models: name -> model. Images go to it as (B, 3, H, W) floats in [0, 1].
        source: the data.
        split: of the data.
        cache: folder of the cache; made where it is missing.
        batch: images a forward pass.

    Returns:
        targets, name -> features, and the cache folders that hold them.

    Raises:
        UserError: a field is missing or malformed in a sample, images of different sizes, a size that a model can't
            take, features that are not finite.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    first = next(source.samples(split), None)
    if first is None:
        raise UserError(f"{source.root}: split {split!r} has no samples; write it again or choose another split")
    image_size = tuple(first["image"].shape[-2:])
    where = f"{source.hash} {split} {source.rows(split)} {source.size}"
    targets_at = cache / f"targets-{split}-{_key(where, *source.split_fields(split))}"
    places = {
        name: cache / f"{_safe(name)}-{split}-{_key(where, model_key(want.model, image_size))}"
        for name, want in models.items()
    }
    todo = {name for name, want in models.items() if not _complete(places[name], spatial=want.spatial)}
    if todo or not _complete(targets_at):
        _pass({n: models[n] for n in todo}, source, split, targets_at, places, batch)
    features = {name: _load_features(places[name], spatial=models[name].spatial) for name in models}
    return _load_targets(targets_at), features, {targets_at, *places.values()}


def model_key(model: Backbone, size: tuple[int, int]) -> str:
    """What a model's answers depend on: weights, input contract and, by one answer, everything else."""
    return f"{weights_hash(model)} {model.input} {behaviour_hash(model, size)}"


def _pass(
    models: Mapping[str, Wanted],
    source: Source,
    split: str,
    targets_at: Path,
    places: Mapping[str, Path],
    batch: int,
) -> None:
    rows = source.rows(split)
    writers = {name: _Writer(places[name], rows) for name in models}
    writers[""] = _Writer(targets_at, rows)
    started, done = time.monotonic(), 0
    for samples in _batches(source.samples(split), batch):
        images = _images(samples, source, split)
        _write_targets(writers[""], samples, source, split)
        for name, want in models.items():
            _write_features(writers[name], name, _forward(want.model, images, name), want.spatial, samples)
        done += len(samples)
        _progress(split, done, rows, len(models), time.monotonic() - started)
    for writer in writers.values():
        writer.finish()
    _progress(split, done, rows, len(models), time.monotonic() - started, last=True)


def _images(samples: Sequence[dict[str, Any]], source: Source, split: str) -> Tensor:
    images = [torch.as_tensor(sample["image"]) for sample in samples]
    odd = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{source.root}: split {split!r}, sample {samples[odd]['key']} is {tuple(images[odd].shape[1:])} pixels and"
            f" another {tuple(images[0].shape[1:])}; give the probes one size, for example size: 224"
        )
    return torch.stack(images)


def _forward(model: Backbone, images: Tensor, name: str) -> Features:
    pixels = images.to(device_of(model)).float().div_(255)
    try:
        with torch.inference_mode():
            return model(pixels)
    except ValueError as err:  # the input contract speaks of sizes
        raise UserError(f"model {name}: {err}; give the probes a size that fits") from err


def _write_features(
    writer: _Writer, name: str, features: Features, spatial: bool, samples: Sequence[dict[str, Any]]
) -> None:
    arrays: dict[str, np.ndarray] = {}
    if features.summary is not None:
        arrays["summary"] = features.summary.float().cpu().numpy()
    if features.spatial is not None:
        maps = features.spatial.float()
        arrays["mean"] = maps.mean((2, 3)).cpu().numpy()
        if spatial:
            if maps.abs().amax() > HALF_MAX:
                raise UserError(
                    f"model {name}: feature maps reach {maps.abs().amax():.3g}, beyond float16; rescale them"
                )
            arrays["spatial"] = maps.half().cpu().numpy()
    for kind, array in arrays.items():
        bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
        if bad.any():
            key = samples[int(bad.argmax())]["key"]
            raise UserError(f"model {name}: {kind} features are not finite for sample {key}; is it trained?")
    writer.write(arrays)


def _write_targets(writer: _Writer, samples: Sequence[dict[str, Any]], source: Source, split: str) -> None:
    fields = source.split_fields(split)
    for sample in samples:
        lacking = next((f for f in fields if sample.get(f) is None), None)
        if lacking:
            raise UserError(f"{source.root}: split {split!r}, sample {sample['key']} has no .{lacking}; write it again")
    arrays = {}
    if "cls" in fields:
        arrays["labels"] = np.array([_label(sample, source) for sample in samples], np.int64)
    if "seg" in fields:
        masks = [np.asarray(sample["seg"], np.uint8) for sample in samples]
        for sample, mask in zip(samples, masks, strict=True):
            if mask.shape != tuple(sample["image"].shape[-2:]):
                raise UserError(
                    f"{source.root}: sample {sample['key']} has a mask of {mask.shape} pixels for an image of "
                    f"{tuple(sample['image'].shape[-2:])}; write it again"
                )
        arrays["masks"] = np.stack(masks)
    writer.write(arrays, keys=[s["key"] for s in samples], captions=[s["txt"] for s in samples if "txt" in fields])


def _label(sample: dict[str, Any], source: Source) -> int:
    label = sample["cls"]
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
        raise UserError(f"{source.root}: sample {sample['key']} has cls {label!r}; valid: one whole number from 0 on")
    return int(label)


class _Writer:
    """Rows into .npy files of one folder, which appears under its name when complete."""

    def __init__(self, place: Path, rows: int) -> None:
        self.place, self.rows, self.done = place, rows, 0
        self.folder = place.parent / f".partial-{os.getpid()}-{place.name}"
        self.folder.mkdir()
        self.arrays: dict[str, np.memmap] = {}
        self.lists: dict[str, list[str]] = {}

    def write(self, arrays: Mapping[str, np.ndarray], **lists: list[str]) -> None:
        count = max([len(a) for a in arrays.values()] + [len(x) for x in lists.values()], default=0)
        for name, array in arrays.items():
            if name not in self.arrays:
                self.arrays[name] = np.lib.format.open_memmap(
                    self.folder / f"{name}.npy", mode="w+", dtype=array.dtype, shape=(self.rows, *array.shape[1:])
                )
            if array.shape[1:] != self.arrays[name].shape[1:]:
                raise UserError(
                    f"{self.place.name}: {name} of shape {array.shape[1:]} after {self.arrays[name].shape[1:]}"
                )
            self.arrays[name][self.done : self.done + count] = array
        for name, values in lists.items():
            self.lists.setdefault(name, []).extend(values)
        self.done += count

    def finish(self) -> None:
        for array in self.arrays.values():
            array.flush()
        meta = {"version": VERSION, "rows": self.done, "arrays": sorted(self.arrays), "lists": self.lists}
        (self.folder / "meta.json").write_text(json.dumps(meta))
        self.arrays = {}
        if self.place.exists():  # complete, but without the feature maps that are wanted now
            shutil.rmtree(self.place)
        os.replace(self.folder, self.place)


def _complete(place: Path, *, spatial: bool = False) -> bool:
    try:
        meta = json.loads((place / "meta.json").read_text())
    except (OSError, ValueError):
        return False
    wants_maps = spatial and "mean" in meta["arrays"]  # a model without maps has no mean either
    return meta["version"] == VERSION and (not wants_maps or "spatial" in meta["arrays"])


def _load(place: Path, name: str, meta: Mapping[str, Any]) -> np.ndarray | None:
    if name not in meta["arrays"]:
        return None
    mapped = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)[: meta["rows"]]
    return mapped if name in ("spatial", "masks") else np.array(mapped)


def _load_features(place: Path, *, spatial: bool) -> FeatureSet:
    meta = json.loads((place / "meta.json").read_text())
    loaded = FeatureSet(*(_load(place, name, meta) for name in ("summary", "mean", "spatial")))
    return loaded if spatial else replace(loaded, spatial=None)


def _load_targets(place: Path) -> Targets:
    meta = json.loads((place / "meta.json").read_text())
    labels, masks = _load(place, "labels", meta), _load(place, "masks", meta)
    return Targets(meta["lists"]["keys"], labels, masks, meta["lists"]["captions"] or None)


def _batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(samples)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _key(*parts: str) -> str:
    return hashlib.sha256(" ".join([str(VERSION), *parts]).encode()).hexdigest()[:16]


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _progress(split: str, done: int, rows: int, models: int, seconds: float, *, last: bool = False) -> None:
    rate = done / max(seconds, 1e-9)
    line = f"features of {models} models, {split}: {done}/{rows} images, {rate:.0f} images/s"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(line, file=sys.stderr, flush=True)
