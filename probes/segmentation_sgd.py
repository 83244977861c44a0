"""Segmentation trained as in mmsegmentation: a head on frozen maps of random crops, whole or sliding inference.

`segmentation` solves the linear case to its optimum on one fixed view of each image; this probe trains by steps on
images in the size in which they are stored, so it also has heads that aren't linear and pictures larger than a crop.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator, Literal, NamedTuple, Sequence, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.data import TrainView
from agglom.errors import UserError, nearest
from agglom.features import resize, sides
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.boxes import shuffled
from agglom.probes.fingerprint import device_of
from agglom.probes.segmentation import IGNORE, constant_miou, count_areas, mask_classes, mask_problem, scores
from agglom.probes.segmenters import HEADS, HeadKind, Segmenter, merge, segmenter, windows
from agglom.probes.statistics import bootstrap

INFERENCE = ("slide", "whole")
ZOOM = (0.25, 1.0)  # part of an image's area that a crop shows: mmseg's resize by 1 to 2 before its crop
OVERLAP = 1 / 3  # of neighbouring windows
POWER, WARM = 0.9, 0.1  # of the polynomial; part of the steps that warm up
ROOM = 2**29  # bytes of decoded images that training keeps to draw from


class Scene(NamedTuple):
    """An image (3, H, W) uint8 and its mask (H, W) uint8, as stored."""

    image: Tensor
    seg: Tensor


class SegmentationSgdProbe(Probe):
    """mIoU, pixel accuracy (aacc) and mean class accuracy (macc), at the resolution in which the masks are stored.

    Training: square crops with the aspect ratio kept, mirrored half of the time; AdamW, linear warm-up, then a
    polynomial of power 0.9; cross-entropy at the crop's resolution without ignored pixels. Test images are resized so
    that the short side is the crop's.

    Args:
        head: "linear" (batch norm and a 1x1 convolution) or "fpn" (a small semantic FPN).
        inference: "slide", the mean of windows of the crop's size, or "whole", the image as one.
        crop: pixels of a side for models that take any size; None: the short side of the first image. Models with a
            size of their own keep it.
        steps: of training.
        batch: images a step.
        lr: candidates, chosen by mIoU on val; their heads are trained side by side on the same crops.
        weight_decay: of AdamW.
    """

    name, metric, fields = "segmentation_sgd", "miou", ("seg",)

    def __init__(
        self,
        *,
        head: HeadKind = "linear",
        inference: Literal["slide", "whole"] = "slide",
        crop: int | None = None,
        steps: int = 500,
        batch: int = 16,
        lr: Sequence[float] = (0.001, 0.003, 0.01, 0.03),
        weight_decay: float = 1e-4,
    ) -> None:
        for key, value, valid in (("head", head, HEADS), ("inference", inference, INFERENCE)):
            if value not in valid:
                raise UserError(f"{key}: {value!r}; {nearest(value, valid)}")
        if min(steps, batch, 1 if crop is None else crop) < 1 or not lr:
            raise UserError(
                f"steps {steps}, batch {batch}, crop {crop}, lr {list(lr)}; valid: positive, one rate or more"
            )
        self.head, self.inference, self.crop = head, inference, crop
        self.steps, self.batch, self.lr, self.weight_decay = steps, batch, tuple(sorted(lr)), weight_decay

    def missing(self, subject: Subject) -> str | None:
        return mask_problem(subject)

    def evaluate(self, subject: Subject) -> Result:
        """Scores on test, with the learning rate that was best on val."""
        task = _Task(self, subject)
        heads, losses = task.train()
        on_val = [scores(counted.sum(0))["miou"] for counted in task.areas(heads, "val")]
        best = int(np.nanargmax(on_val))
        if not losses[:, best].isfinite().all():
            raise UserError(
                f"{self.name} of {subject.name}: the loss is not finite with lr {self.lr[best]:g}; lower it"
            )
        (counted,) = task.areas([heads[best]], "test")
        total = counted.sum(0)
        stretches = losses[:, best].split(max(1, self.steps // 20))
        ends = np.cumsum([len(x) for x in stretches])
        return Result(
            metrics=scores(total),
            protocol={
                "features": {
                    "linear": "feature map, batch norm, 1x1 convolution, bilinear logits",
                    "fpn": "pyramid of feature maps, a convolution each, summed, 1x1 convolution, bilinear logits",
                }[self.head],
                "head": self.head,
                "inference": self.inference,
                "crop": task.crop,
                "window_stride": task.window_stride,
                "chosen": {"lr": self.lr[best]},
                "grid": {"lr": list(self.lr)},
                "val_miou": {f"{lr:g}": miou for lr, miou in zip(self.lr, on_val, strict=True)},
                "at_edge": len(self.lr) > 1 and best in (0, len(self.lr) - 1),
                "solver": f"AdamW, {self.steps} steps of {self.batch} crops, linear warm-up, polynomial {POWER}",
                "weight_decay": self.weight_decay,
                "ignore": IGNORE,
                "classes": task.classes,
                "chance": constant_miou(total),
            },
            resamples={
                "miou": bootstrap(
                    counted.reshape(len(counted), -1),
                    lambda means: np.array([scores(m.reshape(3, task.classes))["miou"] for m in means]),
                    seed=subject.seed,
                )
            },
            series={"loss": [(float(end), float(x.mean())) for end, x in zip(ends, stretches, strict=True)]},
        )


def polynomial(step: int, steps: int, warm: int) -> float:
    """Learning rate at a step as a share of the peak: linear up over `warm` steps, then (1 - progress) ** 0.9."""
    return (step + 1) / (warm + 1) if step < warm else (1 - (step - warm) / max(1, steps - warm)) ** POWER


class _Task:
    """One model and its data."""

    def __init__(self, probe: SegmentationSgdProbe, subject: Subject) -> None:
        self.probe, self.subject = probe, subject
        self.device = device_of(subject.model)
        self.classes = mask_classes(subject)
        first = next(self.read("train"))
        self.side = probe.crop or min(first.seg.shape)
        self.crop = self.new_head().crop
        self.window_stride = max(1, round((1 - OVERLAP) * self.crop))

    def new_head(self) -> Segmenter:
        return segmenter(self.probe.head, self.subject.model, self.classes, self.side, self.device)

    def read(self, role: str) -> Iterator[Scene]:
        for sample in self.subject.samples(role, ("seg",), raw=True):
            image, seg = torch.as_tensor(sample["image"]), torch.as_tensor(sample["seg"])
            if sides(image) != sides(seg):
                raise UserError(
                    f"sample {sample['key']}: image of {sides(image)} pixels, mask of {sides(seg)}; write it again"
                )
            top = int(seg.masked_fill(seg == IGNORE, 0).max())
            if top >= self.classes:
                raise UserError(
                    f"sample {sample['key']}: mask value {top}; valid: 0 to {self.classes - 1} and {IGNORE}"
                )
            yield Scene(image, seg)

    def train(self) -> tuple[list[Segmenter], Tensor]:
        """A head for each learning rate, all from the same beginning, and (steps, heads) their losses."""
        probe, device = self.probe, self.device
        rng = np.random.default_rng(self.subject.seed)
        generator = torch.Generator().manual_seed(self.subject.seed)
        view = TrainView(size=self.crop, scale=ZOOM, ratio=(1.0, 1.0), flip=0.5)
        drawn = cast("Iterator[Scene]", shuffled(cast(Any, lambda: self.read("train")), ROOM, rng))
        heads = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for _ in probe.lr:
                torch.manual_seed(self.subject.seed)
                heads.append(self.new_head().train())
        groups = [{"params": list(head.parameters()), "lr": lr} for head, lr in zip(heads, probe.lr, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=probe.weight_decay)
        warm = round(WARM * probe.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: polynomial(step, probe.steps, warm))
        losses = torch.zeros(probe.steps, len(heads), device=device)
        for step in range(probe.steps):
            some = [view.sample(one._asdict(), generator) for one in itertools.islice(drawn, probe.batch)]
            images = torch.stack([one["image"] for one in some]).to(device).float() / 255
            truth = torch.stack([one["seg"] for one in some]).to(device).long()
            maps = heads[0].frozen(images)
            loss = torch.stack([_loss(head(maps, (self.crop, self.crop)), truth) for head in heads])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
        return [head.eval() for head in heads], losses.cpu()

    def areas(self, heads: Sequence[Segmenter], role: str) -> list[np.ndarray]:
        """For each head (N, 3, K), see `count_areas`."""
        found: list[list[np.ndarray]] = [[] for _ in heads]
        for _, same in itertools.groupby(self.read(role), lambda one: one.seg.shape):
            while some := list(itertools.islice(same, self.probe.batch)):
                truth = np.stack([one.seg.numpy() for one in some])
                images = torch.stack([one.image for one in some])
                for parts, predicted in zip(found, self.predict(heads, images), strict=True):
                    parts.append(count_areas(predicted, truth, self.classes))
        return [np.concatenate(parts) for parts in found]

    @torch.no_grad()
    def predict(self, heads: Sequence[Segmenter], images: Tensor) -> Iterator[np.ndarray]:
        """(B, 3, H, W) uint8 -> for each head (B, H, W) classes."""
        stored = sides(images)
        images = images.to(self.device).float() / 255
        scale = self.crop / min(stored)
        size = max(self.crop, round(stored[0] * scale)), max(self.crop, round(stored[1] * scale))
        images = resize(images, size, "bilinear")
        if self.probe.inference == "slide":
            canvas, shown = size, (self.crop, self.crop)
            corners = windows(size, self.crop, self.window_stride)
        else:
            canvas = shown = _round_up(size, heads[0].stride)
            corners = [(0, 0)]
            images = F.pad(images, (0, canvas[1] - size[1], 0, canvas[0] - size[0]), mode="replicate")
        looked = [heads[0].frozen(images[..., y : y + shown[0], x : x + shown[1]]) for y, x in corners]
        for head in heads:
            parts = ((corner, head(maps, shown)) for corner, maps in zip(corners, looked, strict=True))
            logits = merge(parts, canvas)[..., : size[0], : size[1]]
            yield F.interpolate(logits, stored, mode="bilinear", align_corners=False).argmax(1).cpu().numpy()


def _round_up(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that aren't ignored; 0 where all are."""
    counted = (truth != IGNORE).sum()
    return F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum") / counted.clamp(min=1)
