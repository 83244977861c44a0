"""Block-wise masks of patches, for a student that predicts what an EMA teacher sees there.

Rectangles of random size and shape are laid over a grid of patches until a wanted number is covered, as BEiT (Bao et
al. 2021, arXiv 2106.08254) describes it; iBOT (Zhou et al. 2021, arXiv 2111.07832) masks a part of the images so, with
ratios spread over a range, and leaves the others whole.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from agglom.errors import UserError

LEAST = 4  # patches of a block
ASPECT = 0.3  # least height / width of a block; the greatest is 1 / 0.3
TRIES = 100  # blocks drawn for an image


class Positions(NamedTuple):
    """Masked patches of a batch as lists of one length M, whatever the mask.

    Attributes:
        patch: int64 (M,), place among the B x H x W patches in a row; rising, then 0 where not valid.
        image: int64 (M,), which of the B images; 0 where not valid.
        valid: bool (M,), False in what fills the lists up.
    """

    patch: Tensor
    image: Tensor
    valid: Tensor


def block_masks(
    count: int,
    grid: tuple[int, int],
    *,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    generator: torch.Generator | None,
) -> Tensor:
    """Masks of `count` images.

    `share` of the images, to the nearest whole number, are masked. Their ratios are spread evenly: the range is cut
    into as many equal parts as there are masked images, and each part gives one ratio, drawn in it. Which image has
    which is random. An image of ratio r has round(r x H x W) masked patches (at least 1), sometimes up to LEAST - 1
    less: every masked patch belongs to a block of LEAST or more patches that is masked as a whole (where less than that
    are wanted: of any number), and what no block fits into after TRIES of them is left.

    Args:
        count: images.
        grid: (H, W), in patches.
        share: part of the images that are masked.
        ratio: least and greatest part of an image's patches that are masked.
        generator: of the CPU; all randomness is from it. None: torch's global one.

    Returns:
        bool (count, H, W) on the CPU, True where masked.

    Raises:
        UserError: a value outside its range.
    """
    _check(count, grid, share, ratio)
    masks = torch.zeros(count, *grid, dtype=torch.bool)
    places = torch.randperm(count, generator=generator).tolist()
    parts = list(pairwise(_edges(count, share, ratio)))
    drawn = torch.rand(len(parts), generator=generator).tolist()
    for (low, high), place, part in zip(parts, places, drawn, strict=False):  # the other places stay whole
        _lay_blocks(masks[place], _patches(low + part * (high - low), grid), generator)
    return masks


def most_masked(
    count: int, grid: tuple[int, int], *, share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)
) -> int:
    """Greatest number of masked patches that `block_masks` of these arguments can have: each ratio at its part's end.

    About count x share x (mean ratio x H x W + half of a part), so filled lists are nearly all valid in large batches.
    """
    _check(count, grid, share, ratio)
    return sum(_patches(high, grid) for high in _edges(count, share, ratio)[1:])


def positions(mask: Tensor, *, share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)) -> Positions:
    """Where the masked patches are, in lists of `most_masked` entries: their shape depends on the options alone.

    A loss can gather with `patch` and weight with `valid`; nothing waits for the accelerator to say how many there are.

    Args:
        mask: bool (B, H, W) of `block_masks`, on any device.
        share, ratio: those of `block_masks`.

    Raises:
        UserError: more masked patches than these options allow (seen on the CPU only, elsewhere it would have to wait).
    """
    count, height, width = mask.shape
    length = most_masked(count, (height, width), share=share, ratio=ratio)
    flat = mask.flatten()
    if mask.device.type == "cpu" and int(flat.sum()) > length:
        raise UserError(
            f"mask: {int(flat.sum())} masked patches; valid: at most {length} with share {share} and ratio "
            f"{tuple(ratio)}; give the options that the mask was made with"
        )
    patch = torch.argsort(~flat, stable=True)[:length]  # masked ones first, in their order
    valid = flat[patch]
    patch = patch * valid
    return Positions(patch, patch // (height * width), valid)


def _check(count: int, grid: tuple[int, int], share: float, ratio: tuple[float, float]) -> None:
    if count < 0:
        raise UserError(f"count: {count}; valid: 0 or more images")
    if min(grid) < 1:
        raise UserError(f"grid: {tuple(grid)}; valid: 1 or more patches in height and width")
    if not 0 <= share <= 1:
        raise UserError(f"share: {share}; valid: a part of the images from 0 to 1")
    if not 0 <= ratio[0] <= ratio[1] <= 1:
        raise UserError(f"ratio: {tuple(ratio)}; valid: 0 <= least <= greatest <= 1 (parts of the patches)")


def _edges(count: int, share: float, ratio: tuple[float, float]) -> list[float]:
    """Bounds of the parts that the range of ratios is cut into, one part a masked image."""
    masked = math.floor(share * count + 0.5)  # halves up: a single image is masked
    return [ratio[0] + (ratio[1] - ratio[0]) * part / max(masked, 1) for part in range(masked + 1)]


def _patches(ratio: float, grid: tuple[int, int]) -> int:
    return max(1, round(ratio * grid[0] * grid[1]))


def _lay_blocks(mask: Tensor, wanted: int, generator: torch.Generator | None) -> None:
    """Mask up to `wanted` patches, and at least one, of an empty bool (H, W), in place."""
    rows, columns = mask.shape
    cells = mask.numpy()  # a view; indexing it costs a tenth of a tensor's
    least = LEAST if wanted >= LEAST else 1
    done = 0
    while not done:  # a second round happens in grids of one row, where few shapes fit
        for area, aspect, y, x in torch.rand(TRIES, 4, generator=generator).tolist():
            area = least + area * max(wanted - done - least, 0)
            aspect = math.exp((2 * aspect - 1) * math.log(1 / ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= columns and height * width >= least):
                continue
            top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
            block = cells[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= wanted - done:
                block[:] = True
                done += new
            if done == wanted:
                return
