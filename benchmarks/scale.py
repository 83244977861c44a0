"""How a step's cost grows with teachers, images and pixels, what a second rank brings, and whether memory stays flat.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--quick] [--json FILE]

Steps are those of `step.py` (ViT-Ti/16, perceptrons, fp32, Lightning's Trainer), on one CPU thread.

Everything has a part that doesn't grow: the student where teachers are counted, the start where images are. So what is
fitted is the growth. For sizes n, kn, kkn, ..., and a cost of a + b * n^p, the growth from one size to the next is
itself multiplied by k^p from pair to pair, whatever a is: p is the slope of log(growth) over log(size), by least
squares. (Pixels: each side doubles, so cells grow fourfold; attention makes their p exceed 1.)

    teachers    2, 4, 8, 16, all alike but for their weights
    images      1x, 4x, 16x as many, streamed from shards through `agglom`'s data module and trained on, each in a
                process of its own: CPU time, and the highest resident memory
    batch       8, 16, 32, 64 images a step; small ones are cheaper an image where they fit into a CPU's caches
    cells       of the student's and the teachers' maps: 4 x 4, 8 x 8, 16 x 16
    ranks       1 and 2 processes with gloo, the same images on each: images/s of two over images/s of one

Costs are CPU time: the fastest of all steps, or runs, of a size, which other work has disturbed least; a median would
put that work into the differences. Rounds run all sizes in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

import lightning.pytorch as pl
import step
import torch
from ladder import machine
from step import Clock, Setting

from agglom.data import ShardDataModule, ViewOptions
from agglom.distiller import Distiller
from agglom.fit import TRAINER_DEFAULTS
from agglom.heads import TeacherConfig
from agglom.memory import peak_resident
from agglom.students import TimmStudent
from agglom.teachers import TimmTeacher, TinyTeacher
from probes import pictures

NEAR = 0.05  # of exponent 1
FLAT = 1.03  # resident memory at 16x the images over that at 1x
BATCH = 32  # of the streamed images


def build(setting: Setting, teachers: int) -> Distiller:
    """As in `step.py`, with any number of teachers."""
    torch.manual_seed(0)
    configs = {
        f"t{i}": TeacherConfig(TimmTeacher(name=step.VIT, pretrained=False, input_size=setting.size))
        for i in range(teachers)
    }
    return Distiller(TimmStudent(name=step.VIT, kwargs={"img_size": setting.size}), configs, warmup_steps=0)


def cost(setting: Setting, teachers: int, steps: int) -> list[float]:
    """CPU seconds of each step but the first two."""
    clock = Clock(setting.device)
    step.train(build(setting, teachers), setting, steps + 2, lambda trainer: clock)
    return clock.cpu[2 : steps + 2]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of a + b * n^p, for sizes that grow by one factor; see above.

    Raises:
        ValueError: fewer than three sizes, or a cost that doesn't grow.
    """
    growth = [b - a for a, b in zip(costs, costs[1:], strict=False)]
    if len(growth) < 2 or min(growth) <= 0:
        raise ValueError(f"costs {costs} of sizes {sizes}: three that grow are needed")
    x, y = [math.log(n) for n in sizes[1:]], [math.log(g) for g in growth]
    return statistics.linear_regression(x, y).slope


def grow(name: str, plan: Mapping[int, tuple[Setting, int]], rounds: int, steps: int) -> dict[str, Any]:
    """Costs of all sizes of one plan: size -> (setting, teachers)."""
    found: dict[int, list[float]] = {size: [] for size in plan}
    for number in range(rounds):
        for size in list(plan)[:: -1 if number % 2 else 1]:
            found[size] += cost(*plan[size], steps)
    return fitted(name, {size: min(found[size]) for size in plan})


def fitted(name: str, costs: Mapping[int, float]) -> dict[str, Any]:
    """Size -> CPU seconds, and the exponent; prints them."""
    slope = exponent(list(costs), list(costs.values()))
    told = ", ".join(f"{size}: {1e3 * c:.0f} ms" for size, c in costs.items())
    print(f"{name:9} {told}; exponent of the growth {slope:.3f}", flush=True)
    return {"name": name, "sizes": list(costs), "cpu_ms": [1e3 * c for c in costs.values()], "exponent": slope}


def ranks_of(number: int, size: int, steps: int) -> float:
    """Median wall seconds of a step on this rank; run in a process of its own, which starts the others."""
    setting = Setting(adaptor="mlp", precision="fp32", size=size, batch=8, device="cpu")
    clock = Clock("cpu")
    step.train(step.build(setting), setting, steps + 2, lambda trainer: clock, ranks=number)
    return statistics.median(clock.wall[2 : steps + 2])


