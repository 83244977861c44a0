"""Samples into tar shards, byte for byte the same every time."""

from __future__ import annotations

import io
import json
import operator
import tarfile
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

import numpy as np
from PIL import Image

from agglom.data.index import EXTENSIONS, ShardInfo
from agglom.errors import UserError
from agglom.whole import whole

# lossless png and webp; jpg at a quality where blocks don't show in a 16-pixel patch
_ENCODE: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"lossless": True}),
}


def write_shard(path: Path | str, samples: Iterable[Mapping[str, Any]], *, image_format: str = "png") -> ShardInfo:
    """Write one shard atomically: either the whole file is at `path` afterwards, or what was there before.

    The bytes depend on the samples alone (fixed owner, mode and time), so two runs can be compared by checksum.

    Args:
        path: where to; parent folders are made. An existing file is replaced.
        samples: any subset of
            `key` str (required; no dot, unique in the shard),
            `image` uint8 (H, W, 3) RGB array, or encoded bytes, stored untouched, with `ext` jpg, jpeg, png or webp,
            `cls` int, or a list of ints where a sample has any number of labels,
            `txt` str, several captions one a line, `seg` uint8 (H, W) array (255 = ignore),
            `boxes` [{"bbox": [x, y, w, h] in pixels, "label": int, "iscrowd": 0}].
            Consumed one at a time, so a generator keeps memory flat.
        image_format: png, jpg or webp, for images given as arrays.

    Returns:
        The shard's file name (relative to its folder) and count, for `write_index`.

    Raises:
        UserError: the place can't be written, or an unknown image format.
        ValueError: a sample that breaks the rules above.
    """
    if image_format not in _ENCODE:
        raise UserError(f"image_format: {image_format!r}; valid: {', '.join(_ENCODE)}")
    return write_encoded(path, (encode_sample(sample, image_format=image_format) for sample in _source(samples)))


def write_encoded(
    path: Path | str, samples: Iterable[tuple[str, Iterable[tuple[str, bytes]]]], *, format: int = tarfile.USTAR_FORMAT
) -> ShardInfo:
    """Write one shard of samples that are bytes already; see `write_shard`.

    Args:
        path: where to.
        samples: (key, members as (extension, bytes)) a sample, stored as they are.
        format: of tarfile; PAX_FORMAT also holds keys of more than 100 characters.
    """
    path = Path(path)
    seen: set[str] = set()
    try:
        with whole(path) as scratch, tarfile.open(scratch, "w", format=format) as tar:
            for key, members in samples:
                if key in seen:
                    raise ValueError(f"sample key {key!r} twice in {path.name}")
                seen.add(key)
                for extension, data in members:
                    info = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0 by default
                    info.size, info.mode = len(data), 0o444
                    tar.addfile(info, io.BytesIO(data))
    except OSError as err:
        raise UserError(f"{path}: can't be written ({err.strerror or err}); choose another --out") from err
    return ShardInfo(path.name, len(seen))


def encode_sample(sample: Mapping[str, Any], *, image_format: str = "png") -> tuple[str, list[tuple[str, bytes]]]:
    """A sample (see `write_shard`) -> its key and its (extension, bytes) members, sorted by extension."""
    unknown = set(sample) - {*EXTENSIONS, "key", "ext"}
    if unknown:
        raise ValueError(f"unknown sample field {min(unknown)!r}; valid: key, ext, {', '.join(EXTENSIONS)}")
    key = sample["key"]
    if not key or "." in key:
        raise ValueError(f"sample key {key!r} must not be empty or hold a dot: the first dot starts the extension")
    members: list[tuple[str, bytes]] = []
    if "image" in sample:
        members.append(_encode_image(sample["image"], sample.get("ext"), image_format))
    if "cls" in sample:
        members.append(("cls", _encode_cls(sample["cls"])))
    if "txt" in sample:
        members.append(("txt", sample["txt"].encode("utf-8")))
    if "seg" in sample:
        members.append(("seg.png", _encode_array(sample["seg"], "png", ndim=2)))
    if "boxes" in sample:
        members.append(("boxes.json", json.dumps(sample["boxes"], separators=(",", ":")).encode()))
    return key, sorted(members)


def _source(samples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Keeps a source that can't be read apart from a target that can't be written."""
    try:
        yield from samples
    except OSError as err:
        raise UserError(f"{err.filename or 'source of the samples'}: can't be read ({err.strerror or err})") from err


def _encode_cls(cls: Any) -> bytes:
    try:
        if isinstance(cls, (list, tuple)):
            return json.dumps([operator.index(label) for label in cls], separators=(",", ":")).encode()
        return str(int(operator.index(cls))).encode()
    except TypeError:
        raise ValueError(f"cls {cls!r}; wanted an int or a list of ints") from None


def _encode_image(image: Any, ext: str | None, image_format: str) -> tuple[str, bytes]:
    if not isinstance(image, (bytes, bytearray)):
        return image_format, _encode_array(image, image_format, ndim=3)
    ext = (ext or "").lower().lstrip(".")
    if ext not in EXTENSIONS["image"]:
        raise ValueError(f"encoded image with ext {ext!r}; valid: {', '.join(EXTENSIONS['image'])}")
    return ext, bytes(image)


def _encode_array(array: np.ndarray, image_format: str, *, ndim: int) -> bytes:
    if array.dtype != np.uint8 or array.ndim != ndim or (ndim == 3 and array.shape[2] != 3):
        wanted = "(H, W, 3)" if ndim == 3 else "(H, W)"
        raise ValueError(f"array of dtype {array.dtype} and shape {array.shape}; wanted uint8 {wanted}")
    name, options = _ENCODE[image_format]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, name, **options)
    return buffer.getvalue()
