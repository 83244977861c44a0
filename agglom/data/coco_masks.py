"""Polygons, run-length encodings and panoptic maps into one class a pixel."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import numpy as np

from agglom.data.coco_annotations import Thing
from agglom.data.writing import IGNORE


def instance_mask(things: Sequence[Thing], size: tuple[int, int]) -> np.ndarray:
    """Instances on top of each other, the larger below the smaller.

    Args:
        things: of one image.
        size: (width, height) of the image in pixels.

    Returns:
        uint8 (H, W): 0 background, label + 1, and 255 (ignore) in crowds and in the boxes of things without a mask.
        These are stacked by their area like all others: people before a crowd stay people, and a table below a crowd of
        spoons is not taught to be where the spoons are.

    Raises:
        ValueError: a broken run-length encoding, or one of another size.
    """
    layers = []
    for thing in things:
        region = _box_region(thing.box, size) if thing.mask is None else decode(thing.mask, size)
        layers.append((region, IGNORE if thing.crowd or thing.mask is None else thing.label + 1))
    seg = np.zeros((size[1], size[0]), np.uint8)
    for region, value in sorted(layers, key=lambda layer: -int(layer[0].sum())):  # of two equals the later is on top
        seg[region] = value
    return seg


def panoptic_mask(colours: np.ndarray, classes: Mapping[int, int]) -> np.ndarray:
    """A panoptic PNG into classes.

    The id of a segment is R + 256 G + 256^2 B, 0 is void (Kirillov et al. 2019, and the format page of COCO).

    Args:
        colours: uint8 (H, W, 3) RGB.
        classes: segment id -> number of its class, below 255.

    Returns:
        uint8 (H, W): class, 255 in void. A crowd segment has its class.

    Raises:
        ValueError: a colour that is no segment.
    """
    ids = colours.astype(np.int64) @ np.array([1, 256, 256**2])
    found, where = np.unique(ids, return_inverse=True)
    unknown = [int(key) for key in found if key and int(key) not in classes]
    if unknown:
        raise ValueError(f"panoptic map has segment {unknown[0]} that segments_info lacks")
    table = np.array([IGNORE if key == 0 else classes[int(key)] for key in found], np.uint8)
    return table[where.reshape(ids.shape)]


def decode(mask: list[list[float]] | dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Polygons (their union) or a run-length encoding, compressed or not -> bool (H, W).

    Raises:
        ValueError: a broken run-length encoding, or one of another size.
    """
    from faster_coco_eval.core import mask as api

    width, height = size
    if isinstance(mask, dict) and list(mask["size"]) != [height, width]:
        raise ValueError(f"run-length mask of size {mask['size']}, wanted [{height}, {width}]")
    if isinstance(mask, dict) and not isinstance(mask["counts"], list):
        return api.decode(mask).astype(bool)
    runs = api.frPyObjects(mask, height, width)
    return api.decode(api.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def _box_region(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Every pixel that the box touches."""
    x, y, w, h = box
    region = np.zeros((size[1], size[0]), bool)
    region[math.floor(y) : math.ceil(y + h), math.floor(x) : math.ceil(x + w)] = True
    return region
