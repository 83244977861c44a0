"""`index.json`: what a shard folder holds, so that nobody has to open a tar to know.

```json
{"format": "agglom-shards", "version": 1, "licence": "MIT", "source": "...", "language": "en",
 "classes": ["cat", "dog"], "seg_classes": null, "extra": {},
 "splits": {"train": {"count": 200, "fields": ["cls", "image"],
                      "shards": [{"file": "train-000000.tar", "count": 100}, ...]}}}
```
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from agglom.data.addresses import is_remote, join, open_read, refuse_address, refuse_listed
from agglom.errors import UserError, nearest
from agglom.whole import whole

FORMAT, VERSION = "agglom-shards", 1
INDEX_NAME = "index.json"
MAX_BYTES = 1 << 26  # of an index: a million shards

# field of a decoded sample -> extensions it is stored under; a sample key holds no dot, so the first one ends it
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "cls": ("cls",),
    "txt": ("txt",),
    "seg": ("seg.png",),
    "boxes": ("boxes.json",),
}

# Pictures that are opened, whatever a file is called: PIL knows 40 more, and starts Ghostscript for one of them (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class ShardInfo(NamedTuple):
    """One tar of a split: its file, relative to the root (or an address of its own), and its number of samples."""

    file: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a shard for


@dataclass(frozen=True)
class Index:
    """What a shard folder says of itself.

    Attributes:
        root: the folder or address it was read from.
        splits: split -> its shards, in order.
        fields: split -> the fields that its samples have: any of image, cls, txt, seg, boxes.
        classes: names of `cls`, by number, or None.
        seg_classes: names of the values of `seg`, by number (255 is "ignore" and has no name), or None.
        language: of the captions, for example "en", or None.
        licence, source: of the data, in words.
        extra: what the writer wanted to add.
    """

    root: str
    splits: Mapping[str, tuple[ShardInfo, ...]]
    fields: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | None = None
    seg_classes: tuple[str, ...] | None = None
    language: str | None = None
    licence: str = "unknown"
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Split -> its number of samples."""
        return {split: sum(shard.count for shard in shards) for split, shards in self.splits.items()}

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of one split.

        Raises:
            UserError: no such split.
        """
        if split not in self.splits:
            raise UserError(f"{self.root}: no split {split!r}; {nearest(split, self.splits)}")
        return self.splits[split]

    def url(self, shard: ShardInfo) -> str:
        """Where the shard can be opened."""
        return join(self.root, shard.file)


def write_index(
    root: Path | str,
    splits: Mapping[str, Sequence[ShardInfo]],
    *,
    classes: Sequence[str] | None = None,
    seg_classes: Sequence[str] | None = None,
    language: str | None = None,
    licence: str = "unknown",
    source: str = "",
    extra: Mapping[str, Any] | None = None,
    fields: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write `root/index.json` (atomically) for shards that are already there.

    Args:
        root: the shard folder.
        splits: split -> its shards.
        fields: split -> the fields that its samples have; None: read from each split's first sample.
        classes, seg_classes, language, licence, source, extra: see `Index`.

    Returns:
        The path of the index.

    Raises:
        UserError: a shard is missing, or the folder can't be written.
    """
    root = Path(root)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "licence": licence,
        "source": source,
        "language": language,
        "classes": list(classes) if classes is not None else None,
        "seg_classes": list(seg_classes) if seg_classes is not None else None,
        "extra": dict(extra or {}),
        "splits": {
            split: {
                "count": sum(shard.count for shard in shards),
                "fields": _stored_fields(root, shards) if fields is None else list(fields[split]),
                "shards": [{"file": shard.file, "count": shard.count} for shard in shards],
            }
            for split, shards in splits.items()
        },
    }
    path = root / INDEX_NAME
    try:
        with whole(path) as scratch:
            scratch.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    except OSError as err:
        raise UserError(f"{path}: can't be written ({err.strerror or err}); choose another --out") from err
    return path


def read_index(root: Path | str, *, check_files: bool = True) -> Index:
    """Read the index of a shard folder and check that its shards are there.

    Args:
        root: a folder, or an address (`agglom.data.addresses`).
        check_files: False reads the index alone.

    Raises:
        UserError: an address that isn't read, no such folder, no index, not an index, or shards that are missing or
            empty on disk.
    """
    root = os.fspath(root)
    refuse_address(root)
    address = join(root, INDEX_NAME)
    if not is_remote(root) and not os.path.isdir(root.removeprefix("file://")):
        raise UserError(f"{root}: no such shard folder; write one with `agglom data ... --out {root}`")
    try:
        with open_read(address) as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # refuses lone surrogates, which no terminal takes
    except FileNotFoundError as err:
        raise UserError(
            f"{root}: not a shard folder, it has no {INDEX_NAME}; write one with `agglom data ...`"
        ) from err
    except ValueError as err:  # json and unicode
        raise UserError(f"{address}: not readable as JSON ({err}); write the shards again") from err
    except Exception as err:  # fsspec backends raise what they like
        raise UserError(f"{address}: can't be read ({type(err).__name__}: {_one_line(err)})") from err
    index = _parse(root, address, body)
    if check_files and not is_remote(root):
        _check_files(index)
    return index


