"""Shifted crops: student and every teacher see their own crop of an image, whole patches apart (C-RADIOv4, 2.3).

What a teacher always does at the same place (its positional artefacts, SAM's window borders) lands on another cell of
the student at every step, so it can't be predicted and is not learnt; what belongs to the image moves along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agglom.draws import generator


@dataclass(frozen=True)
class ShiftOptions:
    """How far crops are shifted, in patches of the student.

    Attributes:
        std: of the normal that shifts are rounded from, on each axis (C-RADIOv4: 0.5).
        limit: greatest shift; images need a margin of `limit` patches on each side (`data.margin`).
        seed: of the shifts.
    """

    std: float = 0.5
    limit: int = 2
    seed: int = 0


def draw(options: ShiftOptions, number: int, *key: object) -> Tensor:
    """(number, 2) whole patches down and right, int64, on the CPU; they follow from seed and key alone."""
    shifts = (torch.randn(number, 2, generator=generator(options.seed, *key)) * options.std).round()
    return shifts.clamp(-options.limit, options.limit).long()


def crop(images: Tensor, corner: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a window out of every image.

    Args:
        images: (B, C, H, W).
        corner: (B, 2) int64, row and column of the window's upper left pixel.
        size: of the windows, in pixels.

    Returns:
        (B, C, *size).
    """
    rows, columns = (corner[:, i, None] + torch.arange(size[i], device=images.device) for i in (0, 1))
    return _take(images, rows, columns)


def move(spatial: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Look at a map from a frame whose origin lies `shift` cells further down and right: out[v] = in[v + shift].

    Args:
        spatial: (B, C, H, W).
        shift: (B, 2) int64, cells down and right.

    Returns:
        The moved map (B, C, H, W), and (B, H, W) bool: which of its cells the old frame holds. Others hold anything.
    """
    height, width = spatial.shape[-2:]
    rows = shift[:, 0, None] + torch.arange(height, device=spatial.device)
    columns = shift[:, 1, None] + torch.arange(width, device=spatial.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return _take(spatial, rows.clamp(0, height - 1), columns.clamp(0, width - 1)), inside


def _take(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """maps (B, C, H, W) at rows (B, h) and columns (B, w) -> (B, C, h, w)."""
    batch, channels, height, _ = maps.shape
    chosen = maps.gather(3, columns[:, None, None].expand(batch, channels, height, -1))
    return chosen.gather(2, rows[:, None, :, None].expand(batch, channels, -1, columns.shape[1]))
