"""What reading features from a cache costs: steps from the cache, with the teachers online, and with neither.

    OMP_NUM_THREADS=1 python benchmarks/cache.py [--quick] [--json FILE] [--data SHARDS]

The configuration is the demo's (three embedded teachers, 64 px), its student, heads and losses the same in all three:

* student-only: targets are constants that lie in memory; images are read and cut as in the other two;
* cached: the same, and features of each image's view come from the cache by key, checked byte by byte;
* online: the teachers run on every batch.

Steps are timed in alternating stretches of one process, loader included; the ratio is the median of the stretches'
ratios. Replay is checked on one batch: the real teachers on the batch's own pixels against what the cache brought.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from ladder import machine
from torch import Tensor

from agglom.cache import read_cache_index
from agglom.cache.command import cache_teachers
from agglom.checks import read_yaml
from agglom.data import ShardDataModule, ViewOptions
from agglom.distiller import Distiller
from agglom.features import Features
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent, attend_plainly
from agglom.teachers import CachedTeacher, Teacher, TinyTeacher
from probes import pictures

MOST = 1.05  # of student-only training's time
VIEW = {"scale": (0.4, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5}


class Constant(Teacher):
    """A teacher that costs nothing: the same features for every image."""

    def __init__(self, other: Teacher) -> None:
        super().__init__()
        self.input, self.summary_dim, self.spatial_dim = other.input, other.summary_dim, other.spatial_dim
        self.said: dict[int, Features] = {}

    def forward(self, images: Tensor) -> Features:
        count = len(images)
        if count not in self.said:
            generator = torch.Generator().manual_seed(0)
            grid = self.input.grid((images.shape[-2], images.shape[-1]))
            summary = None if self.summary_dim is None else torch.randn(count, self.summary_dim, generator=generator)
            self.said[count] = Features(summary, torch.randn(count, self.spatial_dim, *grid, generator=generator))
        return self.said[count]


def training(
    teachers: dict[str, Teacher], data: str, batch: int, size: int, cache: Path | None
) -> tuple[Callable[[], None], Distiller]:
    """One optimiser step a call, and the module."""
    torch.manual_seed(0)
    student = TimmStudent(**read_yaml("configs/demo.yaml")[0]["model"]["student"]["init_args"])
    module = Distiller(student, {name: TeacherConfig(encoder) for name, encoder in teachers.items()}, ema_decay=None)
    attend_plainly(module)
    source = ShardDataModule(
        data=data, batch_size=batch, size=size, view=ViewOptions(**VIEW), num_workers=0, val_split=None,
        cache=None if cache is None else str(cache),
    )  # fmt: skip
    source.setup()
    batches: Iterator[dict[str, Any]] = iter(source.train_dataloader())
    optimizer = torch.optim.AdamW(module.trained.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        found = module.on_after_batch_transfer(next(batches), 0)
        frames = module.frames(found["image"])
        targets = module.targets(frames, module.names, cached=found)
        losses = module.losses(module.student(frames.student, module.taps), targets)
        loss = sum(module.heads[name].combine(found).mean() for name, found in losses.items())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()

    return step, module


def replay(data: str, size: int, cache: Path) -> float:
    """Largest difference between cached features of a batch and what the teachers say of its own pixels, relative."""
    source = ShardDataModule(
        data=data, batch_size=16, size=size, view=ViewOptions(**VIEW), num_workers=0, val_split=None, cache=str(cache)
    )
    source.setup()
    (batch,) = islice(iter(source.train_dataloader()), 1)
    images = batch["image"].float() / 255
    worst = 0.0
    for name, parts in batch["features"].items():
        own = TinyTeacher(name)(images)
        for kind, value in parts.items():
            truth = getattr(own, kind)
            worst = max(worst, float((value.float() - truth).norm() / truth.norm()))
    return worst


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", help="shards with images of 64 px; default: some are made up")
    parser.add_argument("--images", type=int, default=1024, help="that are made up")
    parser.add_argument("--quick", action="store_true", help="256 images, fewer and shorter stretches")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10, help="stretches of each kind")
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps of a stretch")
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.rounds, args.steps = min(args.images, 256), min(args.rounds, 7), min(args.steps, 3)
    demo = read_yaml("configs/demo.yaml")[0]
    size, names = demo["data"]["size"], list(demo["model"]["teachers"])
    about = machine("cpu")
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.data = args.data or str(pictures(Path(folder) / "data", args.images))
        cases: dict[str, Callable[[], None]] = {}
        for dtype in ("fp32", "bf16", "int8"):
            cache, started = Path(folder) / dtype, time.perf_counter()
            view = {key: list(value) if isinstance(value, tuple) else value for key, value in VIEW.items()}
            config = {
                **demo,
                "model": {**demo["model"], "remember_teachers": False},  # its views aren't the demo's fixed ones
                "data": {**demo["data"], "data": args.data, "view": view, "val_split": None},
            }
            cache_teachers(config, cache, views=1, dtype=dtype, pool=1, names=None, batch=64)
            seconds = time.perf_counter() - started
            index = read_cache_index(cache)
            files = [index.path(shard) for shards in index.splits.values() for shard in shards]
            images = sum(len(json.loads(_meta(path)["keys"])) for path in files)
            rows.append(
                {
                    "dtype": dtype,
                    "bytes_per_image": sum(path.stat().st_size for path in files) / images,
                    "images_per_second": images / seconds,
                    "replay_error": replay(args.data, size, cache),
                }
            )
            print(
                f"{dtype}: {rows[-1]['bytes_per_image']:.0f} bytes an image, written at "
                f"{rows[-1]['images_per_second']:.0f} images/s, replay differs by {rows[-1]['replay_error']:.1e}"
            )
            cached: dict[str, Teacher] = {name: CachedTeacher(cache=str(cache), name=name) for name in names}
            cases[f"cached {dtype}"], _ = training(cached, args.data, args.batch, size, cache)
        real: dict[str, Teacher] = {name: TinyTeacher(name) for name in names}
        cases["online"], _ = training(real, args.data, args.batch, size, None)
        base, _ = training({n: Constant(t) for n, t in real.items()}, args.data, args.batch, size, None)
        times: dict[str, list[float]] = {name: [] for name in ("student-only", *cases)}
        for step in (base, *cases.values()):
            step()  # the first is slower
        for _ in range(args.rounds):
            for name, step in (("student-only", base), *cases.items()):
                started = time.perf_counter()
                for _ in range(args.steps):
                    step()
                times[name].append((time.perf_counter() - started) / args.steps)
    result = []
    for name in cases:
        ratios = [a / b for a, b in zip(times[name], times["student-only"], strict=True)]
        entry = {
            "name": name,
            "time_ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "step_ms": 1000 * statistics.median(times[name]),
        }
        result.append(entry)
        print(
            f"{name}: {entry['step_ms']:.0f} ms a step, {entry['time_ratio']:.3f}x ({entry['low']:.3f}-"
            f"{entry['high']:.3f}) of student-only training"
        )
    worst = max(entry["time_ratio"] for entry in result if entry["name"] != "online")
    print(f"at most {MOST:.2f}x: {'met' if worst <= MOST else 'MISSED'} ({worst:.3f}x)")
    out = {"machine": about, "caches": rows, "cases": result}
    if args.json is not None:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    return out


def _meta(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        return dict(stored.metadata())


if __name__ == "__main__":
    main()
