"""What the probes cost beside the work that can't be saved: extraction, many linear heads, nearest neighbours.

    OMP_NUM_THREADS=1 python benchmarks/probes.py [--quick] [--json FILE] [--data SHARDS]

    extraction   parts decoded, run and written, against a bare loop that decodes, runs and keeps (ViT-Ti/16, 64 px);
                 fingerprints of the models and joining the parts come once and are left out
    heads        52 heads (13 learning rates, summary and both, 1 and 4 blocks) against one ("both, last 4", one rate):
                 training and evaluation alone, and with one forward pass of every train image at 224 px, which a
                 single head needs as well
    knn          neighbours and votes against the bare products of the same chunks, for several widths

Runs come in pairs, in turns first; a ratio is the median of the pairs' ratios, over wall time and over CPU time (which
says more where other work disturbs the machine, and counts threads that decode ahead in full).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import nn

from agglom.data import write_index, write_shard
from agglom.features import Features
from agglom.probes import KnnProbe, LinearSgdProbe, Subject, extract, knn
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.source import Source
from agglom.probes.store import Parts
from agglom.students import TimmStudent

BATCH = 128
Timed = dict[str, Any]


class Model(nn.Module):
    """A ViT-Ti/16 as a backbone, at this many pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = TimmStudent(name="vit_tiny_patch16_224", kwargs={"img_size": size}).eval()
        self.input = self.student.input

    def forward(self, images: torch.Tensor) -> Features:
        found = self.student(images)
        return Features(found.summary.flatten(1), found.spatial)


def pairs(ours: Callable[[], Any], bare: Callable[[], Any], rounds: int) -> Timed:
    """Seconds of both (medians of wall time), and the medians of the pairs' ratios ours / bare."""
    ours(), bare()
    wall: list[list[float]] = []
    cpu: list[list[float]] = []
    for i in range(rounds):
        found = {}
        for run in (ours, bare)[:: 1 if i % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            found[run] = time.perf_counter() - start, time.process_time() - start_cpu
        wall.append([found[ours][0], found[bare][0]])
        cpu.append([found[ours][1], found[bare][1]])
    return {
        "ours_s": statistics.median(a for a, _ in wall),
        "bare_s": statistics.median(b for _, b in wall),
        "ratio": statistics.median(a / b for a, b in wall),
        "ours_cpu_s": statistics.median(a for a, _ in cpu),
        "bare_cpu_s": statistics.median(b for _, b in cpu),
        "ratio_cpu": statistics.median(a / b for a, b in cpu),
    }


def pictures(root: Path, count: int) -> Path:
    """Shards of smooth 64 px pictures."""
    rng = np.random.default_rng(0)

    def picture() -> np.ndarray:
        coarse = torch.from_numpy(rng.random((1, 3, 8, 8), dtype=np.float32))
        fine = nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)[0]
        return (fine.permute(1, 2, 0) * 255).byte().numpy()

    samples = ({"key": f"{i:06d}", "image": picture(), "cls": i % 10} for i in range(count))
    write_index(root, {"train": [write_shard(root / "train-000000.tar", samples)]})
    return root


def extraction(data: Path, split: str, rounds: int, count: int) -> Timed:
    """Extraction of one model against the bare loop over the same images."""
    source = Source.open(data, fields=("cls",), limits={split: count})
    model = Model(64)

    def bare() -> tuple[np.ndarray, np.ndarray]:
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        some: list[torch.Tensor] = []

        def flush() -> None:
            with torch.inference_mode():
                found = model(torch.stack(some).float().div_(255))
            assert found.summary is not None and found.spatial is not None
            kept.append((found.summary.numpy(), found.spatial.mean((2, 3)).numpy()))
            some.clear()

        for sample in source.samples(split):
            some.append(torch.as_tensor(sample["image"]))
            if len(some) == BATCH:
                flush()
        if some:
            flush()
        return np.concatenate([s for s, _ in kept]), np.concatenate([m for _, m in kept])

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            number = source.parts(split, extract.PART)
            waiting = {"m": Parts(Path(folder) / "m", "", number), "": Parts(Path(folder) / "targets", "", number)}
            job = extract._Pass({"m": extract.Wanted(model)}, {"m": "m"}, waiting, source, split, (64, 64), BATCH)
            stderr, sys.stderr = sys.stderr, open(os.devnull, "w")  # the progress line
            try:
                job.run(range(number))
            finally:
                sys.stderr.close()
                sys.stderr = stderr

    return pairs(ours, bare, rounds)


