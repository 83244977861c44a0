"""A shard folder as the probes read it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from agglom.probes.fingerprint import data_hash


@dataclass(frozen=True)
class Source:
    """A shard folder as the probes read it.

    Attributes:
        root: folder or address.
        index: its `agglom.data.Index`.
        hash: of the data.
        size: pixels images are resized (short side) and centre-cropped to, masks with them; None keeps them as they
            are, and then they must all have one size.
        fields: "cls", "seg", "txt" where the data has them and a probe wants them.
        limits: split -> only its first so many samples.
    """

    root: str
    index: Any
    hash: str
    size: int | None = None
    fields: tuple[str, ...] = ()
    limits: Mapping[str, int] | None = None

    @classmethod
    def open(cls, root: Path | str, **options: Any) -> Source:
        """Read the index.

        Raises:
            UserError: no shards there.
        """
        from agglom.data import read_index

        index = read_index(root)
        return cls(root=os.fspath(root), index=index, hash=data_hash(index), **options)

    def rows(self, split: str) -> int:
        """How many samples of the split are read, at most."""
        limit = (self.limits or {}).get(split)
        count = self.index.counts[split]
        return count if limit is None else min(count, limit)

    def split_fields(self, split: str) -> tuple[str, ...]:
        """The wanted fields that this split has."""
        return tuple(f for f in self.fields if f in self.index.fields[split])

    def samples(
        self, split: str, *, part: tuple[int, int] = (0, 1), fields: Sequence[str] | None = None, raw: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The first samples of the split, in order: `key`, `image` uint8 (3, H, W) and the wanted fields.

        Args:
            split: of the data.
            part: (k, n): the k-th of n equal stretches of them.
            fields: besides the image; left out: the wanted ones that the split has.
            raw: as stored, whatever `size` says.
        """
        from agglom.data import eval_stream

        # the place in the stream is ours to give: processes and threads share out whole parts
        names = ("image", *(self.split_fields(split) if fields is None else fields))
        rank, world = part
        for sample in eval_stream(self.index, split, fields=names, limit=self.rows(split), rank=rank, world_size=world):
            yield sample if self.size is None or raw else fit(sample, self.size)

    def parts(self, split: str, each: int) -> int:
        """How many stretches of about `each` samples the split has."""
        return max(1, -(-self.rows(split) // each))


def fit(sample: dict[str, Any], size: int) -> dict[str, Any]:
    """Resize the short side of image (bilinear, antialiased) and mask (nearest) to `size` pixels, crop the centre."""
    out = dict(sample)
    image = torch.as_tensor(sample["image"])[None].float()
    scale = size / min(image.shape[-2:])
    shape = [max(size, round(side * scale)) for side in image.shape[-2:]]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    window = (..., slice(top, top + size), slice(left, left + size))
    image = F.interpolate(image, shape, mode="bilinear", antialias=True)[window]
    out["image"] = image[0].round().clamp(0, 255).to(torch.uint8)
    if "seg" in sample:
        mask = torch.as_tensor(sample["seg"])[None, None].float()
        out["seg"] = F.interpolate(mask, shape, mode="nearest-exact")[window][0, 0].to(torch.uint8)
    return out
