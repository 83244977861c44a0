"""`agglom demo`: scenes, cached teachers, training, probes and report in one go, on the embedded teachers."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

SCENES: dict[str, Any] = {"train": 8_000, "val": 1_000, "test": 2_000}
PROBES = ("knn", "linear", "zeroshot", "retrieval", "segmentation", "detection", "fidelity", "geometry")
LIMITS = {"train": 4_000, "val": 1_000, "test": 2_000}


def run_demo(out: Path, data: Path, source: str | None = None) -> Path:
    """Everything from nothing to a report, reusing what is there.

    Args:
        out: the run directory. A finished run of the same configuration is probed again, an interrupted one resumed.
        data: shard folder; scenes are written if it doesn't hold them.
        source: folder with Fashion-MNIST's idx files, or None for the package or the download.

    Returns:
        The path of report.html.
    """
    from agglom.data.scenes import write_scenes

    started = time.perf_counter()
    with _timed("1/4 scenes"):
        write_scenes(data, source=source, **SCENES)
    if not _finished(out):
        with _timed("2/4 teachers"):
            cache = _cache(data)
        with _timed("3/4 training"):
            _train(out, data, cache)
    else:
        print(f"reusing the finished run {out}")
    with _timed("4/4 probes and report"):
        from agglom.probing import probe_run

        report = probe_run(out, probes=PROBES, limits=LIMITS, data=str(data))
    print(_summary(report.with_name("report.json")))
    print(f"\nall in {time.perf_counter() - started:.0f} s. Report: {report}\nBackbone: {out / 'export'}")
    return report


def _finished(out: Path) -> bool:
    """Whether the run has an export of its last step."""
    from agglom.checks import read_yaml

    exported = out / "export" / "agglom.json"
    steps = read_yaml("configs/demo.yaml")[0]["trainer"]["max_steps"]
    return exported.is_file() and json.loads(exported.read_text())["steps"] >= steps


def _cache(data: Path) -> Path:
    """Features of all scenes, beside them; says what training saves by them."""
    from agglom.cache.command import cache_teachers
    from agglom.checks import read_yaml

    cache, content = data.with_name(f"{data.name}-features"), read_yaml("configs/demo.yaml")[0]
    config = {**content, "data": {**content["data"], "data": str(data)}}
    new, started = not cache.is_dir(), time.perf_counter()
    dtypes = {"dtype": "bf16"} if fast_bf16() else {}
    for entry in config["model"]["teachers"].values():
        entry["encoder"]["init_args"] |= dtypes
    print(cache_teachers(config, cache, views=1, dtype="fp16", pool=1, names=None, batch=64))
    if new:
        seconds, images = time.perf_counter() - started, SCENES["train"] + SCENES["val"]
        seen = content["trainer"]["max_steps"] * content["data"]["batch_size"]
        print(
            f"the teachers saw {images} scenes once in {seconds:.0f} s; the {seen} images of training would have taken "
            f"them {seen * seconds / images:.0f} s"
        )
    return cache


def _train(out: Path, data: Path, cache: Path) -> None:
    from agglom.callbacks import checkpoint_path
    from agglom.checks import locate, read_yaml
    from agglom.fit import fit

    config = locate("configs/demo.yaml")
    overrides = [f"--data.data={data}", f"--data.cache={cache}", f"--trainer.default_root_dir={out}"]
    if fast_bf16():
        overrides.append("--trainer.precision=bf16-mixed")
        names = read_yaml(config)[0]["model"]["teachers"]
        overrides += [f"--model.teachers.{name}.encoder.init_args.dtype=bf16" for name in names]
    if checkpoint_path(out).is_file():
        print(f"resuming {out}")
        overrides.append("--ckpt_path=last")
    else:
        overrides.append("--overwrite=true")  # a run without a checkpoint holds nothing worth keeping
    fit(["--config", str(config), *overrides])


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 at least 1.5 times as fast as fp32.

    True for accelerators. CPUs differ widely: with AMX or AVX-512 BF16 the ratio is 2 to 4, without them bf16 is
    emulated and up to 20 times slower than fp32. Which one this is, is measured; it takes some milliseconds.
    """
    import torch

    if torch.accelerator.is_available():
        return True

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix
        times = []
        for _ in range(5):
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)


def _summary(report: Path) -> str:
    """Retention by probe, a line each."""
    retention = json.loads(report.read_text())["retention"]
    lines = ["", "what the student kept of the best teacher:"]
    for probe, entry in retention.items():
        lines.append(
            f"  {probe:<13} {100 * entry['value']:5.1f} %   student {100 * entry['student']:.1f}, "
            f"best teacher {100 * entry['best_teacher']:.1f} ({entry['best_teacher_name']})"
        )
    return "\n".join(lines)


@contextmanager
def _timed(title: str) -> Iterator[None]:
    print(f"== {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"== {title}: {time.perf_counter() - started:.0f} s", flush=True)
