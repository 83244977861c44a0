"""From the bytes of one sample to typed fields, and from samples to a batch."""

from __future__ import annotations

import json
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.data.index import EXTENSIONS, Index
from agglom.data.pictures import Picture, decode_image, is_jpeg, open_picture
from agglom.errors import UserError, nearest


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


def decode_sample(raw: Mapping[str, Any], fields: Sequence[str], *, whole: bool = True) -> dict[str, Any]:
    """One sample as webdataset groups it -> its key and the fields asked for.

    Args:
        raw: extension -> bytes, `__key__`, `__url__`.
        fields: any of image, cls, txt, seg, boxes.
        whole: decode the image; False leaves a JPEG to the view that it is for, as a `Picture`.

    Returns:
        `key` str, `shard` str (the shard's file name), `image` uint8 (3, H, W) RGB, `cls` int, or list[int] where a
        sample has any number of labels, `txt` str (several captions: one a line), `seg` uint8 (H, W), `boxes` list of
        dicts.

    Raises:
        UserError: a field is missing.
        Exception: whatever the decoder of broken bytes raises.
    """
    sample: dict[str, Any] = {"key": raw["__key__"], "shard": raw["__url__"].rpartition("/")[2]}
    for name in fields:
        extension = next((ext for ext in EXTENSIONS[name] if ext in raw), None)
        if extension is None:
            have = ", ".join(n for n, exts in EXTENSIONS.items() if any(e in raw for e in exts)) or "none"
            raise UserError(f"{raw['__url__']}: sample {raw['__key__']} has no field {name!r}; it has: {have}")
        data = raw[extension]
        sample[name] = Picture(data) if name == "image" and not whole and is_jpeg(data) else _DECODE[name](data)
    return sample


def image_bytes(raw: Mapping[str, Any]) -> bytes:
    """The encoded image of a sample as webdataset groups it."""
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
    labels = json.loads(data)
    if not all(type(label) is int for label in labels):
        raise ValueError(f"cls {data.decode()}, wanted a whole number or a JSON list of them")
    return labels


_DECODE: dict[str, Any] = {
    "image": decode_image,
    "cls": _decode_cls,
    "txt": lambda data: data.decode("utf-8"),
    "seg": _decode_seg,
    "boxes": json.loads,
}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of one set of fields -> a batch.

    Returns:
        `key`, `shard` and `txt` list[str], `boxes` list of lists, `cls` int64 (B,), or a list of lists where samples
        have any number of labels, `image` uint8 (B, 3, H, W) and `seg` uint8 (B, H, W) where all have one size, else
        lists of tensors; a mapping's values (`crops`) likewise.
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
