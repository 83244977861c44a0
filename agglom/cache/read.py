"""Features out of a cache, one view of one sample at a time, each checked before it is handed out."""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from functools import partial
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agglom.cache.layout import DTYPES, SEEN, CacheIndex, Miss, crc
from agglom.data.samples import image_bytes
from agglom.data.streams import Cached
from agglom.data.views import Window

OPEN = 64  # files kept open: those that a shuffle buffer mixes


class FeatureReader:
    """Reads views and their features by key.

    Args:
        index: of the cache.
    """

    def __init__(self, index: CacheIndex) -> None:
        self.index = index
        self._open: OrderedDict[str, _File] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_open": OrderedDict()}  # a loader's worker opens its own files

    def views(self, split: str) -> int:
        """How many views each sample of a split has; 0 where the cache doesn't hold the split."""
        if split not in self.index.splits:
            return 0
        return self.index.views if split == next(iter(self.index.splits)) else 1

    def read(self, raw: Mapping[str, Any], view: int) -> tuple[Window, dict[str, dict[str, Tensor]]]:
        """A view of an encoded sample.

        Args:
            raw: the sample as webdataset groups it: `__key__`, `__url__`, and its encoded image.
            view: which of its views.

        Returns:
            the window to cut out, and teacher -> {"summary": (D,), "spatial": (C, H, W)} as stored (int8: float32).

        Raises:
            Miss: no such file or key, an image that has changed since, damaged bytes.
        """
        shard, key = raw["__url__"].rpartition("/")[2], raw["__key__"]
        path = self.index.path(shard)
        try:
            file = self._file(shard)
            if key not in file.rows:
                raise Miss(f"{path}: sample {key}: no features; write the cache again")
            row = file.rows[key]
            if zlib.crc32(image_bytes(raw)) != file.image_crc[row]:
                raise Miss(f"{path}: sample {key}: its image has changed since; write the cache again")
            seen, found = (
                {name: file.stored.get_slice(name)[row : row + 1, view : view + 1] for name in names}
                for names in (file.seen, file.names)
            )
        except FileNotFoundError as err:
            raise Miss(f"{path}: missing, so sample {key} has no features; write the cache again") from err
        except (SafetensorError, OSError, ValueError, KeyError, IndexError) as err:
            self._open.pop(shard, None)
            raise Miss(
                f"{path}: sample {key}: can't be read ({err}); remove the file and write the cache again"
            ) from err
        if crc([*seen.values(), *found.values()]) != file.crc[row][view]:
            raise Miss(f"{path}: sample {key}: damaged; remove the file and write the cache again")
        features: dict[str, dict[str, Tensor]] = {}
        for name, value in found.items():
            teacher, kind = name.split("/")
            value = value[0, 0]
            if name in file.scales:
                value = value.float() * file.scales[name].view(-1, *[1] * (value.ndim - 1))
            features.setdefault(teacher, {})[kind] = value
        top, left, height, width, flip = seen["windows"].flatten().tolist()
        colours = tuple(seen["colours"].flatten().tolist()) if "colours" in seen else None
        return Window(top, left, height, width, bool(flip), colours), features

    def drawn(self, split: str, *, recompute: bool) -> Cached:
        """What a stream of this split asks for each sample's features: one of its views, drawn from the generator.

        Args:
            split: of the data.
            recompute: a sample whose features are missing or stale gets none (and is counted), instead of an error.
        """
        return partial(_draw, self, self.views(split), recompute)

    def blank(self) -> dict[str, dict[str, Tensor]]:
        """Zeros in the shapes of a sample's features, where there are none."""
        dtype = torch.float32 if self.index.dtype == "int8" else DTYPES[self.index.dtype]
        return {
            teacher: {kind: torch.zeros(shape, dtype=dtype) for kind, shape in entry["shapes"].items()}
            for teacher, entry in self.index.teachers.items()
        }

    def _file(self, shard: str) -> _File:
        if shard not in self._open:
            self._open[shard] = _File(self.index, shard)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def _draw(
    reader: FeatureReader, views: int, recompute: bool, raw: Mapping[str, Any], generator: torch.Generator | None
) -> tuple[Window | None, dict[str, dict[str, Tensor]]]:
    view = int(torch.randint(views, (), generator=generator)) if views > 1 else 0
    try:
        return reader.read(raw, view)
    except Miss:
        if not recompute:
            raise
        return None, reader.blank()


class _File:
    """One file: open, with what is small in memory."""

    def __init__(self, index: CacheIndex, shard: str) -> None:
        path = index.path(shard)
        if not path.is_file():
            raise FileNotFoundError(path)
        self.stored = safe_open(path, "pt")
        meta = self.stored.metadata() or {}
        if other := [f"{k} {meta.get(k)} instead of {v}" for k, v in index.about().items() if meta.get(k) != v]:
            raise ValueError(f"of another cache: {'; '.join(other)}")
        self.rows = {key: row for row, key in enumerate(json.loads(meta["keys"]))}
        self.names = sorted(
            f"{teacher}/{kind}" for teacher, entry in index.teachers.items() for kind in entry["shapes"]
        )
        self.image_crc = self.stored.get_tensor("image_crc").tolist()
        self.crc = self.stored.get_tensor("crc").tolist()
        there = set(self.stored.keys())
        self.seen = [name for name in SEEN if name in there]
        self.scales = {n: self.stored.get_tensor(f"{n}/scale") for n in self.names if f"{n}/scale" in there}
