"""Features of several models over one split, computed in one pass and kept on disk.

A pass decodes each image once for all models. It goes part by part (`agglom.probes.store`): a pass that was killed goes
on where it was, and several processes (torchrun, SLURM) share the parts out between them, with no other coordination
than the folder. What a model said is kept under a key of the model, its input contract and the data.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.errors import UserError
from agglom.features import Answer, Backbone, Features, ask
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.fingerprint import behaviour_hash, device_of, weights_hash
from agglom.probes.source import Source
from agglom.probes.store import VERSION, Parts, read_array, read_meta

HALF_MAX = 65_504.0  # largest float16
PART = 512  # images; what a crash can cost

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """A model to extract.

    Attributes:
        model: any backbone.
        spatial: whether its feature maps are kept beside its vectors.
        blocks: of how many last blocks the vectors are kept too (ViTs).
        adaptors: teachers through whose adaptors it is looked at as well; the result has a "NAME > TEACHER" for each.
    """

    model: Backbone
    spatial: bool = False
    blocks: int = 0
    adaptors: tuple[str, ...] = ()


def extract(
    models: Mapping[str, Wanted],
    source: Source,
    split: str,
    cache: Path,
    *,
    batch: int = 128,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Targets, dict[str, FeatureSet], set[Path]]:
    """Features of every model over one split, and the split's targets.

    Args:
        models: name -> model. Images go to it as (B, 3, H, W) floats in [0, 1].
        source: the data.
        split: of the data.
        cache: folder of the cache; made where it is missing.
        batch: images a forward pass.
        rank, world_size: of how many processes this is which. Each computes its own parts, and the first then whatever
            still lacks, so that one that died holds nobody up.

    Returns:
        targets, name -> features, and the cache folders that hold them.

    Raises:
        UserError: a field is missing or malformed in a sample, images of different sizes, a size that a model can't
            take, features that are not finite.
    """
    cache.mkdir(parents=True, exist_ok=True)
    first = next(source.samples(split), None)
    if first is None:
        raise UserError(f"{source.root}: split {split!r} has no samples; write it again or choose another split")
    size = (first["image"].shape[-2], first["image"].shape[-1])
    where = f"{source.hash} {split} {source.rows(split)} {source.size}"
    number = source.parts(split, PART)
    wanted = source.split_fields(split)
    targets = Parts(cache / f"targets-{split}-{_key(where, *wanted)}", f"{number}", number)
    places: dict[str, Parts] = {}
    owners: dict[str, str] = {}
    for name, want in models.items():
        key, variant = model_key(want.model, size), f"{want.spatial:d}{want.blocks}-{number}"
        for entry, teacher in ((name, ""), *((f"{name} > {teacher}", teacher) for teacher in want.adaptors)):
            place = cache / f"{_safe(entry)}-{split}-{_key(where, key, teacher)}"
            places[entry], owners[entry] = Parts(place, variant, number), name
    places[""] = targets
    waiting = {e: p for e, p in places.items() if not _complete(e, p.place, models, owners)}
    if waiting:
        job = _Pass(models, owners, waiting, source, split, size, batch)
        job.run([part for part in job.missing() if part % world_size == rank])
        if rank == 0:
            job.run(job.missing()[::-1])  # from the end: those that are still at work come from the front
            for parts in waiting.values():
                parts.join()
        else:
            job.wait()
    del places[""]
    features = {entry: _load_features(parts.place, models[owners[entry]]) for entry, parts in places.items()}
    used = {targets.place, *(parts.place for parts in places.values())}
    return _load_targets(targets.place, wanted), features, used


def model_key(model: Backbone, size: tuple[int, int]) -> str:
    """What a model's answers depend on: weights, input contract and, by one answer, everything else."""
    return f"{weights_hash(model)} {model.input} {behaviour_hash(model, size)}"


