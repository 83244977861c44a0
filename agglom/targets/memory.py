"""A teacher's features of images that it has seen, for training on views that never change."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from agglom.features import Features
from agglom.teachers import Teacher


class Memory:
    """Runs a frozen teacher once an image, and remembers by key.

    Right only where a key always stands for the same pixels, that is without random crops and flips. Held in RAM as
    float16 (values beyond its range would be lost, so they are refused), not part of a checkpoint, each rank its own.

    Bytes: 2 x (D + C x H x W) an image and teacher.
    """

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def features(self, encoder: Teacher, images: Tensor, keys: Sequence[str]) -> Features:
        """The encoder's features of a batch, running it on the images that are new only.

        Args:
            encoder: the teacher that this memory belongs to.
            images: (B, 3, H, W) in [0, 1].
            keys: B keys, of the images.

        Returns:
            Features, float32, on the images' device, rounded to float16 for new and known images alike.
        """
        new = [i for i, key in enumerate(keys) if key not in self._rows]
        if new:
            fresh = encoder(images if len(new) == len(keys) else images[new])
            summary, spatial = (None if part is None else _half(part) for part in fresh)
            for row, i in enumerate(new):
                self._rows[keys[i]] = _row(summary, row), _row(spatial, row)
        rows = [self._rows[key] for key in keys]
        return Features(
            _batch([row[0] for row in rows], images.device), _batch([row[1] for row in rows], images.device)
        )


def _row(part: Tensor | None, row: int) -> Tensor | None:
    return None if part is None else part[row]


def _batch(rows: list[Tensor | None], device: torch.device) -> Tensor | None:
    there = [row for row in rows if row is not None]
    if not there:
        return None
    with torch.autocast("cpu", enabled=False):  # which can't stack float16 (torch 2.14)
        return torch.stack(there).to(device).float()


def _half(features: Tensor) -> Tensor:
    half = features.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise ValueError("features beyond float16's range can't be remembered; set remember_teachers: false")
    return half
