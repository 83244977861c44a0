"""A folder of pictures into shards, their bytes untouched."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from agglom.data.writing import (
    SPLITS,
    SUFFIXES,
    Writing,
    check_fractions,
    is_picture,
    read_picture,
    split_by_path,
    write_pictures,
)
from agglom.errors import UserError


class Entry(NamedTuple):
    """One picture: its file relative to the source, and its class (None in a flat folder)."""

    file: str
    cls: int | None


def write_imagefolder(
    out: str | Path,
    *,
    source: str | Path,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    shard_size: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    licence: str = "unknown",
    overwrite: bool = False,
) -> Path:
    """Write the pictures of a folder as shards.

    The source has one folder a class (`source/cat/1.jpg`, nested as deep as you like), or the pictures themselves and
    no classes, or either of these under `train`, `val` and `test`. JPEG, PNG and WebP bytes are copied as they are;
    other formats become PNG. Pictures that can't be decoded are skipped, counted and named in the log. The bytes of
    the shards do not depend on the number of workers.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        source: the folder of pictures.
        val_fraction, test_fraction: part of the pictures that goes to these splits, by a hash of the path, so that
            a picture stays in its split when others come or go. Not for a source that has splits itself.
        shard_size: pictures a shard.
        seed: another seed, another order in the shards (classes are mixed).
        workers: processes; None: one a core.
        licence: of the pictures, in words, for the index.
        overwrite: replace a shard folder that is already there.

    Returns:
        The path of index.json.

    Raises:
        UserError: no such source or nothing to read in it, a value out of range, or `out` can't be written or holds
            shards already.
    """
    source = Path(source)
    check_fractions(val_fraction, test_fraction)
    writing = Writing(shard_size=shard_size, seed=seed, workers=workers, licence=licence, overwrite=overwrite)
    splits, classes = scan(source, val_fraction=val_fraction, test_fraction=test_fraction)
    return write_pictures(
        Path(out),
        splits,
        partial(_read, source=source),
        layout="imagefolder",
        where=f"source: {source}",
        about=f"pictures of the folder {source.resolve().name}",
        writing=writing,
        classes=classes,
    )


def scan(
    source: Path, *, val_fraction: float = 0.0, test_fraction: float = 0.0
) -> tuple[dict[str, list[Entry]], list[str] | None]:
    """What is in the folder: split -> entries (sorted by path), and the names of the classes or None.

    Raises:
        UserError: nothing there, pictures both beside and in folders, or fractions for a source that has splits.
    """
    if not source.is_dir():
        raise UserError(f"source: {source}: no such folder")
    folders = _folders(source)
    if "train" in folders and set(folders) <= set(SPLITS):
        if val_fraction or test_fraction:
            raise UserError(f"source: {source} has splits of its own ({', '.join(folders)}); leave the fractions at 0")
        found = {split: _entries(source / split, f"{split}/") for split in SPLITS if split in folders}
        classes = found["train"][1]
        for split, (_, names) in found.items():
            if names != classes:
                odd = sorted(set(names or []) ^ set(classes or []))[0]
                raise UserError(f"source: {source / split}: other classes than in {source / 'train'}, first {odd!r}")
        return {split: entries for split, (entries, _) in found.items()}, classes
    entries, classes = _entries(source, "")
    return split_by_path(entries, val_fraction, test_fraction), classes


def _entries(folder: Path, prefix: str) -> tuple[list[Entry], list[str] | None]:
    folders = _folders(folder)
    flat = sorted(name for name in os.listdir(folder) if is_picture(name) and (folder / name).is_file())
    below = {name: _pictures_below(folder, name) for name in folders}
    if flat and any(below.values()):
        odd = next(name for name in folders if below[name])
        raise UserError(f"source: {folder} has pictures ({flat[0]}) beside class folders ({odd}); move them away")
    if flat:
        return [Entry(prefix + name, None) for name in flat], None
    if not any(below.values()):
        raise UserError(f"source: {folder}: no pictures ({', '.join(SUFFIXES)}), neither in it nor in folders below")
    for name, files in below.items():
        if not files:
            raise UserError(f"source: class folder {folder / name} has no pictures ({', '.join(SUFFIXES)}); remove it")
    return [Entry(prefix + file, cls) for cls, name in enumerate(folders) for file in below[name]], folders


def _pictures_below(folder: Path, name: str) -> list[str]:
    """Pictures anywhere in folder/name, as sorted paths relative to `folder`."""
    return sorted(
        Path(where, file).relative_to(folder).as_posix()
        for where, _, files in os.walk(folder / name, followlinks=True)
        for file in files
        if is_picture(file)
    )


def _folders(folder: Path) -> list[str]:
    return sorted(n for n in os.listdir(folder) if (folder / n).is_dir() and not n.startswith((".", "__MACOSX")))


def _read(entry: Entry, *, source: Path) -> dict[str, Any]:
    data, ext, _ = read_picture(source / entry.file)
    return {"image": data, "ext": ext} if entry.cls is None else {"image": data, "ext": ext, "cls": entry.cls}