class _Pass:
    """Runs models over parts of a split and writes what they say."""

    def __init__(
        self,
        models: Mapping[str, Wanted],
        owners: Mapping[str, str],
        waiting: Mapping[str, Parts],
        source: Source,
        split: str,
        size: tuple[int, int],
        batch: int,
    ) -> None:
        self.models, self.owners, self.waiting = models, owners, waiting
        self.source, self.split, self.size, self.batch = source, split, size, batch

    def missing(self) -> list[int]:
        """Parts that any entry lacks."""
        return sorted({part for parts in self.waiting.values() for part in parts.missing()})

    def wait(self, patience: float = 3600.0) -> None:
        """Until another process has joined the parts."""
        until = time.monotonic() + patience
        while self._open():
            if time.monotonic() > until:
                raise UserError(
                    f"features: rank 0 has not joined them within {patience:.0f} s; did it stop? run it again"
                )
            time.sleep(0.2)

    def _open(self) -> list[str]:
        """Entries that nobody has joined yet."""
        return [e for e, p in self.waiting.items() if not _complete(e, p.place, self.models, self.owners)]

    def _lacking(self, part: int) -> list[str]:
        """Entries that this part is still to be computed for: another process may have done it, or joined them all."""
        return [entry for entry in self._open() if not self.waiting[entry].has(part)]

    def run(self, parts: Sequence[int]) -> None:
        """These parts, decoded a little ahead of the models."""
        started, done = time.monotonic(), 0
        rows = self.source.rows(self.split) * len(parts) // self.source.parts(self.split, PART)
        for part, samples in _ahead(self._read, parts):
            if samples is None:
                continue
            self._part(part, samples)
            done += len(samples)
            _progress(self.split, done, rows, len(self.models), time.monotonic() - started)
        if parts:
            _progress(self.split, done, rows, len(self.models), time.monotonic() - started, last=True)

    def _read(self, part: int) -> list[dict[str, Any]] | None:
        """The samples of a part; None where nobody needs them any more."""
        if not self._lacking(part):
            return None
        samples = list(self.source.samples(self.split, part=(part, self.source.parts(self.split, PART))))
        for sample in samples:
            if tuple(sample["image"].shape[-2:]) != self.size:
                raise UserError(
                    f"{self.source.root}: split {self.split!r}, sample {sample['key']} is "
                    f"{tuple(sample['image'].shape[1:])} pixels and another {self.size}; give them one size, for "
                    "example size: 224"
                )
        return samples

    def _part(self, part: int, samples: list[dict[str, Any]]) -> None:
        entries = self._lacking(part)
        if "" in entries:
            self.waiting[""].write(part, *_targets(samples, self.source, self.split), len(samples))
        found: dict[str, list[Arrays]] = {entry: [] for entry in entries if entry}
        for start in range(0, len(samples), self.batch):
            some = samples[start : start + self.batch]
            images = torch.stack([torch.as_tensor(sample["image"]) for sample in some])
            for name, want in self.models.items():
                mine = [entry for entry in found if self.owners[entry] == name]
                if not mine:
                    continue
                answer = _forward(want, images, name)
                for entry in mine:
                    own = entry == name
                    features = answer.features if own else answer.adaptors[entry.removeprefix(f"{name} > ")]
                    arrays = _vectors(entry, features, want.spatial) | (_blocks(answer.blocks) if own else {})
                    _check_finite(entry, arrays, some)
                    found[entry].append(arrays)
        for entry, batches in found.items():
            names = batches[0] if batches else {}
            joined = {name: np.concatenate([arrays[name] for arrays in batches]) for name in names}
            lists = {"blocks": [self.models[entry].blocks]} if entry in self.models else {}
            self.waiting[entry].write(part, joined, lists, len(samples))


