"""How long one waits for agglom: the help, the check of a configuration, the first training step.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--quick] [--json FILE]

Each is a process of its own, from its start to its end; the first step until the line of the first optimiser step.
The configuration is configs/demo.yaml, on pictures that are made up here. Medians, and the mean CPU time of whole
processes, which says more on a busy machine; files are in the system's cache, since the first of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
from ladder import machine

from agglom.data import write_index, write_shard

MOST = {"--help": 1.0, "check": 6.0}  # seconds


def pictures(root: Path) -> None:
    """Shards of 64 pictures for training and as many for validation."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[dict[str, Any]]:
        for i in range(64):
            yield {"key": f"{i:06d}", "image": rng.integers(256, size=(64, 64, 3), dtype=np.uint8), "cls": i % 10}

    write_index(root, {split: [write_shard(root / f"{split}-0.tar", samples())] for split in ("train", "val")})


def until(command: Sequence[str], folder: str, line: str | None) -> float:
    """Seconds until a process prints a line that begins so, or with None until it ends."""
    started, found, said = time.perf_counter(), None, []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            said.append(text)
            if found is None and line is not None and text.startswith(line):
                found = time.perf_counter() - started
    ended = time.perf_counter() - started
    if process.returncode or (line is not None and found is None):
        raise SystemExit(f"{' '.join(command)}:\n{''.join(said)}")
    return ended if found is None else found


def _cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer processes")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rounds", type=int, default=9, help="processes of each kind")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds = min(args.rounds, 3)
    about = machine("cpu")
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    agglom = [sys.executable, "-m", "agglom.cli"]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder) / "data/scenes")  # where the configuration looks for them
        once = ["--overwrite", "true", "--trainer.max_steps", "1", "--model.warmup_steps", "0"]
        commands: dict[str, tuple[list[str], str | None]] = {
            "--help": ([*agglom, "--help"], None),
            "check": ([*agglom, "check", "configs/demo.yaml"], None),
            "first step": ([*agglom, "fit", "--config", "configs/demo.yaml", *once], "step 1/1"),
        }
        for name, (command, line) in commands.items():
            until(command, folder, line)
            used = _cpu()
            times = sorted(until(command, folder, line) for _ in range(args.rounds))
            used = (_cpu() - used) / args.rounds
            cases.append(
                {"name": name, "seconds": statistics.median(times), "low": times[0], "high": times[-1], "cpu": used}
            )
            spread = f"({times[0]:.2f}-{times[-1]:.2f})"
            print(f"{name}: {cases[-1]['seconds']:.2f} s {spread}, {used:.2f} s of CPU time", flush=True)
            if name in MOST:
                met = "met" if cases[-1]["seconds"] <= MOST[name] else "MISSED"
                print(f"{name}: at most {MOST[name]} s: {met}")
    result = {"machine": about, "rounds": args.rounds, "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
