"""From the bytes of one sample to typed fields, and from samples to a batch."""

from __future__ import annotations

import json
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.data.faults import BadSample, Fault
from agglom.data.index import EXTENSIONS, Index
from agglom.data.pictures import Picture, TooLarge, decode_image, is_jpeg, open_picture
from agglom.data.writing import IGNORE
from agglom.errors import UserError, brief, nearest

SLACK = 0.01  # pixels that rounding may put a box beyond its image


def check_fields(index: Index, split: str, fields: Sequence[str]) -> None:
    """Before anything is read: are these fields, and does the split have them?

    Raises:
        UserError: an unknown field, or one that the split lacks (naming those it has); an unknown split.
    """
    index.shards(split)
    for name in fields:
        if name not in EXTENSIONS:
            raise UserError(f"fields: {name!r} is not a sample field; {nearest(name, EXTENSIONS)}")
        if name not in index.fields[split]:
            have = ", ".join(index.fields[split]) or "none"
            raise UserError(f"{index.root}: samples of split {split!r} have no field {name!r}; they have: {have}")


def decode_sample(
    raw: Mapping[str, Any], fields: Sequence[str], *, index: Index | None = None, whole: bool = True
) -> dict[str, Any]:
    """One sample as `ShardReader` groups it -> its key and the fields asked for.

    Args:
        raw: extension -> bytes, `__key__`, `__url__`, maybe `__fault__` and `__cut__`.
        fields: any of image, cls, txt, seg, boxes.
        index: whose classes labels and masks must be of; None: any.
        whole: decode the image; False leaves a JPEG to the view that it is for, as a `Picture`.

    Returns:
        `key` str, `shard` str (the shard's file name), `image` uint8 (3, H, W) RGB, `cls` int, or list[int] where a
        sample has any number of labels, `txt` str (several captions: one a line), `seg` uint8 (H, W), `boxes` list of
        dicts.

    Raises:
        BadSample: what is wrong with it, the first thing found.
    """
    if "__fault__" in raw:
        raise BadSample(*raw["__fault__"])
    sample: dict[str, Any] = {"key": raw["__key__"], "shard": raw["__url__"].rpartition("/")[2]}
    for name in fields:
        sample[name] = decode_field(raw, name, whole=whole)
    for fault in contradictions(sample, index):
        raise BadSample(*fault)
    return sample


def sample_faults(raw: Mapping[str, Any], fields: Sequence[str], index: Index) -> list[Fault]:
    """Everything wrong with a sample: as a whole, in each of `fields` and of what else it has, and between them.

    None is found in just those samples that `decode_sample` takes with these fields.
    """
    if "__fault__" in raw:
        return [raw["__fault__"]]
    faults, sample = [], {}
    for name in EXTENSIONS:
        if name not in fields and _extension(raw, name) is None:
            continue
        try:
            sample[name] = decode_field(raw, name)
        except BadSample as err:
            faults.append(err.fault)
    return faults + list(contradictions(sample, index))


def decode_field(raw: Mapping[str, Any], name: str, *, whole: bool = True) -> Any:
    """One field of a sample; see `decode_sample`."""
    extension = _extension(raw, name)
    if extension is None:
        if "__cut__" in raw:
            raise BadSample(*raw["__cut__"])
        have = ", ".join(n for n in EXTENSIONS if _extension(raw, n)) or "none"
        raise BadSample("missing field", f"no field {name!r}; it has: {have}")
    data = raw[extension]
    try:
        return Picture(data) if name == "image" and not whole and is_jpeg(data) else _DECODE[name](data)
    except BadSample:
        raise
    except Exception as err:  # whatever the decoders raise
        kind = "too large" if isinstance(err, TooLarge) else _BAD[name]
        raise BadSample(kind, f"{extension}: {brief(err)}") from err


def _extension(raw: Mapping[str, Any], name: str) -> str | None:
    return next((extension for extension in EXTENSIONS[name] if extension in raw), None)


