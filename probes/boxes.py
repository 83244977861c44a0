"""Samples with boxes: checked, brought into a detector's canvas and back, shuffled, put into batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.errors import UserError
from agglom.features import resize
from agglom.probes.coco_ap import Found, Truth

SLACK = 0.01  # pixels that rounding may put a box beyond its image


@dataclass(frozen=True)
class Example:
    """A sample as a detector sees it.

    Attributes:
        row: its number in the split.
        key: of the sample.
        size: (height, width) as stored.
        image: (3, h, w) uint8, resized into the canvas, whose upper left corner it takes.
        truth: in stored pixels.
        flipped: whether the image is mirrored left to right; the truth isn't.
    """

    row: int
    key: str
    size: tuple[int, int]
    image: Tensor
    truth: Truth
    flipped: bool = False

    @property
    def scale(self) -> np.ndarray:
        """(4,) what stored x, y, x, y are multiplied by."""
        height, width = self.image.shape[1:]
        return np.tile([width / self.size[1], height / self.size[0]], 2)

    def mirrored(self) -> Example:
        """Left to right."""
        return replace(self, image=self.image.flip(2), flipped=not self.flipped)

    def target(self, offset: int) -> dict[str, Tensor]:
        """What torchvision's detectors train on: boxes (n, 4) x0, y0, x1, y1 in the canvas, labels from `offset` on."""
        boxes = self.truth.boxes.copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes *= self.scale
        if self.flipped:
            boxes[:, [0, 2]] = self.image.shape[2] - boxes[:, [2, 0]]
        keep = ~self.truth.crowd  # a crowd's box is no object's
        return {
            "boxes": torch.from_numpy(boxes[keep].astype(np.float32)),
            "labels": torch.from_numpy(self.truth.labels[keep] + offset),
        }

    def found(self, detections: Mapping[str, Tensor], offset: int) -> Found:
        """What torchvision's detectors answer -> boxes in stored pixels, inside the image."""
        boxes = detections["boxes"].cpu().double().numpy() / self.scale
        boxes = boxes.clip(0, np.tile(self.size[::-1], 2))
        boxes[:, 2:] -= boxes[:, :2]
        keep = (boxes[:, 2:] > 0).all(1)  # some lie in the canvas' margin
        labels, scores = detections["labels"].cpu().numpy() - offset, detections["scores"].cpu().double().numpy()
        return Found(boxes[keep], labels[keep], scores[keep])


def example(row: int, sample: Mapping[str, Any], canvas: tuple[int, int], classes: int) -> Example:
    """A decoded sample (`key`, `image` uint8 (3, H, W), `boxes`) -> what a detector sees.

    Args:
        row: its number.
        sample: as stored.
        canvas: (height, width) into which the image is resized (bilinear, antialiased), with its aspect ratio.
        classes: K; labels are less.

    Raises:
        UserError: a box that isn't one, without area or outside of its image, or a label that isn't a class.
    """
    image = torch.as_tensor(sample["image"])
    size = image.shape[1], image.shape[2]
    scale = min(side / own for side, own in zip(canvas, size, strict=True))
    height, width = (min(side, max(1, round(own * scale))) for side, own in zip(canvas, size, strict=True))
    if (height, width) != size:
        image = resize(image[None].float() / 255, (height, width), "bilinear")[0].mul(255).round().to(torch.uint8)
    return Example(row, sample["key"], size, image, truth_of(sample["key"], sample["boxes"], size, classes))


def truth_of(key: str, boxes: Sequence[Mapping[str, Any]], size: tuple[int, int], classes: int) -> Truth:
    """A sample's `boxes` field as arrays; see `example`."""
    for box in boxes:
        wrong = f"sample {key}: box {box!r}"
        try:
            x, y, width, height = (float(v) for v in box["bbox"])
            label = box["label"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{wrong}; valid: bbox [x, y, width, height] in pixels, label, iscrowd; write it") from None
        if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
            raise UserError(f"{wrong}; valid: a width and a height above 0; leave such boxes out")
        if x < -SLACK or y < -SLACK or x + width > size[1] + SLACK or y + height > size[0] + SLACK:
            raise UserError(f"{wrong} reaches beyond its image of {size[1]} x {size[0]} pixels; clip it")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise UserError(f"{wrong}; valid: labels 0 to {classes - 1}")
    return Truth(
        np.array([box["bbox"] for box in boxes], np.float64).reshape(-1, 4),
        np.array([box["label"] for box in boxes], np.int64),
        np.array([bool(box.get("iscrowd", 0)) for box in boxes], bool),
    )


def put(examples: Sequence[Example], canvas: tuple[int, int], margin: Sequence[float]) -> Tensor:
    """Images (B, 3, *canvas) in [0, 1] on the CPU, each in the upper left corner; the rest has the margin's colour."""
    out = torch.tensor(margin, dtype=torch.float32).view(1, 3, 1, 1).repeat(len(examples), 1, *canvas)
    for place, one in zip(out, examples, strict=True):
        place[:, : one.image.shape[1], : one.image.shape[2]] = one.image.float().div_(255)
    return out


def shuffled(read: Callable[[], Iterator[Example]], room: int, rng: np.random.Generator) -> Iterator[Example]:
    """Examples in random order without end: every one of them once an epoch, where they fit into memory.

    Where they don't, a buffer of `room` bytes is filled; what is drawn from it makes place for the next that is read.

    Args:
        read: begins to read all of them, in their order.
        room: bytes of pixels.
        rng: draws.
    """
    buffer: list[Example] = []
    used, stream = 0, read()
    for one in stream:
        buffer.append(one)
        used += one.image.numel()
        if used >= room:
            break
    else:
        while buffer:
            for at in rng.permutation(len(buffer)):
                yield buffer[at]
    while buffer:
        for one in stream:
            at = int(rng.integers(len(buffer)))
            yield buffer[at]
            buffer[at] = one
        stream = read()
