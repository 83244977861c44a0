"""How well a feature map follows its image: shift the pixels, move the map back, and see what is left."""

from __future__ import annotations

import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError
from agglom.features import Backbone, sides


@torch.no_grad()
def shift_errors(model: Backbone, images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Relative error of the map of a shifted image, moved back, against the map of the image, over their overlap.

    An image shifted by (y, x) has at each pixel p what the image has at p + (y, x); what lies beyond the edge is
    mirrored. Its map is moved back by as many cells, bilinearly where these are no whole cells. The overlap are the
    cells that are made from cells which lie in the image as a whole. With F the map of the image, F' the one moved back
    and m the mean of F over the overlap, the error is |F' - F| / |F - m|, Euclidean norms over overlap and channels: 0
    for a map that moves along with its image, about the square root of 2 for two maps that have nothing to do with each
    other. Half a cell is also charged what linear interpolation smoothes away.

    Args:
        model: anything with a feature map.
        images: (B, 3, H, W) in [0, 1].
        shifts: S pairs of pixels, down and right.

    Returns:
        (S, B) float32; NaN for an image whose map is the same in all cells.

    Raises:
        UserError: a model without a feature map, a shift that leaves no overlap.
    """
    size, reach = sides(images), max((abs(n) for shift in shifts for n in shift), default=0)
    if reach >= min(size):
        raise UserError(f"shifts: {reach} pixels; valid: less than the image's {min(size)}; take smaller ones")
    canvas = F.pad(images, (reach,) * 4, mode="reflect")
    still = _map(model, images)
    errors = []
    for down, right in shifts:
        top, left = reach + down, reach + right
        moved = _map(model, canvas[..., top : top + size[0], left : left + size[1]])
        ours, theirs = still, moved
        for dim, pixels, side in ((2, down, size[0]), (3, right, size[1])):
            ours, theirs = _overlap(ours, theirs, dim, pixels * still.shape[dim] / side)
        if not ours.numel():
            raise UserError(
                f"shifts: {(down, right)} pixels leave no overlap on a grid of {sides(still)}; take smaller ones"
            )
        spread = (ours - ours.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1)
        distance = (theirs - ours).flatten(1).norm(dim=1)
        errors.append(torch.where(spread > 0, distance / spread, torch.nan))
    return torch.stack(errors)


def _map(model: Backbone, images: Tensor) -> Tensor:
    spatial = model(images).spatial
    if spatial is None:
        raise UserError(f"{type(model).__name__} has no feature map to shift; take another model")
    return spatial.float()


def _overlap(still: Tensor, moved: Tensor, dim: int, cells: float) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells v of `still` for which v - cells lies between whole cells of `moved`, and these."""
    count = still.shape[dim]
    low, high = max(0, math.ceil(-cells)), min(count - 1, math.floor(count - 1 - cells))  # no mirrored pixel in them
    first, last = math.ceil(low + cells), math.floor(high + cells)
    length = max(0, last - first + 1)
    start = math.floor(first - cells) if length else 0
    part = first - cells - start
    theirs = moved.narrow(dim, start, length)
    if length and part:
        theirs = theirs.lerp(moved.narrow(dim, start + 1, length), part)
    return still.narrow(dim, first if length else 0, length), theirs
