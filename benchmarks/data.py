"""How fast JPEGs are decoded and augmented: agglom's loader against ImageFolder and DataLoader with torchvision v2.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--quick] [--json FILE] [--side 500]

The pictures are made here (smooth colours under a noisy texture, quality 90, 4:2:0), once as files in folders and once
as shards. Both sides crop at random (area 0.4 to 1, aspect 3/4 to 4/3), resize to 224 px with an antialiased bicubic
filter, flip half of them and give uint8 batches of 32. They are timed with one worker, from the first batch to the
last, and without, in this process.

    agglom                   `train_stream` through `Loader`
    PIL bicubic              RandomResizedCrop, RandomHorizontalFlip on PIL's image, PILToTensor: what counts
    PIL bilinear             the same with v2's own default filter, which does less
    tensors bicubic          ToImage first, the rest on tensors
    decode only              pixels of files in memory, nothing else, in this process

Each round runs all of them, forwards and backwards in turns; a speed-up is the median of the rounds' ratios, over wall
time and over CPU time (of the worker and this process), which says more where other work disturbs the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from ladder import machine
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from agglom.data import Loader, TrainView, decode_image, train_stream, write_index, write_shard

LEAST = 1.3  # times the images/s of PIL bicubic
SIZE, BATCH, SHARDS = 224, 32, 4
VIEW: dict[str, Any] = {"scale": (0.4, 1.0), "ratio": (3 / 4, 4 / 3)}
OTHERS = ("PIL bicubic", "PIL bilinear", "tensors bicubic")


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of side x 3/4 side pixels."""
    shape = (side, side * 3 // 4)

    def layer(cells: int, strength: float) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC), dtype=np.float32)
        return (fine - 128) * strength

    texture = rng.standard_normal((shape[1], shape[0], 1), dtype=np.float32) * rng.uniform(4, 14)
    pixels = 128 + layer(8, 0.8) + layer(64, 0.2) + texture
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(root: Path, pictures: Sequence[bytes]) -> None:
    """The same pictures as folders of two classes and as shards."""
    for number, data in enumerate(pictures):
        path = root / "folders" / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    samples = [
        {"key": f"{number:06d}", "image": data, "ext": "jpg", "cls": number % 2} for number, data in enumerate(pictures)
    ]
    shards = [write_shard(root / "shards" / f"train-{k:06d}.tar", samples[k::SHARDS]) for k in range(SHARDS)]
    write_index(root / "shards", {"train": shards})


def agglom(root: Path, workers: int) -> Any:
    stream = train_stream(root / "shards", "train", fields=("image", "cls"), transform=TrainView(size=SIZE, **VIEW))
    return Loader(stream, batch_size=BATCH, num_workers=workers)


def image_folder(root: Path, workers: int, name: str, batches: int) -> Any:
    filtered = v2.InterpolationMode.BILINEAR if name == "PIL bilinear" else v2.InterpolationMode.BICUBIC
    augmented = [v2.RandomResizedCrop(SIZE, **VIEW, interpolation=filtered), v2.RandomHorizontalFlip()]
    steps = [v2.ToImage(), *augmented] if name == "tensors bicubic" else [*augmented, v2.PILToTensor()]
    data = ImageFolder(str(root / "folders"), v2.Compose(steps))
    # with replacement, so that no run meets the end of an epoch, where workers start anew
    order = RandomSampler(data, replacement=True, num_samples=BATCH * batches)
    return DataLoader(data, batch_size=BATCH, sampler=order, num_workers=workers)


def cpu_seconds() -> float:
    """Of this process and its workers, as far as the system tells."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        path = Path(f"/proc/{child.pid}/schedstat")
        total += int(path.read_text().split()[0]) / 1e9 if path.exists() else float("nan")
    return total


def timed(make: Callable[[], Any], batches: int) -> tuple[float, float]:
    """Wall and CPU seconds an image, from the arrival of the first batch on."""
    arriving = iter(make())
    next(arriving)
    start, start_cpu = time.perf_counter(), cpu_seconds()
    for batch in islice(arriving, batches):
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        assert images.shape == (BATCH, 3, SIZE, SIZE) and images.dtype == torch.uint8
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    return seconds / (batches * BATCH), cpu / (batches * BATCH)


def decoding(pictures: Sequence[bytes], batches: int) -> tuple[float, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    for number in range(batches * BATCH):
        decode_image(pictures[number % len(pictures)])
    return tuple((end - begin) / (batches * BATCH) for begin, end in (  # type: ignore[return-value]
        (start, time.perf_counter()), (start_cpu, time.process_time())
    ))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--side", type=int, default=500, help="longer side of the pictures, in pixels")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=16, help="timed in each run")
    args = parser.parse_args(arguments)
    if args.quick:
        args.pictures, args.rounds, args.batches = min(args.pictures, 128), min(args.rounds, 5), min(args.batches, 6)
    torch.set_num_threads(1)
    about = machine("cpu")
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    rng = np.random.default_rng(0)
    pictures = [picture(rng, args.side) for _ in range(args.pictures)]
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"{len(pictures)} JPEGs of {args.side} x {args.side * 3 // 4} px, {kilobytes:.0f} kB each, to {SIZE} px")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, pictures)
        runs: dict[tuple[str, int], Callable[[], tuple[float, float]]] = {
            ("decode only", 0): lambda: decoding(pictures, args.batches)
        }
        for workers in (1, 0):
            runs["agglom", workers] = lambda w=workers: timed(lambda: agglom(root, w), args.batches)  # type: ignore[misc]
            for name in OTHERS:
                runs[name, workers] = lambda n=name, w=workers: timed(  # type: ignore[misc]
                    lambda: image_folder(root, w, n, args.batches + 5), args.batches
                )
        found: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in runs}
        for number in range(args.rounds):
            for case in list(runs)[:: -1 if number % 2 else 1]:
                found[case].append(runs[case]())
    cases = []
    for (name, workers), times in found.items():
        pairs = list(zip(times, found["agglom", workers], strict=True))
        wall, cpu = ([theirs[k] / ours[k] for theirs, ours in pairs] for k in (0, 1))
        cases.append(
            {
                "name": name,
                "workers": workers,
                "images_per_s": 1 / statistics.median(t for t, _ in times),
                "images_per_cpu_s": 1 / statistics.median(t for _, t in times),
                "speedup": statistics.median(wall),
                "low": min(wall),
                "high": max(wall),
                "speedup_cpu": statistics.median(cpu),
            }
        )
        print(_line(cases[-1]))
    speedup = next(c["speedup"] for c in cases if (c["name"], c["workers"]) == ("PIL bicubic", 1))
    print(
        f"at least {LEAST}x of PIL bicubic with one worker: {'met' if speedup >= LEAST else 'MISSED'} ({speedup:.2f}x)"
    )
    out = {"machine": about, "side": args.side, "kilobytes": kilobytes, "cases": cases}
    if args.json is not None:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    return out


def _line(case: dict[str, Any]) -> str:
    where = "one worker" if case["workers"] else "in process"
    line = (
        f"{case['name']:16} {where}: {case['images_per_s']:5.0f} images/s, {case['images_per_cpu_s']:5.0f} a CPU second"
    )
    if case["name"] == "agglom":
        return line
    return (
        f"{line}; agglom {case['speedup']:.2f}x ({case['low']:.2f}-{case['high']:.2f}), "
        f"{case['speedup_cpu']:.2f}x by CPU time"
    )


if __name__ == "__main__":
    main()
