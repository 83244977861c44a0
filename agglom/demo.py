"""`agglom demo`: scenes, training, probes and report in one go, on the embedded teachers."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

SCENES = {"train": 8_000, "val": 1_000, "test": 2_000}
PROBES = ("knn", "linear", "segmentation", "zeroshot")
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
    with _timed("1/3 scenes"):
        write_scenes(data, source=source, **SCENES)
    with _timed("2/3 training"):
        _train(out, data)
    with _timed("3/3 probes and report"):
        from agglom.probing import probe_run

        report = probe_run(out, probes=PROBES, limits=LIMITS, data=str(data))
    print(_summary(report.with_name("report.json")))
    print(f"\nall in {time.perf_counter() - started:.0f} s. Report: {report}\nBackbone: {out / 'export'}")
    return report


def _train(out: Path, data: Path) -> None:
    from agglom.callbacks import checkpoint_path
    from agglom.checks import locate, read_yaml
    from agglom.fit import fit

    config = locate("configs/demo.yaml")
    overrides = [f"--data.data={data}", f"--trainer.default_root_dir={out}"]
    content = read_yaml(config)[0]
    if fast_bf16():
        overrides.append("--trainer.precision=bf16-mixed")
        overrides += [f"--model.teachers.{name}.encoder.init_args.dtype=bf16" for name in content["model"]["teachers"]]
    steps = content["trainer"]["max_steps"]
    exported = out / "export" / "agglom.json"
    if exported.is_file() and json.loads(exported.read_text())["steps"] >= steps:
        print(f"reusing the finished run {out}")
        return
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
