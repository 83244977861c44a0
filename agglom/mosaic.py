"""Mosaic: k x k small images on the canvas of a teacher that knows one large size only (RADIOv2.5, section 4).

Such a teacher (SAM) would see a small image blown up to its own size, at its full cost for each. In a mosaic it sees
them at their own size, k * k for the price of one, and each image's features are cut out of its map without
interpolation: every image lies on whole cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.features import InputSpec


def places(size: tuple[int, int], canvas: InputSpec) -> tuple[int, int]:
    """How many images of `size` pixels fit below and beside each other; (1, 1) where a mosaic gains nothing.

    Raises:
        ValueError: the canvas has no fixed size, or the image does not cover whole cells.
    """
    if canvas.size is None:
        raise ValueError("a mosaic needs a canvas of fixed size")
    if size[0] % canvas.stride or size[1] % canvas.stride:
        raise ValueError(f"an image of {size} pixels does not cover whole cells of {canvas.stride}")
    down, beside = (room // side for room, side in zip(canvas.size, size, strict=True))
    return (down, beside) if down * beside > 1 else (1, 1)


def pack(images: Tensor, canvas: InputSpec) -> Tensor:
    """Tile images onto canvases, row by row; what is left over has the teacher's mean colour.

    Args:
        images: (B, 3, h, w) in [0, 1].
        canvas: the teacher's input contract.

    Returns:
        (ceil(B / k^2), 3, *canvas.size).
    """
    batch, _, height, width = images.shape
    down, beside = places((height, width), canvas)
    cell_height, cell_width = _cell(canvas, down, beside)
    mean = torch.tensor(canvas.mean, dtype=images.dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    # padding with 0 after taking the mean away is padding with the mean
    cells = F.pad(images - mean, (0, cell_width - width, 0, cell_height - height))
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -batch % (down * beside)))
    tiled = cells.unflatten(0, (-1, down, beside)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    rest = (canvas.size[1] - tiled.shape[3], canvas.size[0] - tiled.shape[2])  # type: ignore[index]
    return F.pad(tiled, (0, rest[0], 0, rest[1])) + mean


def unpack(spatial: Tensor, number: int, size: tuple[int, int], canvas: InputSpec) -> Tensor:
    """Cut the images' features out of the canvases' maps.

    Args:
        spatial: (ceil(B / k^2), C, H, W), the teacher's map of what `pack` gave.
        number: B.
        size: of the images, in pixels.
        canvas: the teacher's input contract.

    Returns:
        (B, C, h / stride, w / stride).
    """
    down, beside = places(size, canvas)
    height, width = (side // canvas.stride for side in _cell(canvas, down, beside))
    cells = spatial[:, :, : down * height, : beside * width]
    cells = cells.unflatten(3, (beside, width)).unflatten(2, (down, height)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return cells[:number, :, : size[0] // canvas.stride, : size[1] // canvas.stride]


def _cell(canvas: InputSpec, down: int, beside: int) -> tuple[int, int]:
    """Pixels of a place: the canvas divided by their number, cut down to whole feature cells."""
    assert canvas.size is not None
    return (
        canvas.size[0] // down // canvas.stride * canvas.stride,
        canvas.size[1] // beside // canvas.stride * canvas.stride,
    )
