"""The ladder as a few large products against one perceptron per block, teacher and token: time, memory, FLOP share.

    python benchmarks/ladder.py [--quick] [--json FILE] [--device cuda]

A ViT-Ti/16 student at 224 px, two ViT-Ti teachers, ladders over all 12 blocks with UNIC's hidden widths (768, and 3072
at the last block), batch 16. Both formulations have the same weights, read the same features in the same dtype through
the same attention, and are checked to agree before anything is timed. Teachers only give targets and are not run.

"ladder" is the heads alone, forward and backward, from given features; "step" is student, heads and loss, forward and
backward, without the optimiser. Runs come in pairs, in turns first; the speed-up is the median of the pairs' ratios.
Wall time is what counts; CPU time says the same where other work disturbs the machine. Peak memory is that of one step
in a process of its own, above what the process held before its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agglom.adaptors import LadderAdaptor
from agglom.features import Dims, Features, StudentFeatures
from agglom.students import TimmStudent, attend_plainly

TEACHERS, WIDTH, SIZE, RATIO = 2, 192, 224, 4.0  # 4 * 192 = 768, 16 * 192 = 3072
FORMULATIONS = ("plain", "large")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainLadder(nn.Module):
    """The same function as a LadderAdaptor, as one perceptron per block and token, each run on its own, then added."""

    def __init__(self, ladder: LadderAdaptor) -> None:
        super().__init__()
        self.token = ladder.token
        self.reads = ladder.reads
        self.summary, self.spatial = self._split(ladder.summary), self._split(ladder.spatial)

    @staticmethod
    def _split(head: nn.Module) -> nn.ModuleList:
        perceptrons, left = nn.ModuleList(), 0
        for first in head.first:
            second = nn.Linear(first.out_features, head.last.out_features)
            with torch.no_grad():
                second.weight.copy_(head.last.weight[:, left : left + first.out_features])
                second.bias.copy_(head.last.bias / len(head.first))
            left += first.out_features
            own = nn.Linear(first.in_features, first.out_features)
            own.load_state_dict(first.state_dict())
            perceptrons.append(nn.Sequential(own, nn.GELU(), second))
        return perceptrons

    def forward(self, student: StudentFeatures) -> Features:
        summary, spatial = 0, 0
        for name, for_summary, for_spatial in zip(self.reads, self.summary, self.spatial, strict=True):
            tokens, x = (student.summary, student.spatial) if name is None else student.taps[name]
            summary = summary + for_summary(tokens[:, self.token])
            spatial = spatial + for_spatial(x.flatten(2).transpose(1, 2))
        return Features(summary, spatial.transpose(1, 2).unflatten(2, student.spatial.shape[-2:]))


class Work:
    """Student, both formulations of the heads, inputs and targets, all from one seed."""

    def __init__(self, *, batch: int, device: str, dtype: str, formulations: tuple[str, ...] = FORMULATIONS) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, DTYPES[dtype]
        self.student = TimmStudent(name="vit_tiny_patch16_224").to(device)
        if device == "cpu":
            attend_plainly(self.student)
        options = {"ratio": RATIO, "last_ratio": 4 * RATIO}
        names = self.student.tap_names
        ladders = [LadderAdaptor(self.student.dims, Dims(WIDTH, WIDTH), 0, names, **options) for _ in range(TEACHERS)]
        self.taps = ladders[0].taps
        self.heads: dict[str, nn.ModuleList] = {}
        if "plain" in formulations:
            self.heads["plain"] = nn.ModuleList(PlainLadder(ladder) for ladder in ladders).to(device)
        if "large" in formulations:
            self.heads["large"] = nn.ModuleList(ladders).to(device)
        self.images = torch.rand(batch, 3, SIZE, SIZE, device=device)
        grid = SIZE // self.student.input.stride
        self.targets = [
            (torch.randn(batch, WIDTH, device=device), torch.randn(batch, WIDTH, grid, grid, device=device))
            for _ in range(TEACHERS)
        ]
        with torch.no_grad(), self.autocast():
            self.given = self.student(self.images, self.taps)

    def autocast(self) -> Any:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    def loss(self, name: str, features: StudentFeatures) -> Tensor:
        total = torch.zeros((), device=self.device)
        for head, (summary, spatial) in zip(self.heads[name], self.targets, strict=True):
            out = head(features)
            total = total + (out.summary.float() - summary).square().mean()
            total = total + (out.spatial.float() - spatial).square().mean()
        return total

    def ladder(self, name: str) -> Tensor:
        """Heads alone: forward and backward, to the weights and to the features."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_()

        taps = {key: (leaf(s), leaf(x)) for key, (s, x) in self.given.taps.items()}
        return self._run(name, lambda: StudentFeatures(leaf(self.given.summary), leaf(self.given.spatial), taps))

    def step(self, name: str) -> Tensor:
        """Student, heads and loss: forward and backward."""
        return self._run(name, lambda: self.student(self.images, self.taps))

    def _run(self, name: str, features: Callable[[], StudentFeatures]) -> Tensor:
        for module in (self.student, self.heads[name]):
            module.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(name, features())
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    def check(self) -> float:
        """Largest difference between the formulations' outputs, over the outputs' own size."""
        with torch.no_grad(), self.autocast():
            pairs = [(a(self.given), b(self.given)) for a, b in zip(*self.heads.values(), strict=True)]
        worst = 0.0
        for plain, large in pairs:
            for a, b in zip(plain, large, strict=True):
                worst = max(worst, ((a.float() - b.float()).abs().max() / a.float().abs().max()).item())
        limit = 1e-5 if self.dtype == torch.float32 else 0.05
        if worst > limit:
            raise SystemExit(f"the formulations differ by {worst:.1e} > {limit}")
        return worst