def stream_of(data: str, images: int) -> tuple[float, int]:
    """CPU seconds and highest resident bytes of this process, which trains on so many images."""
    torch.manual_seed(0)
    student = TimmStudent(
        name=step.VIT, kwargs={"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    module = Distiller(student, {"clip": TeacherConfig(TinyTeacher("clip", pretrained=False))}, warmup_steps=0)
    source = ShardDataModule(data=data, batch_size=BATCH, size=64, view=ViewOptions(), num_workers=0, val_split=None)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {**TRAINER_DEFAULTS, "logger": False, "enable_checkpointing": False}
        trainer = pl.Trainer(**options, accelerator="cpu", max_steps=images // BATCH, default_root_dir=folder)
        started = time.process_time()
        trainer.fit(module, datamodule=source)
    return time.process_time() - started, peak_resident()


def stream(images: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cost and memory of 1x, 4x, 16x as many images."""
    counts = [times * images for times in (1, 4, 16)]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    resident: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        data = str(pictures(Path(folder) / "data", counts[-1]))
        for number in range(rounds):
            for count in counts[:: -1 if number % 2 else 1]:
                found = child("--stream-of", data, str(count))
                seconds[count].append(found[0])
                resident[count].append(found[1] / 2**20)
    mib = [statistics.median(resident[count]) for count in counts]
    return fitted("images", {n: min(seconds[n]) for n in counts}), {
        "images": counts,
        "mib": mib,
        "ratio": mib[-1] / mib[0],
    }


def child(*arguments: str) -> list[float]:
    """The numbers that this script prints last when it is called with these arguments."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return [float(number) for number in done.stdout.strip().splitlines()[-1].split()]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print all; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, steps and images")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--size", type=int, default=112, help="pixels of a side, but for cells")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of each size and round")
    parser.add_argument("--doublings", type=int, default=3, help="of teachers and of the batch")
    parser.add_argument("--images", type=int, default=512, help="that are streamed at 1x")
    parser.add_argument("--ranks-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stream-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.ranks_of:
        found = ranks_of(args.ranks_of, args.size, args.steps)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(found)
        return {}
    if args.stream_of:
        print(*stream_of(args.stream_of[0], int(args.stream_of[1])))
        return {}
    if args.quick:
        args.rounds, args.steps, args.images = min(args.rounds, 2), min(args.steps, 4), min(args.images, 256)
    about = machine("cpu") | {"threads": torch.get_num_threads()}
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))

    def setting(size: int, batch: int) -> Setting:
        return Setting(adaptor="mlp", precision="fp32", size=size, batch=batch, device="cpu")

    doubled = [2**i for i in range(args.doublings + 1)]
    images, resident = stream(args.images, args.rounds)
    fits = [
        grow("teachers", {2 * n: (setting(args.size, 8), 2 * n) for n in doubled}, args.rounds, args.steps),
        images,
        grow("batch", {8 * n: (setting(args.size, 8 * n), 2) for n in doubled}, args.rounds, args.steps),
        grow("cells", {(s // 16) ** 2: (setting(s, 4), 2) for s in (64, 128, 256)}, 1, args.steps),
    ]
    seconds = {n: child("--ranks-of", str(n), "--size", str(args.size), "--steps", "10")[0] for n in (1, 2)}
    speedup = 2 * seconds[1] / seconds[2]
    print(f"ranks     1: {1e3 * seconds[1]:.0f} ms, 2: {1e3 * seconds[2]:.0f} ms a step; {speedup:.2f}x the images/s")
    ratio = resident["ratio"]
    pairs = zip(resident["images"], resident["mib"], strict=True)
    print(f"resident  {', '.join(f'{count}: {mib:.0f} MiB' for count, mib in pairs)}; {ratio:.3f}x")
    for fit in fits[:2]:
        met = "met" if abs(fit["exponent"] - 1) <= NEAR else "MISSED"
        print(f"{fit['name']}: exponent 1.0 +- {NEAR}: {met} ({fit['exponent']:.3f})")
    print(f"resident memory at most {FLAT}x: {'met' if ratio <= FLAT else 'MISSED'} ({ratio:.3f}x)")
    result = {
        "machine": about,
        "cases": fits,
        "ranks": {"ms": [1e3 * s for s in seconds.values()], "speedup": speedup},
        "resident": resident,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
