"""Teachers over shards, once: one file of features a shard, in any order, by any number of processes."""

from __future__ import annotations

import json
import logging
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor

from agglom.cache.layout import DTYPES, SEEN, CacheIndex, crc, read_cache_index
from agglom.data.index import Index, ShardInfo
from agglom.data.ranks import distributed
from agglom.data.samples import image_bytes
from agglom.data.streams import EvalStream
from agglom.data.views import EvalView, View
from agglom.draws import generator
from agglom.errors import UserError
from agglom.features import pooled
from agglom.looking import look
from agglom.teachers import Teacher
from agglom.whole import whole

log = logging.getLogger("agglom.cache")

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be computed.

    Attributes:
        index: of the cache, as it will be written.
        data: the shards.
        teachers: name -> encoder.
        train: how training views are drawn; the first split has them.
        batch: views a forward pass.
        max_bad_fraction: unreadable samples that are put up with; they have no features.
    """

    index: CacheIndex
    data: Index
    teachers: Mapping[str, Teacher]
    train: View
    batch: int = 64
    max_bad_fraction: float = 0.01

    def views(self, split: str) -> tuple[View, int]:
        """How a split's views are drawn, and how many a sample has."""
        first = split == next(iter(self.index.splits))
        return (self.train, self.index.views) if first else (EvalView(size=self.index.size), 1)


def write_cache(plan: Plan) -> list[Path]:
    """Compute whatever files lack; in a process group each rank does its share.

    Files appear whole, under their name, so that a killed run is continued by running it again. A view follows from
    seed, key and number alone and a batch never spans two shards, so it doesn't matter who computes a file or when.

    Returns:
        the files of this process, new and old.

    Raises:
        UserError: the folder holds another cache, or can't be written; too many unreadable samples.
    """
    rank, world = distributed()
    try:
        old = read_cache_index(plan.index.root)
    except UserError:
        if (Path(plan.index.root) / "cache.json").exists():
            raise
    else:
        if lines := old.differences(plan.index):
            raise UserError(f"{plan.index.root} holds another cache: {'; '.join(lines)}; choose another --out")
    if rank == 0:
        plan.index.write()
    jobs = [(split, shard) for split in plan.index.splits for shard in plan.data.shards(split) if shard.count][
        rank::world
    ]
    written, started, done = [], time.monotonic(), 0
    total = sum(shard.count for _, shard in jobs)
    for split, shard in jobs:
        path = plan.index.path(shard.file)
        if not path.is_file():
            _write_file(plan, split, shard, path, rank)
        written.append(path)
        done += shard.count
        log.info("%s: %d of %d samples, %.0f s", path.name, done, total, time.monotonic() - started)
    return written


def dry_run(plan: Plan, *, samples: int = 64) -> dict[str, float]:
    """What the whole cache will take, from a timed sample.

    Returns:
        bytes_per_image, gigabytes, seconds (of one process), images_per_second, gigabytes_in_memory (of the largest
        shard, which is what a process needs beside the teachers).
    """
    split = next(iter(plan.index.splits))
    shard = next(shard for shard in plan.data.shards(split) if shard.count)
    some = list(islice(_records(plan, split, shard), 1 + min(samples, shard.count)))
    list(_computed(plan, iter(some[:1])))  # the first pass is slower
    started = time.monotonic()
    done = list(_computed(plan, iter(some[1:] or some)))
    seconds = (time.monotonic() - started) / len(done)
    size = sum(x.numel() for x in done[0]["features"].values()) // max(1, len(done[0]["windows"]))
    each = size * DTYPES[plan.index.dtype].itemsize
    counts = {name: sum(s.count for s in plan.data.shards(name)) * plan.views(name)[1] for name in plan.index.splits}
    views = sum(counts.values())
    largest = max(s.count * plan.views(name)[1] for name in plan.index.splits for s in plan.data.shards(name))
    per_view = seconds / plan.index.views
    return {
        "bytes_per_image": float(each * plan.index.views),
        "gigabytes": each * views / 1e9,
        "seconds": per_view * views,
        "images_per_second": 1 / seconds,
        "gigabytes_in_memory": size * (4 if plan.index.dtype == "int8" else DTYPES[plan.index.dtype].itemsize)
        * largest / 1e9,
    }  # fmt: skip