def validate_layout(index: Index, split: str, *, num_workers: int, world_size: int) -> list[str]:
    """What stands in the way of training on a split with so many loader workers and ranks, a line a problem.

    A training stream deals whole shards to the workers of all ranks, so that no shard is read twice in a pass: there
    must be one for each. Evaluation splits by sample and takes any number of shards.

    Args:
        num_workers: per rank; 0 means that the rank reads by itself.
        world_size: ranks.

    Returns:
        Lines that name key, value and fix; none if all is well.
    """
    if split not in index.splits:
        return [f"data.train_split: {split!r}; {nearest(split, index.splits)}"]
    shards = sum(shard.count > 0 for shard in index.splits[split])
    workers = max(num_workers, 1)
    if shards == 0:
        return [f"data.train_split: {split!r} of {index.root} has no samples; write it again"]
    if shards >= workers * world_size:
        return []
    if shards >= world_size:
        fix = f"set num_workers <= {shards // world_size} or write more shards"
    else:
        fix = f"use <= {shards} ranks or write more shards"
    return [
        f"data.num_workers: {shards} shards < {workers} workers x {world_size} ranks = {workers * world_size}; {fix}"
    ]


def _parse(root: str, address: str, body: Any) -> Index:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{address}: not a shard index ('format' is not {FORMAT!r}); write it with `agglom data ...`")
    if body.get("version") != VERSION:
        raise UserError(f"{address}: version {body.get('version')!r}; this agglom reads version {VERSION}")
    try:
        splits = _typed(body, "splits", dict)
        return Index(
            root=root,
            splits={
                split: tuple(_shard(root, shard) for shard in _typed(entry, "shards", list))
                for split, entry in splits.items()
            },
            fields={split: _names(entry, "fields") for split, entry in splits.items()},
            classes=_names(body, "classes") if body.get("classes") is not None else None,
            seg_classes=_names(body, "seg_classes") if body.get("seg_classes") is not None else None,
            language=None if body.get("language") is None else _typed(body, "language", str),
            licence=_typed({"licence": "unknown", **body}, "licence", str),
            source=_typed({"source": "", **body}, "source", str),
            extra=_typed(body, "extra", dict) if body.get("extra") else {},
        )
    except ValueError as err:
        raise UserError(f"{address}: broken shard index ({err}); write the shards again") from err


_CALLED = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _typed(entry: Any, key: str, kind: type) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(f"no {key!r}")
    if type(entry[key]) is not kind:
        raise ValueError(f"{key} {entry[key]!r:.40} is not {_CALLED[kind]}")
    return entry[key]


def _names(entry: Any, key: str) -> tuple[str, ...]:
    names = _typed(entry, key, list)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{key}: {wrong[0]!r:.40} is not a name")
    return tuple(names)


def _shard(root: str, entry: Any) -> ShardInfo:
    file, count = _typed(entry, "file", str), _typed(entry, "count", int)
    if not 0 <= count < 1 << 40:
        raise ValueError(f"count {count!r:.40} of {file!r:.80}; valid: 0 or more samples")
    refuse_listed(file, root)
    return ShardInfo(file, count)


def _check_files(index: Index) -> None:
    shards = [shard for split in index.splits.values() for shard in split if not is_remote(shard.file)]
    missing = [shard.file for shard in shards if not os.path.isfile(index.url(shard))]
    if missing:
        raise UserError(
            f"{index.root}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; write them again"
        )
    empty = [shard.file for shard in shards if shard.count and os.path.getsize(index.url(shard)) == 0]
    if empty:
        raise UserError(
            f"{index.root}: {len(empty)} of {len(shards)} shards are empty files, first {empty[0]}; write them again"
        )


def _stored_fields(root: Path, shards: Sequence[ShardInfo]) -> list[str]:
    """The fields of the first sample of the first shard that has one."""
    for shard in shards:
        if shard.count == 0:
            continue
        try:
            with tarfile.open(root / shard.file) as tar:
                names = [(tar.next() or tarfile.TarInfo()).name]
                while (member := tar.next()) is not None and member.name.split(".")[0] == names[0].split(".")[0]:
                    names.append(member.name)
        except (OSError, tarfile.TarError) as err:
            raise UserError(f"{root / shard.file}: not a readable shard ({_one_line(err)}); write it again") from err
        stored = {name.partition(".")[2] for name in names}
        return sorted(name for name, extensions in EXTENSIONS.items() if stored.intersection(extensions))
    return []


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split())