def _ahead(
    read: Callable[[int], list[dict[str, Any]] | None], parts: Sequence[int]
) -> Iterator[tuple[int, list[dict[str, Any]] | None]]:
    """Parts with their samples, two being read in threads (decoders work outside of Python's lock) beside the one."""
    queue: deque[tuple[int, Future[list[dict[str, Any]] | None]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for part in parts:
            queue.append((part, pool.submit(read, part)))
            if len(queue) > 2:
                ready, future = queue.popleft()
                yield ready, future.result()
        while queue:
            ready, future = queue.popleft()
            yield ready, future.result()


def _forward(want: Wanted, images: Tensor, name: str) -> Answer:
    pixels = images.to(device_of(want.model)).float().div_(255)
    try:
        with torch.inference_mode():
            return ask(want.model, pixels, blocks=want.blocks, adaptors=want.adaptors)
    except ValueError as err:  # the input contract speaks of sizes
        raise UserError(f"model {name}: {err}; give it a size that fits") from err


def _vectors(name: str, features: Features, spatial: bool) -> Arrays:
    arrays: Arrays = {}
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
    return arrays


def _blocks(blocks: Sequence[Features]) -> Arrays:
    """Vectors of the last blocks, where they have one width (a CNN's stages don't)."""
    if len({block.spatial.shape[1:] for block in blocks if block.spatial is not None}) > 1:
        return {}
    summaries = [block.summary.float() for block in blocks if block.summary is not None]
    means = [block.spatial.float().mean((2, 3)) for block in blocks if block.spatial is not None]
    arrays: Arrays = {}
    for name, vectors in (("block_summaries", summaries), ("block_means", means)):
        if len(vectors) == len(blocks) > 1:
            arrays[name] = torch.stack(vectors, 1).cpu().numpy()
    return arrays


def _check_finite(name: str, arrays: Arrays, samples: Sequence[dict[str, Any]]) -> None:
    for kind, array in arrays.items():
        bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
        if bad.any():
            key = samples[int(bad.argmax())]["key"]
            raise UserError(f"model {name}: {kind} features are not finite for sample {key}; is it trained?")


def _targets(samples: Sequence[dict[str, Any]], source: Source, split: str) -> tuple[Arrays, dict[str, list[Any]]]:
    fields = source.split_fields(split)
    for sample in samples:
        lacking = next((f for f in fields if sample.get(f) is None), None)
        if lacking:
            raise UserError(f"{source.root}: split {split!r}, sample {sample['key']} has no .{lacking}; write it again")
    arrays: Arrays = {}
    lists: dict[str, list[Any]] = {"keys": [sample["key"] for sample in samples]}
    if "cls" in fields:
        lists["labels"] = [_label(sample, source) for sample in samples]
    if "txt" in fields:
        lists["captions"] = [sample["txt"].splitlines() or [""] for sample in samples]
    if "seg" in fields and samples:
        masks = [np.asarray(sample["seg"], np.uint8) for sample in samples]
        for sample, mask in zip(samples, masks, strict=True):
            if mask.shape != tuple(sample["image"].shape[-2:]):
                raise UserError(
                    f"{source.root}: sample {sample['key']} has a mask of {mask.shape} pixels for an image of "
                    f"{tuple(sample['image'].shape[-2:])}; write it again"
                )
        arrays["masks"] = np.stack(masks)
    return arrays, lists


def _label(sample: dict[str, Any], source: Source) -> int | list[int]:
    label = sample["cls"]
    some = label if isinstance(label, list) else [label]
    if any(isinstance(x, bool) or not isinstance(x, (int, np.integer)) or x < 0 for x in some):
        raise UserError(
            f"{source.root}: sample {sample['key']} has cls {label!r}; valid: one whole number from 0 on, or a list of "
            "such numbers"
        )
    known = source.index.classes
    if known and max(some, default=0) >= len(known):
        raise UserError(
            f"{source.root}: sample {sample['key']} has cls {label!r}; valid: 0 to {len(known) - 1}, for the "
            f"{len(known)} classes that the index names; write it again"
        )
    return [int(x) for x in some] if isinstance(label, list) else int(label)


def _complete(entry: str, place: Path, models: Mapping[str, Wanted], owners: Mapping[str, str]) -> bool:
    """Whether all that is wanted of an entry ("" for the targets) is there."""
    meta = read_meta(place)
    if meta is None or not entry:
        return meta is not None
    want = models[owners[entry]]
    # a model without maps has no mean either; one without blocks of one width has none however often it is asked
    maps = want.spatial and "mean" in meta["arrays"] and "spatial" not in meta["arrays"]
    blocks = entry in models and want.blocks > meta["lists"].get("blocks", [want.blocks])[0]
    return not maps and not blocks


def _load_features(place: Path, want: Wanted) -> FeatureSet:
    meta = read_meta(place)
    assert meta is not None
    names = ["summary", "mean", *(["spatial"] if want.spatial else [])]
    names += ["block_summaries", "block_means"] if want.blocks else []
    arrays = {name: read_array(place, name, meta) for name in names}
    for name in names[-2:] if want.blocks else ():  # an earlier pass may have kept more
        array = arrays[name]
        arrays[name] = None if array is None else array[:, -want.blocks :]
    return FeatureSet(**arrays)


def _load_targets(place: Path, fields: Sequence[str]) -> Targets:
    meta = read_meta(place)
    assert meta is not None
    lists = meta["lists"]
    return Targets(
        lists.get("keys", []),
        _labels(lists.get("labels", [])) if "cls" in fields else None,
        read_array(place, "masks", meta),
        [tuple(some) for some in lists.get("captions", [])] if "txt" in fields else None,
    )


def _labels(labels: Sequence[int | list[int]]) -> np.ndarray:
    """One class an image -> (N,) int64; lists of them -> (N, K) bool."""
    if not any(isinstance(label, list) for label in labels):
        return np.array(labels, np.int64)
    lists = [label if isinstance(label, list) else [label] for label in labels]
    out = np.zeros((len(lists), 1 + max((max(some, default=0) for some in lists), default=0)), bool)
    for row, some in zip(out, lists, strict=True):
        row[some] = True
    return out


def _key(*parts: str) -> str:
    return hashlib.sha256(" ".join([str(VERSION), *parts]).encode()).hexdigest()[:16]


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _progress(split: str, done: int, rows: int, models: int, seconds: float, *, last: bool = False) -> None:
    rate = done / max(seconds, 1e-9)
    line = f"features of {models} model{'s' * (models > 1)}, {split}: {done}/{rows} images, {rate:.0f} images/s"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(line, file=sys.stderr, flush=True)