def synthetic(rows: int, width: int, blocks: int = 0, classes: int = 10) -> Subject:
    rng = np.random.default_rng(0)

    def features(count: int) -> FeatureSet:
        if not blocks:
            return FeatureSet(rng.standard_normal((count, width), np.float32))
        summaries, means = (rng.standard_normal((count, blocks, width), np.float32) for _ in range(2))
        return FeatureSet(summaries[:, -1], means[:, -1], None, summaries, means)

    counts = {"train": rows, "val": 512, "test": 512}
    targets = {r: Targets([""] * n, rng.integers(0, classes, n)) for r, n in counts.items()}
    return Subject("m", Model(224), {r: features(n) for r, n in counts.items()}, targets)


def heads(rows: int, steps: int, rounds: int) -> Timed:
    """52 heads against one, on 10 classes and a ViT-Ti's widths."""
    subject = synthetic(rows, 192, blocks=4)
    options = {"epochs": 1, "steps": steps}
    many = LinearSgdProbe(features=("summary", "both"), **options)  # type: ignore[arg-type]
    one = LinearSgdProbe(features=("both",), blocks=(4,), lrs=(0.01,), **options)  # type: ignore[arg-type]
    found = pairs(lambda: many.evaluate(subject), lambda: one.evaluate(subject), rounds)
    images = torch.rand(8, 3, 224, 224)
    with torch.inference_mode():
        forward = pairs(lambda: subject.model(images), lambda: subject.model(images), rounds)
    for unit in ("", "_cpu"):
        # computed once for all steps; heads in the model's own loop would compute them in each
        features = forward[f"bare{unit}_s"] / len(images) * rows
        found[f"features{unit}_s"] = features
        found[f"with_features{unit}"] = (features + found[f"ours{unit}_s"]) / (features + found[f"bare{unit}_s"])
    return found


def neighbours(rows: int, width: int, rounds: int) -> Timed:
    """kNN of 512 val and as many test rows against the products alone."""
    subject = synthetic(rows, width)
    bank = subject.features["train"].vectors("summary")
    asked = [subject.features[role].vectors("summary") for role in ("val", "test")]

    def bare() -> None:
        for x in asked:
            for chunk in x.split(knn.QUERIES):
                for start in range(0, len(bank), knn.ROWS):
                    chunk @ bank[start : start + knn.ROWS].T

    return pairs(lambda: KnnProbe().evaluate(subject), bare, rounds)


def main(argv: list[str] | None = None) -> dict[str, Timed]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one pair: only shows that it runs")
    parser.add_argument("--data", type=Path, help="shards with 64 px images; default: some are made up")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--images", type=int, default=2048, help="of the extraction")
    parser.add_argument("--steps", type=int, default=500, help="of the heads")
    parser.add_argument("--bank", type=int, default=100_000, help="train rows of kNN")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.images, args.steps, args.bank = 1, 16, 4, 256
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result: dict[str, Timed] = {}

    def tell(name: str, found: Timed) -> None:
        result[name] = found
        print(
            f"{name}: {found['ours_s']:.3f} s against {found['bare_s']:.3f} s, ratio {found['ratio']:.2f} "
            f"({found['ratio_cpu']:.2f} in CPU time)",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        data = args.data or pictures(Path(folder), args.images)
        tell("extraction", extraction(data, args.split, args.rounds, args.images))
    tell("heads", found := heads(64 if args.quick else 4096, args.steps, args.rounds))
    print(
        f"heads with the features' {found['features_s']:.1f} s: ratio {found['with_features']:.2f} "
        f"({found['with_features_cpu']:.2f} in CPU time)"
    )
    for width in (16,) if args.quick else (192, 384, 1024):
        tell(f"knn, width {width}", neighbours(args.bank, width, args.rounds))
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