def pairs(run: Callable[[str], Tensor], rounds: int, names: tuple[str, str] = FORMULATIONS) -> dict[str, Any]:
    """Time both `rounds` times in turns: medians in ms, and the medians of the ratios first / second of the pairs."""
    for name in names:
        run(name)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[:: 1 if i % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            run(name)
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
    ratios = sorted(a / b for a, b in zip(*wall.values(), strict=True))
    ratios_cpu = [a / b for a, b in zip(*cpu.values(), strict=True)]
    return {
        **{f"{name}_ms": statistics.median(wall[name]) for name in names},
        **{f"{name}_cpu_ms": statistics.median(cpu[name]) for name in names},
        "speedup": statistics.median(ratios),
        "speedup_low": ratios[len(ratios) // 10],
        "speedup_high": ratios[-1 - len(ratios) // 10],
        "speedup_cpu": statistics.median(ratios_cpu),
    }


def flops(batch: int, device: str) -> dict[str, float]:
    """Forward and backward multiply-adds (times two) of the heads and of the whole step, and the teachers' forward."""
    work = Work(batch=batch, device=device, dtype="fp32")

    def count(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = count(lambda: work.student(work.images))
    ladder, large = count(lambda: work.ladder("plain")), count(lambda: work.ladder("large"))
    step = count(lambda: work.step("plain"))
    return {
        "ladder_gflop": ladder / 1e9,
        "ladder_large_gflop": large / 1e9,
        "step_gflop": step / 1e9,
        "ladder_share": ladder / step,
        "ladder_share_with_teachers": ladder / (step + TEACHERS * forward),
    }


PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
GELUS = {"aten::gelu", "aten::gelu_backward"}


def profile(work: Work, name: str) -> dict[str, float]:
    """Where one formulation of the ladder spends its time.

    Returns:
        ms in matrix products, in GELUs (forward and backward) and in all operations, and `bound`: how many times faster
        a formulation would be that had the same products and GELUs at the same rate and nothing else.
    """
    work.ladder(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            work.ladder(name)
    times = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(times.values())
    products, gelus = (sum(time for key, time in times.items() if key in names) for names in (PRODUCTS, GELUS))
    return {
        "products_ms": products / 3e3,
        "gelus_ms": gelus / 3e3,
        "all_ms": total / 3e3,
        "bound": total / (products + gelus),
    }


def peak_mib(name: str, batch: int, device: str, dtype: str, threads: int) -> float:
    """Run two steps and report the growth of this process's peak (run it in a process of its own)."""
    torch.set_num_threads(threads)
    work = Work(batch=batch, device=device, dtype=dtype, formulations=(name,))
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.step(name), work.step(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _kib("VmRSS")
    work.step(name), work.step(name)
    return (_kib("VmHWM") - before) / 2**10


def _kib(field: str) -> int:
    """Resident memory now (VmRSS) or at its highest (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS has no such file; ru_maxrss is bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    # not ru_maxrss here: Linux hands the parent's on to a child, and the parent has just run everything
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def machine(device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="batch 2, two pairs, fp32, one thread: only shows that it runs"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of runs")
    parser.add_argument("--peak-of", choices=FORMULATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds, args.dtypes, args.threads = 2, 2, ["fp32"], [1]
    if args.peak_of:
        print(peak_mib(args.peak_of, args.batch, args.device, args.dtypes[0], args.threads[0]))
        return

    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if about["load"] > 0.5:
        print(f"load {about['load']}: other work is running; trust CPU time, not wall time")
    result: dict[str, Any] = {"machine": about, "batch": args.batch, "rounds": args.rounds, "runs": []}
    result["flops"] = flops(args.batch, args.device)
    share = result["flops"]
    print(
        f"FLOPs: ladder {share['ladder_gflop']:.1f} G of a step's {share['step_gflop']:.1f} G "
        f"({share['ladder_share']:.1%}; {share['ladder_share_with_teachers']:.1%} with the teachers' forward)"
    )
    print(f"{'dtype':5} {'threads':>7} {'what':6} {'plain ms':>9} {'large ms':>9} {'speed-up':>22} {'in CPU time':>11}")
    for dtype in args.dtypes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            work = Work(batch=args.batch, device=args.device, dtype=dtype)
            difference = work.check()
            for what in ("ladder", "step"):
                row = pairs(getattr(work, what), args.rounds)
                result["runs"].append(
                    {"dtype": dtype, "threads": threads, "what": what, "difference": difference} | row
                )
                spread = f"{row['speedup']:.3f} ({row['speedup_low']:.3f}-{row['speedup_high']:.3f})"
                print(
                    f"{dtype:5} {threads:7} {what:6} {row['plain_ms']:9.1f} {row['large_ms']:9.1f} {spread:>22} "
                    f"{row['speedup_cpu']:11.3f}",
                    flush=True,
                )
            if args.device == "cpu":
                result["runs"][-2]["profile"] = found = {name: profile(work, name) for name in FORMULATIONS}
                for name, p in found.items():
                    print(
                        f"{dtype:5} {threads:7} profile {name}: matrix products {p['products_ms']:.0f} ms, GELUs "
                        f"{p['gelus_ms']:.0f} ms of {p['all_ms']:.0f} ms; with nothing else {p['bound']:.3f} x as fast"
                    )
    result["peak_mib"] = {}
    for dtype in args.dtypes:
        for name in FORMULATIONS:
            command = [sys.executable, __file__, "--peak-of", name, "--dtypes", dtype, "--device", args.device]
            command += ["--batch", str(args.batch), "--threads", str(args.threads[0])]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result["peak_mib"][f"{dtype}_{name}"] = float(out)
        plain, large = (result["peak_mib"][f"{dtype}_{name}"] for name in FORMULATIONS)
        print(f"peak memory of a step, {dtype}: plain {plain:.0f} MiB, large {large:.0f} MiB ({large / plain:.2f}x)")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