def _write_file(plan: Plan, split: str, shard: ShardInfo, path: Path, rank: int) -> None:
    records = list(_computed(plan, _records(plan, split, shard)))
    tensors: dict[str, Tensor] = {}
    if records:
        drawn = [record["windows"] for record in records]
        tensors["windows"] = torch.tensor([[[*map(int, w[:5])] for w in row] for row in drawn], dtype=torch.int32)
        if drawn[0][0].colours is not None:
            tensors["colours"] = torch.tensor([[w.colours for w in row] for row in drawn], dtype=torch.float32)
        tensors["image_crc"] = torch.tensor([record["image_crc"] for record in records], dtype=torch.int64)
        for name in list(records[0]["features"]):
            stacked = torch.stack([record["features"].pop(name) for record in records]).contiguous()
            tensors |= _quantised(name, stacked) if plan.index.dtype == "int8" else {name: stacked}
        names = [name for name in SEEN if name in tensors]
        names += [name for name in sorted(tensors) if "/" in name and not name.endswith("/scale")]
        views = range(len(drawn[0]))
        checks = [[crc(tensors[name][n, v] for name in names) for v in views] for n in range(len(records))]
        tensors["crc"] = torch.tensor(checks, dtype=torch.int64)
    about = {"keys": json.dumps([record["key"] for record in records]), **plan.index.about()}
    try:
        with whole(path, owner=f"rank{rank}") as scratch:
            save_file(tensors, scratch, metadata=about)
            # safetensors keeps a file to its owner; who may read the folder may read this
            scratch.chmod(path.parent.stat().st_mode & 0o666)
    except OSError as err:
        raise UserError(f"{path}: can't be written ({err.strerror or err}); choose another --out") from err


def _records(plan: Plan, split: str, shard: ShardInfo) -> Iterator[Record]:
    """key, image_crc, windows and views (V, 3, size, size) uint8 of each readable sample of a shard."""
    view, number = plan.views(split)
    one = Index(**{**vars(plan.data), "splits": {split: (shard,)}})
    stream = EvalStream(one, split, ("image",), None, plan.max_bad_fraction, 0, 1, limit=None)
    for raw, sample in stream.pairs():
        image = sample["image"]
        windows = [
            view.window(image.shape[-2], image.shape[-1], generator(plan.index.seed, sample["key"], number_of_view))
            for number_of_view in range(number)
        ]
        yield {
            "key": sample["key"],
            "image_crc": zlib.crc32(image_bytes(raw)),
            "windows": windows,
            "views": torch.stack([view.cut(image, window) for window in windows]),
        }


def _computed(plan: Plan, records: Iterator[Record]) -> Iterator[Record]:
    """The records with `features` (TEACHER/KIND -> (V, ...)) in the place of their views."""
    while some := list(islice(records, plan.batch)):
        counts = [len(record["views"]) for record in some]
        found = _features(plan, torch.cat([record.pop("views") for record in some]))
        parts = {name: value.split(counts) for name, value in found.items()}
        for position, record in enumerate(some):
            record["features"] = {name: part[position] for name, part in parts.items()}
            yield record


@torch.inference_mode()
def _features(plan: Plan, views: Tensor) -> dict[str, Tensor]:
    """TEACHER/KIND -> what every teacher says of views (B, 3, size, size) uint8, in the stored dtype (int8: fp32)."""
    dtype = torch.float32 if plan.index.dtype == "int8" else DTYPES[plan.index.dtype]
    size = (plan.index.size, plan.index.size)
    out: dict[str, list[Tensor]] = {}
    for chunk in views.split(plan.batch):
        for name, teacher in plan.teachers.items():
            images = chunk.to(teacher.device).float().div_(255)
            found = look(teacher, teacher.input, images, resolution=size, grid=plan.index.grid)
            for kind, value in pooled(found, plan.index.pool)._asdict().items():
                if value is None:
                    continue
                stored = value.to(dtype)
                if not stored.isfinite().all():
                    raise UserError(
                        f"teacher {name}: {kind} features beyond {plan.index.dtype}; take --dtype bf16 or fp32"
                    )
                out.setdefault(f"{name}/{kind}", []).append(stored.cpu())
    return {name: torch.cat(parts) for name, parts in out.items()}


def _quantised(name: str, values: Tensor) -> dict[str, Tensor]:
    """(N, V, C, ...) float32 -> int8 with one scale a channel, such that its largest magnitude is 127 steps."""
    over: Sequence[int] = [dim for dim in range(values.ndim) if dim != 2]
    scale = values.abs().amax(tuple(over)).clamp_min(1e-12) / 127
    steps = (values / scale.view(-1, *[1] * (values.ndim - 3))).round_().to(torch.int8)
    return {name: steps, f"{name}/scale": scale}
