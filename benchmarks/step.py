"""What agglom's training step costs against the same work written as a bare PyTorch loop.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--quick] [--json FILE] [--device cuda]

A ViT-Ti/16 student and three frozen ViT-Ti/16 teachers (class token, mean of patches, map alone) with random weights;
teachers no larger than the student, so that a step has little to hide its overhead behind. Heads are ladders or
perceptrons, in fp32 and under bf16 autocast with bf16 teachers. The work of a step: teachers without gradient, targets
standardised by running statistics, student, heads, losses, backward pass, clipping, fused AdamW, averaged weights.

"agglom" is `Distiller` in Lightning's Trainer with the callbacks, the CSV file and the logging of `agglom fit`. "bare"
is `Bare` below: its own loop and its own maths around the same networks and heads. They take turns in one process,
step by step, and must give the same losses. Data costs nothing.

    time_ratio    median of the pairs' ratios; cpu_ratio the same in CPU time, which says more on a busy machine
    mean_ratio    all steps together, those that are logged included
    memory_ratio  of the highest sums of bytes of all tensors alive: weights, averages, optimiser's state, activations
    host_syncs    reads of a tensor's value by the host between two logged steps (`Syncs`; on CUDA torch's own hook)
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from ladder import machine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from agglom.adaptors import LadderAdaptor, MLPAdaptor
from agglom.callbacks import RunCSVLogger, TrainingProgress
from agglom.distiller import Distiller
from agglom.features import StudentFeatures
from agglom.fit import TRAINER_DEFAULTS
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent, attend_plainly
from agglom.teachers import TimmTeacher

VIT = "vit_tiny_patch16_224"
SUMMARIES = {"cls": "cls", "avg": "avg", "map": "none"}  # teacher -> its summary
ADAPTORS: dict[str, Any] = {"ladder": LadderAdaptor, "mlp": MLPAdaptor}
LR, BETAS, DECAY, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.999, 0.05, 1.0
LOG_EVERY = 10  # steps
MOST = {"time_ratio": 1.03, "memory_ratio": 1.05, "host_syncs": 0}
SAME = {"fp32": 1e-5, "bf16": 1e-3}  # largest relative difference of the losses


class Setting(argparse.Namespace):
    """One case: heads, precision, pixels of a side, images of a batch, device."""

    adaptor: str
    precision: str
    size: int
    batch: int
    device: str


def build(setting: Setting) -> Distiller:
    """The same module at every call."""
    torch.manual_seed(0)
    dtype: Any = setting.precision
    teachers = {
        name: TeacherConfig(TimmTeacher(name=VIT, pretrained=False, input_size=setting.size, summary=rule, dtype=dtype))  # type: ignore[arg-type]
        for name, rule in SUMMARIES.items()
    }
    student = TimmStudent(name=VIT, kwargs={"img_size": setting.size})
    return Distiller(
        student, teachers, adaptor=ADAPTORS[setting.adaptor], lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY,
        ema_decay=DECAY, warmup_steps=0, schedule="constant",
    )  # fmt: skip


class Bare:
    """The step without agglom's Distiller, heads' losses, normalisers, balance, averages and without Lightning."""

    def __init__(self, setting: Setting) -> None:
        module = build(setting).to(setting.device)
        if setting.device == "cpu":
            attend_plainly(module)
        self.device = setting.device
        self.autocast = partial(torch.autocast, setting.device, torch.bfloat16, enabled=setting.precision == "bf16")
        self.backbone = module.student.backbone
        self.taps = [int(tap.removeprefix("blocks.")) for tap in module.taps]
        self.adaptors = {name: head.adaptor for name, head in module.heads.items()}
        self.networks = {name: encoder.network for name, encoder in module.encoders.items()}
        for network in self.networks.values():
            if setting.device == "cpu":
                attend_plainly(network)
        self.mean, self.std = (torch.tensor((0.5, 0.5, 0.5), device=self.device).view(3, 1, 1) for _ in range(2))
        self.trained = torch.nn.ModuleList([self.backbone, *self.adaptors.values()])
        self.average = copy.deepcopy(self.trained).requires_grad_(False).eval()
        exempt = {id(p) for p in (self.backbone.pos_embed, self.backbone.cls_token)}
        weights = list(self.trained.parameters())
        decayed = [p for p in weights if p.ndim > 1 and id(p) not in exempt]
        rest = [p for p in weights if p.ndim == 1 or id(p) in exempt]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0
        self.losses: list[Tensor] = []

    def standardise(self, name: str, rows: Tensor) -> Tensor:
        """(..., C) by the steps before, at the first by itself; then the statistics follow."""
        deviation, mean = torch.std_mean(rows.flatten(0, -2), 0)
        if name not in self.statistics:
            self.statistics[name] = mean, deviation
        center, scale = self.statistics[name]
        out = (rows - center) / (torch.maximum(scale, 0.01 * scale.mean()) + 1e-6)
        momentum = max(0.001, 1 / (self.steps + 1))
        self.statistics[name] = center.lerp(mean, momentum), scale.lerp(deviation, momentum)
        return out

    @torch.no_grad()
    def look(self, name: str, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """A teacher's summary and map (B, N, C), standardised."""
        with self.autocast():
            tokens = self.networks[name].forward_features(pixels)
        tokens = tokens.float()
        rule, patches = SUMMARIES[name], tokens[:, 1:]
        summary = None if rule == "none" else tokens[:, 0] if rule == "cls" else patches.mean(1)
        return (
            None if summary is None else self.standardise(f"{name}/summary", summary),
            self.standardise(f"{name}/map", patches),
        )

    def step(self, images: Tensor) -> None:
        """One optimiser step on (B, 3, H, W) uint8."""
        pixels = (images.to(self.device, non_blocking=True).float().div_(255) - self.mean) / self.std
        targets = {name: self.look(name, pixels) for name in self.networks}
        loss = torch.zeros((), device=self.device)
        with self.autocast():
            blocks: list[Any] = []
            if self.taps:
                tokens, blocks = self.backbone.forward_intermediates(
                    pixels, indices=self.taps, return_prefix_tokens=True, output_fmt="NLC"
                )
            else:
                tokens = self.backbone.forward_features(pixels)
            grid = self.backbone.patch_embed.grid_size

            def as_map(patches: Tensor) -> Tensor:
                return patches.transpose(1, 2).unflatten(2, grid)

            tapped = {
                f"blocks.{i}": (first, as_map(patches)) for i, (patches, first) in zip(self.taps, blocks, strict=True)
            }
            features = StudentFeatures(tokens[:, :1], as_map(tokens[:, 1:]), tapped)
            for name, (summary, patches) in targets.items():
                said = self.adaptors[name].project(features)
                ours = said.spatial.flatten(2).transpose(1, 2).float()
                cosine = 1 - F.cosine_similarity(ours, patches, dim=2, eps=1e-6)
                own = 0.9 * cosine.mean() + 0.1 * F.smooth_l1_loss(ours, patches)
                if summary is not None:
                    own = own + 1 - F.cosine_similarity(said.summary.float(), summary, eps=1e-6).mean()
                loss = loss + own / len(targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        decay = min(DECAY, self.steps / (9 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 1 - decay)
        self.losses.append(loss.detach())


class Stream(IterableDataset):
    """Batches, the same at every call, with `between` around each step that is made of one.

    `between()` gives a context; it is entered before a batch is handed out and left when the next one is asked for.
    """

    def __init__(self, setting: Setting, steps: int, between: Callable[[], AbstractContextManager[Any]]) -> None:
        self.setting, self.steps, self.between = setting, steps, between

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for images in pictures(self.setting, self.steps):
            with self.between():
                yield {"image": images, "key": [str(i) for i in range(len(images))]}


def pictures(setting: Setting, steps: int) -> Iterator[Tensor]:
    """(B, 3, H, W) uint8, `steps` times."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        shape = (setting.batch, 3, setting.size, setting.size)
        yield torch.randint(256, shape, dtype=torch.uint8, generator=generator)


class Losses(pl.Callback):
    """Keeps every step's loss."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(outputs["loss"].detach())


def train(
    module: Distiller,
    setting: Setting,
    steps: int,
    between: Callable[[pl.Trainer], AbstractContextManager[Any]] = lambda trainer: nullcontext(),
    log_every: int = LOG_EVERY,
    ranks: int = 1,
) -> list[Tensor]:
    """`steps` steps of agglom as `agglom fit` runs them; returns their losses."""
    losses = Losses()
    for name in ("rank_zero", "seed"):
        logging.getLogger(f"lightning.pytorch.utilities.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*(eval mode|many workers|treespec|on_after_batch_transfer).*")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = pl.Trainer(
            **{**TRAINER_DEFAULTS, "log_every_n_steps": log_every, "gradient_clip_val": CLIP},
            accelerator="cpu" if setting.device == "cpu" else "gpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            max_steps=steps,
            precision="32-true" if setting.precision == "fp32" else "bf16-mixed",
            logger=RunCSVLogger(folder),
            callbacks=[TrainingProgress(every_s=3600), losses],
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        # one batch more: the loop asks for it before it knows that it is done
        stream = Stream(setting, steps + 1, lambda: between(trainer))
        trainer.fit(module, DataLoader(stream, batch_size=None))
    return losses.found


class Clock:
    """Wall and CPU seconds of what happens while it is entered."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self.wait()
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: Any) -> None:
        self.wait()
        self.wall.append(time.perf_counter() - self.start[0])
        self.cpu.append(time.process_time() - self.start[1])


def timed(setting: Setting, rounds: int) -> dict[str, float]:
    """Pairs of steps in turns; the first two of each are not counted."""
    settle = 2
    bare, ours, theirs = Bare(setting), Clock(setting.device), Clock(setting.device)
    images = pictures(setting, rounds + settle + 1)

    def between(trainer: pl.Trainer) -> AbstractContextManager[Any]:
        with theirs:
            bare.step(next(images))
        return ours

    found = train(build(setting), setting, rounds + settle, between)
    pairs = list(zip(found, bare.losses, strict=False))
    worst = max(float((a - b).abs() / b.abs()) for a, b in pairs)
    if worst > SAME[setting.precision]:
        raise SystemExit(f"losses differ by {worst:.1e} > {SAME[setting.precision]}: not the same work")
    out: dict[str, float] = {"difference": worst}
    for unit in ("wall", "cpu"):
        mine, others = (getattr(clock, unit)[settle : settle + rounds] for clock in (ours, theirs))
        ratios = sorted(a / b for a, b in zip(mine, others, strict=True))
        name = "time" if unit == "wall" else "cpu"
        out[f"{name}_ratio"] = statistics.median(ratios)
        if unit == "wall":
            out |= {"low": ratios[len(ratios) // 10], "high": ratios[-1 - len(ratios) // 10]}
            out |= {"mean_ratio": sum(mine) / sum(others)}
            out |= {"agglom_ms": 1e3 * statistics.median(mine), "bare_ms": 1e3 * statistics.median(others)}
    return out


def peak_mib(setting: Setting, run: Callable[[], Any]) -> float:
    """Highest sum of bytes of the tensors that `run` has made and not freed, MiB."""
    gc.collect()
    if setting.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    kineto: Any = recorded.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest / 2**20


def memory(setting: Setting) -> dict[str, float]:
    """Three steps of each, from building on: the third has the optimiser's state."""

    def bare() -> None:
        loop = Bare(setting)
        for images in pictures(setting, 3):
            loop.step(images)

    out = {
        "agglom_mib": peak_mib(setting, lambda: train(build(setting), setting, 3)),
        "bare_mib": peak_mib(setting, bare),
    }
    return {"memory_ratio": out["agglom_mib"] / out["bare_mib"], **out}


class Syncs:
    """Counts what makes the host wait for a device while it is entered.

    On a CPU nothing waits; there every read of a tensor's value counts that would wait on a device: item, bool, float,
    tolist, numpy, cpu, and operations whose result's shape depends on values.
    """

    OPS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")
    CALLS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, device: str) -> None:
        self.device, self.found = device, []  # type: ignore[var-annotated]

    def __enter__(self) -> Syncs:
        found: list[str] = []

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                if name in Syncs.OPS or (
                    name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
                ):
                    found.append(name)
                return func(*args, **(kwargs or {}))

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if getattr(func, "__name__", "") in Syncs.CALLS:
                    found.append(func.__name__)
                return func(*args, **(kwargs or {}))

        self.found, self.stack = found, ExitStack()
        if self.device == "cuda":
            self.caught = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            self.stack.enter_context(Ops())
            self.stack.enter_context(Calls())
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()
        if self.device == "cuda":
            self.found += [str(w.message) for w in self.caught if "synchronizing" in str(w.message)]


def syncs(setting: Setting) -> list[str]:
    """What the host read in the steps between two logged ones."""
    every, found = 4, []

    class Watched(Syncs):
        def __init__(self, trainer: pl.Trainer) -> None:
            super().__init__(setting.device)
            self.trainer = trainer

        def __exit__(self, *_: Any) -> None:
            super().__exit__()
            step = self.trainer.global_step
            if every < step < 2 * every:  # steps 5, 6, 7 of those logged at 4 and 8
                found.extend(self.found)

    train(build(setting), setting, 2 * every, Watched, every)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table; returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="112 px and 8 images")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--adaptors", nargs="+", default=list(ADAPTORS), choices=list(ADAPTORS))
    parser.add_argument("--precisions", nargs="+", default=list(SAME), choices=list(SAME))
    args = parser.parse_args(arguments)
    if args.quick:
        args.size, args.batch = min(args.size, 112), min(args.batch, 8)
    about = machine(args.device) | {"threads": torch.get_num_threads()}
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if about["load"] > 0.5:
        print(f"load {about['load']}: other work is running; trust CPU time, not wall time")
    print(f"{args.batch} images of {args.size} px, {args.rounds} pairs, logged every {LOG_EVERY} steps")
    cases = []
    print(
        f"{'case':12} {'agglom ms':>9} {'bare ms':>9} {'time':>20} {'in CPU':>7} {'mean':>7} {'memory':>7} {'syncs':>5}"
    )
    for adaptor in args.adaptors:
        for precision in args.precisions:
            setting = Setting(
                adaptor=adaptor, precision=precision, size=args.size, batch=args.batch, device=args.device
            )
            row: dict[str, Any] = {"name": f"{adaptor} {precision}", **timed(setting, args.rounds), **memory(setting)}
            row["syncs"] = syncs(setting)
            row["host_syncs"] = len(row["syncs"])
            cases.append(row)
            spread = f"{row['time_ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
            print(
                f"{row['name']:12} {row['agglom_ms']:9.1f} {row['bare_ms']:9.1f} {spread:>20} {row['cpu_ratio']:7.3f} "
                f"{row['mean_ratio']:7.3f} {row['memory_ratio']:7.3f} {row['host_syncs']:5}",
                flush=True,
            )
    for key, most in MOST.items():
        worst = max(row[key] for row in cases)
        print(f"{key} at most {most}: {'met' if worst <= most else 'MISSED'} ({worst:.3f})")
    result = {"machine": about, "size": args.size, "batch": args.batch, "rounds": args.rounds, "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
