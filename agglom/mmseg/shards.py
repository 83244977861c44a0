"""Shards as a map-style dataset of mmsegmentation: every picture and mask has an address inside its tar."""

from __future__ import annotations

import os
import tarfile
from typing import Any, Mapping

from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset
from webdataset.tariterators import base_plus_ext

from agglom.data.addresses import is_remote
from agglom.data.index import EXTENSIONS, Index, read_index
from agglom.data.samples import check_fields
from agglom.errors import UserError, brief
from agglom.mmseg.registry import DATASETS

FIELDS = {"img_path": "image", "seg_map_path": "seg"}  # mmseg's names of what a sample has to have


@register_backend("agglom.shard", prefixes="shard")
class ShardFile(BaseStorageBackend):
    """Reads `shard://OFFSET+BYTES/PATH/OF.tar/NAME`, so that mmseg's own loading transforms need not know of tars."""

    def get(self, filepath: str) -> bytes:
        """The file's bytes."""
        place, _, path = str(filepath).removeprefix("shard://").partition("/")
        offset, size = map(int, place.split("+"))
        with open("/" + path.rpartition("/")[0], "rb") as tar:
            tar.seek(offset)
            return tar.read(size)

    def get_text(self, filepath: str, encoding: str = "utf-8") -> str:
        """The file's text."""
        return self.get(filepath).decode(encoding)


@DATASETS.register_module("ShardDataset")
class ShardDataset(BaseSegDataset):
    """`agglom.ShardDataset`: the pictures and masks of one split of a shard folder on this machine.

    The headers of the tars are read once. Classes are the index's `seg_classes`, 255 is ignored.

    Args:
        data_root: the shard folder.
        split: "train", "val" or "test".
        options: of mmseg's BaseSegDataset: `pipeline`, `indices`, `test_mode`, ...; `metainfo` may add a palette, and
            the classes where the index names none.

    Raises:
        UserError: not a shard folder, a remote one, or one without pictures, masks or names of classes; a shard that
            doesn't hold what the index says.
    """

    def __init__(
        self, data_root: str, split: str, *, metainfo: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.index, self.split = read_index(data_root), split
        check_fields(self.index, split, tuple(FIELDS.values()))
        given, named = dict(metainfo or {}), self.index.seg_classes
        classes = tuple(given.get("classes") or named or ())
        if not classes or (named and classes != named):
            wanted = "set metainfo.classes" if not named else f"valid: {', '.join(named)}"
            raise UserError(f"{data_root}: classes {classes or 'without names'}; {wanted}")
        super().__init__(data_root=None, metainfo={**given, "classes": classes}, **options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry a sample: the addresses of its picture and mask, and what mmseg's transforms ask for."""
        common = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [{**sample, **common, "seg_fields": []} for sample in locate(self.index, self.split)]


def locate(index: Index, split: str) -> list[dict[str, str]]:
    """`img_path` and `seg_map_path` of every sample, in the order of the shards.

    Raises:
        UserError: a shard that can't be read, is elsewhere, or doesn't hold what the index says.
    """
    return [place for shard in index.shards(split) for place in _locate_in(index.url(shard), shard.count)]


def _locate_in(url: str, count: int) -> list[dict[str, str]]:
    if is_remote(url):
        raise UserError(f"{url}: mmseg needs random access; copy the shards to this machine")
    url = os.path.abspath(url)
    samples: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(url, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)  # as the streams group them
                if member.isfile() and key:
                    name = f"{key}.{extension}".replace("/", "_")
                    address = f"shard://{member.offset_data}+{member.size}{url}/{name}"
                    samples.setdefault(key, {})[extension.lower()] = address
    except (OSError, tarfile.TarError) as err:
        raise UserError(f"{url}: not a readable shard ({brief(err)}); write it again") from err
    if len(samples) != count:
        raise UserError(f"{url}: holds {len(samples)} samples, the index says {count}; write it again")
    found = []
    for key, members in samples.items():
        places = {}
        for name, field in FIELDS.items():
            stored = [members[extension] for extension in EXTENSIONS[field] if extension in members]
            if not stored:
                raise UserError(f"{url}: sample {key} has no field {field!r}; mmseg needs image and seg of every one")
            places[name] = stored[0]
        found.append(places)
    return found
