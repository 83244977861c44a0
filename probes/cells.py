"""A seeded draw of feature-map cells, for what needs many cells but not all of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 32  # images read from disk at a time


class Draw(NamedTuple):
    """Which cells of which images.

    Attributes:
        rows: (n,) images, ascending.
        cells: (n, m) cells of each, row-major numbers without repetition.
    """

    rows: np.ndarray
    cells: np.ndarray


def draw_cells(images: int, grid: tuple[int, int], total: int, seed: int) -> Draw:
    """About `total` cells in all: the same number from every image, one from evenly spaced images where these are more.

    Args:
        images: N.
        grid: (H, W).
        total: cells.
        seed: the same for every model, so that two maps on one grid are read at the same cells.
    """
    rows = np.unique(np.linspace(0, images - 1, min(images, total)).round().astype(np.int64))
    count = grid[0] * grid[1]
    each = max(1, min(count, total // max(1, images)))
    rng = np.random.default_rng(seed)
    return Draw(rows, np.stack([rng.choice(count, each, replace=False) for _ in rows]))


def take_cells(maps: Tensor, cells: np.ndarray) -> Tensor:
    """Maps (n, C, H, W), cells (n, m) -> (n, m, C) float32."""
    flat = maps.flatten(2)  # (n, C, H W)
    at = torch.from_numpy(cells)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, at).transpose(1, 2).float()


def read_cells(spatial: np.ndarray, draw: Draw) -> Tensor:
    """Stored maps (N, C, H, W) -> the drawn cells (n, m, C) float32, in chunks of images."""
    parts = [slice(start, start + CHUNK) for start in range(0, len(draw.rows), CHUNK)]
    return torch.cat([take_cells(torch.from_numpy(spatial[draw.rows[p]]), draw.cells[p]) for p in parts])


def positions(cells: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Cell numbers (n, m) -> (n, m, 2) float32 (y, x) of their centres, from -1 to 1 across the image."""
    rows, columns = np.divmod(cells, grid[1])
    return torch.from_numpy(np.stack([(2 * rows + 1) / grid[0] - 1, (2 * columns + 1) / grid[1] - 1], -1)).float()
