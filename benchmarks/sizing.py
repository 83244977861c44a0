"""What a training would need, by arithmetic: memory a device and images/s, for teachers, students and devices.

    python benchmarks/sizing.py [--tflops 989] [--mfu 0.4] [--batch 32] [--side 224]

Nothing is measured: parameters, widths and depths are timm's (built on the meta device, nothing is downloaded), the
rest is assumed as follows, and none of it has been compared with a run on such devices.

* An image costs a forward pass 2 x parameters x tokens and 4 x depth x tokens^2 x width operations (attention over all
  tokens; windows of SAM are counted as if there were none, which is too much); the student's training 3 forwards.
* A device does `--tflops` x `--mfu` useful operations a second; data and communication are hidden behind them.
* Memory: trained weights 20 bytes each (fp32 weight, gradient, two moments, average), frozen ones 2 (bf16); heads as
  many weights as an eighth of the student; activations 34 bytes x width a token and block (2205.05198, equation 2,
  without attention maps), of the student alone, and nothing of it recomputed.
* Under FSDP2 (no average) the trained part is 16 bytes, divided by the devices.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple, Sequence

import timm
import torch


class Size(NamedTuple):
    """Of a ViT."""

    parameters: float
    width: int
    depth: int
    patch: int

    def tokens(self, side: int) -> int:
        return (side // self.patch) ** 2

    def forward(self, side: int) -> float:
        """Operations of an image."""
        n = self.tokens(side)
        return 2 * self.parameters * n + 4 * self.depth * n * n * self.width


TEACHERS = {  # name -> (timm's network, pixels of a side)
    "CLIP ViT-H/14": ("vit_huge_patch14_224", 224),
    "SigLIP so400m/14": ("vit_so400m_patch14_siglip_224", 224),
    "DINOv2 ViT-g/14": ("vit_giant_patch14_reg4_dinov2", 224),
    "SAM ViT-H/16": ("samvit_huge_patch16", 1024),
}
STUDENTS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
SETS = (("CLIP ViT-H/14", "DINOv2 ViT-g/14"), ("CLIP ViT-H/14", "SigLIP so400m/14", "DINOv2 ViT-g/14", "SAM ViT-H/16"))


def size_of(name: str) -> Size:
    """On the meta device."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    patch = model.patch_embed.patch_size
    return Size(
        sum(p.numel() for p in model.parameters()),
        model.embed_dim if hasattr(model, "embed_dim") else model.num_features,
        len(model.blocks),
        patch[0] if isinstance(patch, tuple) else patch,
    )


def memory(student: Size, frozen: float, side: int, batch: int, devices: int, sharded: bool) -> float:
    """Bytes of a device."""
    trained = student.parameters * 1.125
    activations = 34 * student.width * student.depth * student.tokens(side) * batch
    return trained * (16 / devices if sharded else 20) + 2 * frozen + activations


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """Print the table as Markdown; returns its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tflops", type=float, default=989, help="of a device, dense bf16 (H100 SXM: 989, A100: 312)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of that which is reached")
    parser.add_argument("--batch", type=int, default=32, help="images a device")
    parser.add_argument("--side", type=int, default=224, help="pixels that the student sees")
    args = parser.parse_args(arguments)
    head = ["teachers", "student", "devices", "GB a device, ddp", "GB a device, FSDP2", "images/s", "of it teachers, %"]
    rows = []
    for names in SETS:
        sizes = [(size_of(TEACHERS[name][0]), TEACHERS[name][1]) for name in names]
        looks = sum(size.forward(side) for size, side in sizes)
        frozen = sum(size.parameters for size, _ in sizes)
        for title, name in STUDENTS.items():
            student = size_of(name)
            cost = looks + 3 * 1.125 * student.forward(args.side)
            for devices in (1, 8, 64):
                gigabytes = [
                    memory(student, frozen, args.side, args.batch, devices, sharded) / 1e9 for sharded in (False, True)
                ]
                speed = devices * args.tflops * 1e12 * args.mfu / cost
                row = [", ".join(names), title, str(devices), *(f"{x:.1f}" for x in gigabytes), f"{speed:,.0f}"]
                rows.append([*row, f"{100 * looks / cost:.0f}"])
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    return rows


if __name__ == "__main__":
    main()
