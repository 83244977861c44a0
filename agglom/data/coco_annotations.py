"""COCO's annotation files, checked while they are read: every complaint names the file and the id."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple

from agglom.errors import UserError, brief


class Listed(NamedTuple):
    """An image as a file lists it; `size` is (width, height) in pixels, or None in a file of captions."""

    file: str
    size: tuple[int, int] | None


class Thing(NamedTuple):
    """One annotated object.

    `box` is [x, y, w, h] in pixels, inside the image; `label` counts from 0; `mask` is a list of polygons
    [x0, y0, x1, y1, ...], a run-length encoding {"size": [H, W], "counts": ...}, or None where there is none.
    """

    box: list[float]
    label: int
    crowd: bool
    mask: list[list[float]] | dict[str, Any] | None


class Segments(NamedTuple):
    """The panoptic map of an image: its PNG's name, and segment id -> number of the class."""

    file: str
    classes: dict[int, int]


@dataclass(frozen=True)
class Annotations:
    """One file: `images` by id, and for each that has any, what is annotated on it.

    `classes` are the names in the order of the category ids; `counts` says what was dropped.
    """

    images: dict[int, Listed]
    of: Mapping[int, Any]
    classes: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)


def read_instances(path: Path) -> Annotations:
    """instances_*.json -> image id -> list[Thing].

    Boxes are clipped to their image. Annotations without any area left are dropped and counted, as are polygons of
    fewer than three points (their instance stays).

    Raises:
        UserError: a missing or broken file, an id twice, or one that the file does not know.
    """
    body = _read(path, ("images", "annotations", "categories"))
    images, (numbers, names) = _images(path, body, sized=True), _categories(path, body)
    of: dict[int, list[Thing]] = {}
    counts = Counter(boxes_without_area=0, polygons_without_area=0)
    for key, item in _by_id(path, "annotations", body["annotations"]).items():
        what = f"{path}: annotation {key}"
        image, label = _known(what, item, "image_id", images), numbers[_known(what, item, "category_id", numbers)]
        size = images[image].size
        assert size is not None
        box = clip_box(_numbers(f"{what}: bbox", item.get("bbox"), 4), size)
        if box is None:
            counts["boxes_without_area"] += 1
            continue
        mask = _mask(what, item.get("segmentation"), counts)
        of.setdefault(image, []).append(Thing(box, label, bool(item.get("iscrowd", 0)), mask))
    return Annotations(images, of, names, counts)


def read_captions(path: Path) -> Annotations:
    """captions_*.json -> image id -> list[str] in the file's order, each on one line.

    Raises:
        UserError: a missing or broken file, an id twice, or one that the file does not know.
    """
    body = _read(path, ("images", "annotations"))
    images = _images(path, body, sized=False)
    of: dict[int, list[str]] = {}
    for key, item in _by_id(path, "annotations", body["annotations"]).items():
        what = f"{path}: annotation {key}"
        if not isinstance(item.get("caption"), str):
            raise UserError(f"{what}: caption {item.get('caption')!r}; valid: a text; mend the file")
        if caption := " ".join(item["caption"].split()):
            of.setdefault(_known(what, item, "image_id", images), []).append(caption)
    return Annotations(images, of)


def read_panoptic(path: Path) -> Annotations:
    """panoptic_*.json -> image id -> Segments. Classes are things and stuff together.

    Raises:
        UserError: a missing or broken file, an image or segment twice, or an id that the file does not know.
    """
    body = _read(path, ("images", "annotations", "categories"))
    images, (numbers, names) = _images(path, body, sized=True), _categories(path, body)
    of: dict[int, Segments] = {}
    for item in body["annotations"]:
        what = f"{path}: annotation of image {item.get('image_id')!r}"
        image = _known(what, item, "image_id", images)
        if image in of:
            raise UserError(f"{what}: twice; keep one")
        if not isinstance(item.get("file_name"), str) or not isinstance(item.get("segments_info"), list):
            raise UserError(f"{what}: no file_name and segments_info; is this a panoptic file?")
        segments = _by_id(path, f"segments of image {image}", item["segments_info"])
        classes = {
            key: numbers[_known(f"{what}: segment {key}", segment, "category_id", numbers)]
            for key, segment in segments.items()
        }
        of[image] = Segments(item["file_name"], classes)
    return Annotations(images, of, names)


