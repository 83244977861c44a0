"""What a feature cache holds: an index, and one safetensors file beside each shard's name.

A file has, for N samples and V views of each:

    windows              int32 (N, V, 5)        top, left, height, width, mirrored: the view, to be cut out again
    colours              float32 (N, V, 11)     what happens to its colours (`agglom.data.colours`), where they change
    TEACHER/summary      (N, V, D)              features of that view in bf16, fp16, fp32 or int8
    TEACHER/spatial      (N, V, C, H, W)
    TEACHER/KIND/scale   float32 (D,) or (C,)   int8 only: the value of one step of each channel
    image_crc            int64 (N,)             crc32 of the encoded image, as it lies in the shard
    crc                  int64 (N, V)           crc32 of a view's window, colours and features

and in its metadata the samples' keys, each teacher's fingerprint and the `recipe` of the cache: a hash of all that
decides what a teacher is shown. So a sample is found by its key, an image that has changed since is noticed, and so is
every damaged byte that would be trained on, and every file that was made in another way.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterable, Literal, Mapping

import torch
from torch import Tensor

from agglom.data.addresses import refuse_listed
from agglom.errors import UserError, brief
from agglom.whole import whole

VERSION = 2
INDEX = "cache.json"
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
}
Stored = Literal["bf16", "fp16", "fp32", "int8"]
SEEN = ("windows", "colours")  # what a view is


class Miss(UserError):
    """Features that are not there, or can't be trusted."""


@dataclass(frozen=True)
class CacheIndex:
    """What a cache says of itself.

    Attributes:
        root: the folder.
        size: pixels of a side of the views.
        view: how training views are drawn: scale, ratio, flip, colours.
        views: V, of each training image; other splits have the one centred view.
        dtype: of what is stored.
        pool: cells of a map that were averaged into one, along each side.
        seed: of the views.
        grid: cells of the student's map; teachers of any size were shown images of as many cells.
        splits: split -> names of its shards.
        teachers: name -> its manifest entry (source, sha256, licence, dims, input) with `class_path` and `init_args`.
        versions: of the libraries that computed it.
    """

    root: str
    size: int
    view: Mapping[str, Any]
    views: int
    dtype: Stored
    pool: int
    seed: int
    grid: tuple[int, int]
    splits: Mapping[str, tuple[str, ...]]
    teachers: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str] = field(default_factory=dict)

    def path(self, shard: str) -> Path:
        """The file of a shard's features, by the last part of the shard's name: none lies outside of the folder."""
        name = shard.rpartition("/")[2]
        return Path(self.root) / f"{name.rpartition('.')[0] or name}.safetensors"

    @property
    def recipe(self) -> str:
        """sha256 of what decides which pixels a teacher was shown, and how its answer was stored."""
        shown = {name: [entry["input"], entry["shapes"]] for name, entry in self.teachers.items()}
        how = [VERSION, self.size, self.view, self.views, self.dtype, self.pool, self.seed, self.grid, shown]
        return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()

    def about(self) -> dict[str, str]:
        """What each file says of itself, besides its keys."""
        return {"recipe": self.recipe, **{f"sha256 {name}": str(e["sha256"]) for name, e in self.teachers.items()}}

    def missing(self) -> list[str]:
        """Shards that have no features yet."""
        return [name for names in self.splits.values() for name in names if not self.path(name).is_file()]

    def differences(self, other: CacheIndex) -> list[str]:
        """What differs from another cache, a line each: a cache is only ever continued as it was begun."""
        mine, theirs = (_plain(index) for index in (self, other))
        return [
            f"{key} was {mine[key]}, is {theirs[key]}"
            for key in mine
            if key not in ("root", "versions") and mine[key] != theirs[key]
        ]

    def write(self) -> None:
        """Put it into its folder, atomically.

        Raises:
            UserError: the folder can't be written.
        """
        path = Path(self.root) / INDEX
        body = {key: value for key, value in _plain(self).items() if key != "root"}
        try:
            with whole(path) as scratch:
                scratch.write_text(json.dumps({"version": VERSION, **body}, indent=1) + "\n", encoding="utf-8")
        except OSError as err:
            raise UserError(f"{path}: can't be written ({err.strerror or err}); choose another --out") from err


def read_cache_index(root: str | Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        UserError: no cache there, or not one that this version reads.
    """
    path = Path(root) / INDEX
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise UserError(
            f"{root}: no feature cache, it has no {INDEX}; write one with `agglom cache --out {root}`"
        ) from err
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"{path}: can't be read ({brief(err)}); write the cache again") from err
    if not isinstance(body, dict) or body.pop("version", None) != VERSION:
        raise UserError(f"{path}: not a feature cache of version {VERSION}; write it again")
    try:
        body["splits"] = {split: tuple(names) for split, names in body["splits"].items()}
        body["grid"] = tuple(body["grid"])
        index = CacheIndex(root=os.fspath(root), **body)
        _check(index)
        return index
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"{path}: broken ({err}); write the cache again") from err


def _check(index: CacheIndex) -> None:
    """Raise TypeError or ValueError where a cache.json, which nobody should have touched, isn't what was written."""
    for name in (name for names in index.splits.values() for name in names):
        if not isinstance(name, str):
            raise TypeError(f"shard {name!r:.40} is not a name")
        refuse_listed(name, "")
    for key in ("size", "views", "pool", "seed"):
        if type(getattr(index, key)) is not int:
            raise TypeError(f"{key} {getattr(index, key)!r:.40} is not a whole number")
    if len(index.grid) != 2 or not all(type(cells) is int for cells in index.grid):
        raise TypeError(f"grid {index.grid!r:.40} is not two whole numbers")
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype {index.dtype!r:.40}; valid: {', '.join(DTYPES)}")
    if not index.teachers or not index.splits:
        raise ValueError("no teachers or no splits")
    for entry in (index.view, index.versions, index.teachers, *index.teachers.values()):
        if not isinstance(entry, dict):
            raise TypeError(f"{entry!r:.40} is not an object")


def crc(parts: Iterable[Tensor]) -> int:
    """crc32 over the bytes of tensors, one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def _plain(index: CacheIndex) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(index)))  # tuples -> lists, as read back
