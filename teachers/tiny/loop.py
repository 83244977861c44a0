"""What the three training scripts share: scenes in memory, batch-wise views, and the loop itself."""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from agglom.data import read_index
from agglom.whole import whole

MEAN = STD = (0.5, 0.5, 0.5)


class Scenes(NamedTuple):
    """A split in memory, as bytes.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        seg: (N, 64, 64) uint8.
        classes: (N,) int64.
        texts: N captions.
        boxes: N lists of (x, y, width, height, label).
    """

    images: Tensor
    seg: Tensor
    classes: Tensor
    texts: list[str]
    boxes: list[list[tuple[int, ...]]]


def load_scenes(data: str | Path, split: str) -> Scenes:
    """Read a split written by `agglom data scenes`; what was decoded once is kept beside it as SPLIT.npz."""
    index = read_index(data)
    cached = Path(data) / f"{split}.npz"
    if not cached.exists():
        rows = [*wds.WebDataset([index.url(shard) for shard in index.shards(split)], shardshuffle=False)]
        np.savez(
            cached,
            images=np.stack([np.asarray(Image.open(io.BytesIO(row["png"]))).transpose(2, 0, 1) for row in rows]),
            seg=np.stack([np.asarray(Image.open(io.BytesIO(row["seg.png"]))) for row in rows]),
            classes=np.array([int(row["cls"]) for row in rows]),
            texts=np.array([row["txt"].decode() for row in rows]),
            boxes=np.array([row["boxes.json"].decode() for row in rows]),
        )
    with np.load(cached, allow_pickle=False) as arrays:
        images, seg, classes = (torch.from_numpy(arrays[key]) for key in ("images", "seg", "classes"))
        boxes = [[(*box["bbox"], box["label"]) for box in json.loads(text)] for text in arrays["boxes"]]
        return Scenes(images, seg, classes, arrays["texts"].tolist(), boxes)


def pixels(images: Tensor) -> Tensor:
    """uint8 -> floats in -1..1, which is what the networks take."""
    return images.float() / 127.5 - 1


def crop(images: Tensor, centre: Tensor, side: Tensor, size: int, *, flip: bool = True) -> Tensor:
    """Square crops, resized bilinearly.

    Args:
        images: (B, C, H, W) floats.
        centre: (B, 2) as x, y in pixels.
        side: (B,) in pixels of the source.
        size: of the result, in pixels.
        flip: mirror half of them.
    """
    height, width = images.shape[-2:]
    extent = torch.tensor([width, height], dtype=images.dtype)
    half = (side[:, None] / 2).minimum(extent / 2)
    centre = centre.maximum(half).minimum(extent - half)  # a crop stays inside its picture
    scale, shift = side[:, None] / extent, 2 * centre / extent - 1
    mirror = 1.0 - 2.0 * (torch.rand(len(images)) < 0.5).float() * flip
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0] * mirror, scale[:, 1], shift
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, *, hue: float = 0.0, light: float = 0.2, contrast: float = 0.2, grey: float = 0.0) -> Tensor:
    """Another colour for every picture of a batch in -1..1.

    Args:
        images: (B, 3, H, W).
        hue: largest turn of the colour circle, 0.5 = half of it.
        light, contrast: largest change, as a fraction.
        grey: chance of losing all colour.
    """
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * hue * 2 * math.pi
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    # a turn about the grey axis (Rodrigues' formula)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    matrix = cosine * torch.eye(3) + sine * cross + (1 - cosine) / 3
    lost = (torch.rand(count) < grey)[:, None, None]
    matrix = torch.where(lost, torch.full((3, 3), 1 / 3), matrix)
    gain = 1 + (torch.rand(count, 1, 1) * 2 - 1) * contrast
    shift = (torch.rand(count, 1, 1) * 2 - 1) * light
    out = torch.baddbmm(shift.expand(count, 3, 1), gain * matrix, images.flatten(2))
    return out.clamp(-1, 1).view_as(images)


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="folder written by `agglom data scenes`")
    parser.add_argument("--out", required=True, help="folder for NAME.safetensors")
    parser.add_argument(
        "--steps", type=int, required=True, help="optimiser steps; the same number gives the same bytes"
    )
    parser.add_argument("--stop", type=int, help="end after this step; the schedules still count on --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two saved versions")
    return parser.parse_args()


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, nn.Module, float], dict[str, Tensor]],
    shipped: Callable[[nn.Module], dict[str, Tensor]],
    *,
    name: str,
    args: argparse.Namespace,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    momentum: float = 0.999,
) -> None:
    """AdamW, warm-up and cosine, an exponential moving average of the weights; saves the average in half precision.

    Args:
        model: everything that is trained.
        loss_of: (model, its moving average, progress in 0..1) -> named losses, whose sum is minimised.
        shipped: which tensors of the average are saved.
        name: of the file.
        args: of `arguments`.
        lr: the highest learning rate.
        weight_decay: on matrices only.
        momentum: of the moving average.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup, started = min(300, args.steps // 10 + 1), time.perf_counter()
    sums: dict[str, Any] = {}
    stop = args.stop or args.steps
    for step in range(stop):
        progress = step / args.steps
        rate = lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = loss_of(model, average, progress)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(momentum, (1 + step) / (10 + step))
        torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - keep)
        for key, value in losses.items():
            sums[key] = (
                sums.get(key, 0.0) * 0.98 + float(value.detach()) * 0.02 if key in sums else float(value.detach())
            )
        if (step + 1) % 50 == 0:
            shown = " ".join(f"{key} {value:.3f}" for key, value in sums.items())
            print(f"{name} {step + 1}/{args.steps} {time.perf_counter() - started:.0f} s {shown}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == stop:
            save(shipped(average), Path(args.out) / f"{name}.safetensors", step=step + 1, args=args)


def save(tensors: dict[str, Tensor], path: Path, *, step: int, args: argparse.Namespace) -> None:
    """Half precision and atomic; the header says how the weights came about."""
    # one entry, for safetensors writes several in any order
    training = json.dumps({"step": step, "steps": args.steps, "seed": args.seed})
    halves = {key: value.detach().half().contiguous() for key, value in tensors.items()}
    with whole(path) as scratch:
        save_file(halves, scratch, metadata={"training": training})


def prepare_run(args: argparse.Namespace) -> Any:
    """One thread and one seed: the order of sums, and so the bytes, depends on the number of threads."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    return load_scenes(args.data, "train")