def contradictions(sample: Mapping[str, Any], index: Index | None) -> Iterator[Fault]:
    """Where decoded fields of a sample don't fit to each other, or labels not to the index."""
    pixels, seg, boxes = (sample.get(name) for name in ("image", "seg", "boxes"))
    size = next((tuple(field.shape[-2:]) for field in (pixels, seg) if field is not None), None)
    if seg is not None and size != tuple(seg.shape):
        yield Fault("mask size", f"image of {size} pixels, mask of {tuple(seg.shape)} (height, width)")
    names = index.classes if index else None
    if seg is not None and index and index.seg_classes:
        wrong = seg[(seg >= len(index.seg_classes)) & (seg != IGNORE)]
        if len(wrong):
            yield Fault("mask value", f"mask value {wrong.max()}; valid: 0 to {len(index.seg_classes) - 1} and 255")
    cls = sample.get("cls", [])
    for label in cls if isinstance(cls, list) else [cls]:
        if not (0 <= label < len(names) if names else abs(label) < 1 << 63):
            yield Fault("class value", f"cls {label}; valid: {_labels(names)}")
            break
    if fault := next(filter(None, (_box_fault(box, size, names) for box in boxes or ())), None):
        yield fault


def _box_fault(box: Mapping[str, Any], size: Sequence[int] | None, names: Sequence[str] | None) -> Fault | None:
    x, y, width, height = box["bbox"]
    if width <= 0 or height <= 0:
        return Fault("bad box", f"box {box}; valid: a width and a height above 0")
    if size and (min(x, y) < -SLACK or x + width > size[1] + SLACK or y + height > size[0] + SLACK):
        return Fault("bad box", f"box {box} reaches beyond its image of {size[1]} x {size[0]} pixels")
    if names and not 0 <= box["label"] < len(names):
        return Fault("class value", f"box {box}; valid: labels {_labels(names)}")
    return None


def _labels(names: Sequence[str] | None) -> str:
    return f"0 to {len(names) - 1}, the index's classes" if names else "whole numbers of 64 bits"


def image_bytes(raw: Mapping[str, Any]) -> bytes:
    """The encoded image of a sample as `ShardReader` groups it."""
    return next(raw[extension] for extension in EXTENSIONS["image"] if extension in raw)


def _decode_seg(data: bytes) -> Tensor:
    with open_picture(data) as image:
        if image.mode not in ("L", "P"):  # a palette's indices are the labels
            raise ValueError(f"mask of mode {image.mode}, wanted 8-bit grey or palette")
        return torch.from_numpy(np.array(image))


def _decode_cls(data: bytes) -> int | list[int]:
    """`3` is one label, `[0,3]` any number of them."""
    if not data.lstrip().startswith(b"["):
        return int(data)
    labels = _decode_json(data)
    if not all(type(label) is int for label in labels):
        raise ValueError(f"cls {data.decode()}, wanted a whole number or a JSON list of them")
    return labels


def _decode_boxes(data: bytes) -> list[dict[str, Any]]:
    boxes = _decode_json(data)
    if not isinstance(boxes, list):
        raise ValueError(f"{brief(ValueError(boxes), 60)}; valid: a list of boxes")
    for box in boxes:
        bbox, label = (box.get("bbox"), box.get("label")) if isinstance(box, dict) else (None, None)
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox)) and type(label) is int):
            said = brief(ValueError(box), 60)
            raise ValueError(f"box {said}; valid: bbox [x, y, width, height] in pixels, label, iscrowd")
    return boxes


def _decode_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise BadSample("bad JSON", brief(err)) from err


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # of pixels; also says no to infinity and NaN


_DECODE: dict[str, Any] = {
    "image": decode_image,
    "cls": _decode_cls,
    "txt": lambda data: data.decode("utf-8"),
    "seg": _decode_seg,
    "boxes": _decode_boxes,
}
_BAD = {"image": "bad image", "cls": "bad class", "txt": "bad caption", "seg": "bad mask", "boxes": "bad box"}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of one set of fields -> a batch.

    Returns:
        `key`, `shard` and `txt` list[str], `boxes` list of lists, `source` int64 (B,), `cls` the same, or a list of
        lists where samples have any number of labels, `image` uint8 (B, 3, H, W) and `seg` uint8 (B, H, W) where all
        have one size, else lists of tensors; a mapping's values (`crops`) likewise.
    """
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "cls" and not any(isinstance(value, list) for value in values):
            batch[name] = torch.tensor(values)
        elif isinstance(values[0], Mapping):
            batch[name] = collate(values)
        elif isinstance(values[0], Tensor) and len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        else:
            batch[name] = values
    return batch
