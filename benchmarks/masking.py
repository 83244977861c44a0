"""What masked feature distillation saves: a step at 75 % masking against the same step on all patches.

    python benchmarks/masking.py [--quick] [--device cuda]

A ViT-B/16 student and a frozen ViT-L/16 teacher at 224 px, both with random weights, under the objective `Dmae`. A step
is all that encoders and loss cost: the teacher's forward pass up to the block that is read (the 18th of 24), the
student's up to its own (the 9th of 12), the loss between them, and the backward pass; no optimiser and no data.

"masked" leaves out 75 % of the patches. "unmasked" is ordinary feature distillation: the same objective at ratio 0 with
the same blocks read, so that masking is all that differs. "full" also runs both encoders to their last blocks. Steps
come in pairs in this process, in turns first; the share is the median of the pairs' ratios. Wall time is what counts;
CPU time says the same where other work disturbs the machine.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Sequence, cast

import torch
from ladder import machine, pairs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agglom.selfdistill import Dmae, Scene
from agglom.students import TimmStudent, attend_plainly
from agglom.teachers import TimmTeacher

SIZE, RATIO = 224, 0.75
STEPS: dict[str, dict[str, Any]] = {
    "masked": {"ratio": RATIO},
    "unmasked": {"ratio": 0.0},
    "full": {"ratio": 0.0, "student_block": -1, "teacher_block": -1},
}
MOST = 0.40  # of the unmasked step's time


class Work:
    """One student, one teacher and one batch, under each of the objectives."""

    def __init__(self, *, student: str, teacher: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.student = TimmStudent(name=student).to(device)
        if device == "cpu":
            attend_plainly(self.student)
        self.encoder = TimmTeacher(name=teacher, pretrained=False).to(device)
        self.images = torch.rand(batch, 3, SIZE, SIZE, device=device)
        make = partial(Dmae, self.student.dims, encoder=self.encoder)
        self.objectives = {name: make(**options).to(device) for name, options in STEPS.items()}

    def step(self, name: str) -> Tensor:
        """Forward and backward; the mean loss."""
        objective = self.objectives[name]
        self.student.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        loss = objective(self.scene()).mean()
        loss.backward()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()

    def scene(self) -> Scene:
        """What Dmae looks at, and nothing where it doesn't."""
        nothing = cast(Any, None)
        return Scene(
            batch={}, features=nothing, student=self.student, average=nothing, frame=lambda name: (self.images, None),
            snapshot=nothing, own=nothing, step=0, since=0, key=(0,),
        )  # fmt: skip

    def flops(self, name: str) -> int:
        with FlopCounterMode(display=False) as counter:
            self.step(name)
        return counter.get_total_flops()


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return, against "unmasked" and "full", the shares of FLOPs, of wall and of CPU time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two ViT-Ti, one image, one pair: only shows that it runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--student", default="vit_base_patch16_224")
    parser.add_argument("--teacher", default="vit_large_patch16_224")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of steps")
    args = parser.parse_args(arguments)
    if args.quick:
        args.student = args.teacher = "vit_tiny_patch16_224"
        args.batch, args.rounds = 1, 1
    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if about["load"] > 0.5:
        print(f"load {about['load']}: other work is running; trust CPU time, not wall time")
    work = Work(student=args.student, teacher=args.teacher, batch=args.batch, device=args.device)
    blocks = {name: objective.blocks for name, objective in work.objectives.items()}
    print(
        f"student {args.student}, teacher {args.teacher}, {args.batch} images of {SIZE} px, fp32, "
        f"{torch.get_num_threads()} threads, {args.rounds} pairs\n"
        f"blocks run: {blocks['masked']['student'] + 1} and {blocks['masked']['teacher'] + 1}; in full "
        f"{blocks['full']['student'] + 1} and {blocks['full']['teacher'] + 1}"
    )
    flops = {name: work.flops(name) for name in STEPS}
    print("GFLOPs of a step: " + ", ".join(f"{name} {count / 1e9:.1f}" for name, count in flops.items()))
    shares = {}
    for other in ("unmasked", "full"):
        row = pairs(work.step, args.rounds, names=(other, "masked"))
        share = {
            "flops": flops["masked"] / flops[other],
            "wall": 1 / row["speedup"],
            "low": 1 / row["speedup_high"],
            "high": 1 / row["speedup_low"],
            "cpu": 1 / row["speedup_cpu"],
        }
        shares[other] = share
        print(
            f"masked {row['masked_ms']:.0f} ms, {other} {row[f'{other}_ms']:.0f} ms: {share['wall']:.3f}x "
            f"({share['low']:.3f}-{share['high']:.3f}) of the time, {share['cpu']:.3f}x of the CPU time, "
            f"{share['flops']:.3f}x of the FLOPs"
        )
    met = "met" if shares["unmasked"]["wall"] <= MOST else "MISSED"
    print(f"at most {MOST:.2f}x of the unmasked step's time: {met}")
    return shares


if __name__ == "__main__":
    main()