def clip_box(box: list[float], size: tuple[int, int]) -> list[float] | None:
    """The part of [x, y, w, h] inside an image of (width, height) pixels, or None if it has no area.

    A box that is inside already comes back as it is: x + w - x is not always w.
    """
    x, y, w, h = box
    width, height = size
    if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return None
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]


def read_json(path: Path) -> Any:
    """Raises UserError: no such file, or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as err:
        raise UserError(f"{path}: can't be read ({err.strerror}); name an annotation file that is there") from err
    except (ValueError, RecursionError) as err:
        raise UserError(f"{path}: not readable as JSON ({brief(err)}); download or write it again") from err


def _read(path: Path, lists: Iterable[str]) -> dict[str, Any]:
    body = read_json(path)
    for name in lists:
        items = body.get(name) if isinstance(body, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{path}: no list {name!r} of objects; valid: a file in COCO's format")
    return body


def _by_id(path: Path, kind: str, items: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for item in items:
        key = item.get("id")
        if type(key) is not int:
            raise UserError(f"{path}: {kind}: id {key!r}; valid: a whole number; mend the file")
        if key in found:
            raise UserError(f"{path}: {kind}: id {key} twice; give each its own")
        found[key] = item
    return found


def _images(path: Path, body: dict[str, Any], *, sized: bool) -> dict[int, Listed]:
    images = {}
    for key, item in _by_id(path, "images", body["images"]).items():
        if not isinstance(item.get("file_name"), str):
            raise UserError(f"{path}: image {key}: file_name {item.get('file_name')!r}; valid: a text; mend the file")
        size = (item.get("width"), item.get("height"))
        if sized and not all(type(side) is int and side > 0 for side in size):
            raise UserError(f"{path}: image {key}: width, height {size}; valid: whole numbers above 0; mend the file")
        images[key] = Listed(item["file_name"], size if sized else None)  # type: ignore[arg-type]
    return images


def _categories(path: Path, body: dict[str, Any]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Category id -> number from 0 on, in the order of the ids; and the names by number."""
    found = _by_id(path, "categories", body["categories"])
    if not found:
        raise UserError(f"{path}: no categories; valid: at least one; is it a file of captions?")
    for key, item in found.items():
        if not isinstance(item.get("name"), str):
            raise UserError(f"{path}: category {key}: name {item.get('name')!r}; valid: a text; mend the file")
    ids = sorted(found)
    return {key: number for number, key in enumerate(ids)}, tuple(found[key]["name"] for key in ids)


def _known(what: str, item: dict[str, Any], name: str, valid: Mapping[int, Any]) -> int:
    key = item.get(name)
    if type(key) is not int or key not in valid:
        raise UserError(f"{what}: {name} {key!r} is not in the file; add it or remove the annotation")
    return key


def _numbers(what: str, values: Any, count: int | None = None) -> list[float]:
    good = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not good or (count is not None and len(values) != count):
        raise UserError(f"{what}: {brief(ValueError(repr(values)), 60)}; valid: a list of {count or 'finite'} numbers")
    return values


def _mask(what: str, mask: Any, counts: Counter[str]) -> list[list[float]] | dict[str, Any] | None:
    if mask is None:
        return None
    if isinstance(mask, dict) and "counts" in mask and "size" in mask:
        return mask
    if not isinstance(mask, list):
        raise UserError(f"{what}: segmentation of type {type(mask).__name__}; valid: polygons or size and counts")
    # the mask library would read a polygon of four numbers as a box
    good = [p for p in mask if len(_numbers(f"{what}: segmentation", p)) >= 6 and len(p) % 2 == 0]
    counts["polygons_without_area"] += len(mask) - len(good)
    return good or None
