"""Pictures on disk into shards: what the writers of all layouts share."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Protocol, Sequence, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from agglom.data.addresses import is_remote
from agglom.data.index import FORMATS, INDEX_NAME, ShardInfo, read_index, write_index
from agglom.data.processes import spread
from agglom.data.shards import write_shard
from agglom.errors import UserError

log = logging.getLogger("agglom.data")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
IGNORE = 255  # mask value that no loss and no metric looks at
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # what PIL finds -> copied as; others become png
_ORIENTATION, _ON_THE_SIDE = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


class Entry(Protocol):
    """One picture to write. `file` is its path below the source: its identity for splits, order and the file list."""

    @property
    def file(self) -> str: ...


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Writing:
    """How shards are written, whatever they are made of.

    Args:
        shard_size: pictures a shard.
        seed: another seed, another order in the shards (classes are mixed).
        workers: processes; None: one a core.
        licence: of the pictures, in words, for the index.
        overwrite: replace a shard folder that is already there.

    Raises:
        UserError: a value out of range.
    """

    shard_size: int = 1000
    seed: int = 0
    workers: int | None = None
    licence: str = "unknown"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value in (("shard_size", self.shard_size), ("workers", 1 if self.workers is None else self.workers)):
            if value < 1:
                raise UserError(f"{name}: {value}; valid: 1 or more")


DEFAULTS = Writing()


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raises UserError unless both are parts of a whole that leaves something to train on."""
    if not (0 <= val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UserError(f"val_fraction {val_fraction}, test_fraction {test_fraction}; valid: 0 or more, sum below 1")


def split_by_path(entries: Iterable[E], val_fraction: float, test_fraction: float) -> dict[str, list[E]]:
    """Split -> entries, by a hash of the path: a picture stays in its split when others come or go."""
    splits: dict[str, list[E]] = {split: [] for split in SPLITS}
    for entry in entries:
        part = int(_hash(entry.file)[:13], 16) / 16**13
        name = "val" if part < val_fraction else "test" if part < val_fraction + test_fraction else "train"
        splits[name].append(entry)
    return {split: some for split, some in splits.items() if some}


def write_pictures(
    out: Path,
    splits: Mapping[str, Sequence[E]],
    read: Callable[[E], dict[str, Any]],
    *,
    layout: str,
    where: str,
    about: str,
    writing: Writing,
    extra: Mapping[str, Any] | None = None,
    **index: Any,
) -> Path:
    """Write shards, file lists and index. The bytes do not depend on the number of workers.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        splits: split -> its pictures, in any order that follows from the source.
        read: entry -> the fields of its sample (see `write_shard`; the key is given here). Runs in a worker process,
            so it must pickle. Whatever it raises means that the picture is skipped, counted and named in the log.
        layout: name of the writer, under which counts and seed go into the index's `extra`.
        where: option and value, for messages.
        about: the index's `source`.
        writing: how.
        extra: more for `extra[layout]`.
        index: classes, seg_classes, language of `write_index`.

    Returns:
        The path of index.json.

    Raises:
        UserError: no picture can be read, or `out` can't be written or holds shards already.
    """
    splits = {s: sorted(entries, key=lambda e: _hash(f"{writing.seed}:{e.file}")) for s, entries in splits.items()}
    _make_room(out, writing.overwrite)
    jobs = [
        (split, number, start, entries[start : start + writing.shard_size])
        for split, entries in splits.items()
        for number, start in enumerate(range(0, len(entries), writing.shard_size))
    ]
    write = partial(_write_one, read=read, out=out)
    written = list(spread(write, jobs, writing.workers))

    skipped = [line for _, lines in written for line in lines]
    total = sum(info.count for info, _ in written)
    if skipped:
        log.warning(
            "%s: skipped %d unreadable of %d pictures: %s", where, len(skipped), total + len(skipped), skipped[0]
        )
    if not total:
        raise UserError(f"{where}: none of its {len(skipped)} pictures can be read, first {skipped[0]}")
    for split, entries in splits.items():
        lines = [f"{position:09d}\t{entry.file}\n" for position, entry in enumerate(entries)]
        (out / f"{split}-files.tsv").write_text("".join(lines), encoding="utf-8")
    return write_index(
        out,
        {split: [info for job, (info, _) in zip(jobs, written, strict=True) if job[0] == split] for split in splits},
        licence=writing.licence,
        source=about,
        extra={layout: {"skipped": len(skipped), "seed": writing.seed, **(extra or {})}},
        **index,
    )


def read_picture(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """The bytes to store, their extension, and (width, height) in pixels as `decode_image` will see them: upright.

    Decodes once to be sure that it works. JPEG, PNG and WebP bytes stay as they are; other formats become PNG.
    """
    data = path.read_bytes()
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        warnings.simplefilter("ignore")
        image.load()
        width, height = image.size
        if image.format in _STORED:
            if image.getexif().get(_ORIENTATION) in _ON_THE_SIDE:
                width, height = height, width
            return data, _STORED[image.format], (width, height)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue(), "png", (width, height)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A mask of one byte a pixel (grey, or the indices of a palette) -> uint8 (H, W).

    Raises:
        ValueError: another kind of picture, or not of the (width, height) of its picture.
    """
    with Image.open(path, formats=FORMATS) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"mask {path.name} of mode {image.mode}, wanted 8-bit grey or palette")
        check_size(f"mask {path.name}", image.size, size)
        return np.array(image, np.uint8)


def check_size(what: str, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raises ValueError where (width, height) differs from the picture's."""
    if found != wanted:
        raise ValueError(f"{what} has {found[0]} x {found[1]} pixels, the picture {wanted[0]} x {wanted[1]}")


def is_picture(name: str) -> bool:
    """By its suffix; hidden files are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _write_one(
    job: tuple[str, int, int, Sequence[E]], *, read: Callable[[E], dict[str, Any]], out: Path
) -> tuple[ShardInfo, list[str]]:
    """Write one shard; also say, a line each, what could not be read."""
    split, number, start, entries = job
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for position, entry in enumerate(entries, start):
            try:
                fields = read(entry)
            except UnidentifiedImageError:  # its message names a buffer in memory
                skipped.append(f"{entry.file} (no picture)")
                continue
            except Exception as err:
                skipped.append(f"{entry.file} ({' '.join(str(err).split()) or type(err).__name__})")
                continue
            yield {"key": f"{position:09d}", **fields}

    return write_shard(out / f"{split}-{number:06d}.tar", samples()), skipped


def _make_room(out: Path, overwrite: bool) -> None:
    if not (out / INDEX_NAME).exists():
        return
    if not overwrite:
        raise UserError(f"out: {out} holds shards already; choose another folder or say --overwrite true")
    old = read_index(out)
    (out / INDEX_NAME).unlink()  # first, so that no index ever speaks of shards that are gone
    for shard in (shard for shards in old.splits.values() for shard in shards):
        if not is_remote(shard.file) and out.resolve() in (path := Path(old.url(shard)).resolve()).parents:
            path.unlink(missing_ok=True)  # an index may also name shards elsewhere, which stay


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
