"""What a frozen teacher is shown of a batch: the images whole, at the size where grids match, or tiled as a mosaic."""

from __future__ import annotations

from typing import Callable

from torch import Tensor

from agglom.features import Features, InputSpec, resize
from agglom.mosaic import pack, places, unpack

Encoder = Callable[[Tensor], Features]
Made = dict[tuple[tuple[int, int], str], Tensor]  # (size, interpolation) -> images resized so


def look(
    encoder: Encoder,
    spec: InputSpec,
    images: Tensor,
    *,
    resolution: tuple[int, int],
    grid: tuple[int, int],
    mosaic: bool = False,
    made: Made | None = None,
) -> Features:
    """A teacher's features of a batch.

    Args:
        encoder: images in [0, 1] -> Features; resizes by itself where its size is fixed.
        spec: its input contract. With a free size it is shown the images at the size where its grid is the student's.
        images: (B, 3, H, W) in [0, 1].
        resolution: (h, w) in pixels at which the student sees them.
        grid: cells of the student's map.
        mosaic: tile the images, at the student's resolution, where at least two share the teacher's canvas.
        made: resized copies of these very images, kept for whoever looks at them next; None keeps none.

    Raises:
        ValueError: a mosaic of images that don't cover whole cells of the teacher.
    """

    def at(size: tuple[int, int]) -> Tensor:
        key = (size, spec.interpolation)
        if made is None:
            return resize(images, *key)
        if key not in made:
            made[key] = resize(images, *key)
        return made[key]

    if spec.size is None:
        return encoder(at((grid[0] * spec.stride, grid[1] * spec.stride)))
    if not mosaic or places(resolution, spec) == (1, 1):
        return encoder(images if made is None else at(spec.size))
    tiles = pack(at(resolution), spec)
    spatial = encoder(tiles).spatial
    assert spatial is not None, "a mosaic is of maps"
    return Features(None, unpack(spatial, len(images), resolution, spec))
