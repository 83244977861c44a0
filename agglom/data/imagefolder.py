"""A folder of pictures into shards, their bytes untouched."""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from PIL import Image, UnidentifiedImageError

from agglom.data.index import INDEX_NAME, ShardInfo, is_remote, read_index, write_index
from agglom.data.shards import write_shard
from agglom.errors import UserError

log = logging.getLogger("agglom.data")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # what PIL finds -> copied as; others become png


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
    source, out = Path(source), Path(out)
    if not (0 <= val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UserError(f"val_fraction {val_fraction}, test_fraction {test_fraction}; valid: 0 or more, sum below 1")
    for name, value in (("shard_size", shard_size), ("workers", workers if workers is not None else 1)):
        if value < 1:
            raise UserError(f"{name}: {value}; valid: 1 or more")
    splits, classes = scan(source, val_fraction=val_fraction, test_fraction=test_fraction)
    splits = {split: sorted(entries, key=lambda e: _hash(f"{seed}:{e.file}")) for split, entries in splits.items()}
    _make_room(out, overwrite)

    jobs = [
        (split, number, start, entries[start : start + shard_size])
        for split, entries in splits.items()
        for number, start in enumerate(range(0, len(entries), shard_size))
    ]
    write = partial(_write_one, source=source, out=out)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(workers or cores, len(jobs))
    if processes <= 1:
        written = [write(job) for job in jobs]
    else:  # spawn: the forked child of a process with torch's threads may hang
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            written = list(pool.map(write, jobs))

    skipped = [line for _, lines in written for line in lines]
    total = sum(info.count for info, _ in written)
    if skipped:
        log.warning(
            "%s: skipped %d unreadable of %d pictures: %s", source, len(skipped), total + len(skipped), skipped[0]
        )
    if not total:
        raise UserError(f"source: {source}: none of its {len(skipped)} pictures can be read, first {skipped[0]}")
    for split, entries in splits.items():
        lines = [f"{position:09d}\t{entry.file}\n" for position, entry in enumerate(entries)]
        (out / f"{split}-files.tsv").write_text("".join(lines), encoding="utf-8")
    return write_index(
        out,
        {split: [info for job, (info, _) in zip(jobs, written, strict=True) if job[0] == split] for split in splits},
        classes=classes,
        licence=licence,
        source=f"pictures of the folder {source.resolve().name}",
        extra={"imagefolder": {"skipped": len(skipped), "seed": seed}},
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
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        part = int(_hash(entry.file)[:13], 16) / 16**13
        splits["val" if part < val_fraction else "test" if part < val_fraction + test_fraction else "train"].append(
            entry
        )
    return {split: some for split, some in splits.items() if some}, classes


def _entries(folder: Path, prefix: str) -> tuple[list[Entry], list[str] | None]:
    folders = _folders(folder)
    flat = sorted(name for name in os.listdir(folder) if _is_picture(name) and (folder / name).is_file())
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
        if _is_picture(file)
    )


def _folders(folder: Path) -> list[str]:
    return sorted(n for n in os.listdir(folder) if (folder / n).is_dir() and not n.startswith((".", "__MACOSX")))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _make_room(out: Path, overwrite: bool) -> None:
    if not (out / INDEX_NAME).exists():
        return
    if not overwrite:
        raise UserError(f"out: {out} holds shards already; choose another folder or say --overwrite true")
    old = read_index(out)
    (out / INDEX_NAME).unlink()  # first, so that no index ever speaks of shards that are gone
    for shard in (shard for shards in old.splits.values() for shard in shards):
        if not is_remote(shard.file):
            Path(old.url(shard)).unlink(missing_ok=True)


def _write_one(job: tuple[str, int, int, list[Entry]], *, source: Path, out: Path) -> tuple[ShardInfo, list[str]]:
    """Write one shard; also say, a line each, what could not be read."""
    split, number, start, entries = job
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for position, entry in enumerate(entries, start):
            try:
                data, ext = _read(source / entry.file)
            except UnidentifiedImageError:  # its message names a buffer in memory
                skipped.append(f"{entry.file} (no picture)")
                continue
            except Exception as err:
                skipped.append(f"{entry.file} ({' '.join(str(err).split()) or type(err).__name__})")
                continue
            sample = {"key": f"{position:09d}", "image": data, "ext": ext}
            yield sample if entry.cls is None else {**sample, "cls": entry.cls}

    return write_shard(out / f"{split}-{number:06d}.tar", samples()), skipped


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes to store and their extension, after decoding them once to be sure that it works."""
    data = path.read_bytes()
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        image.load()
        if image.format in _STORED:
            return data, _STORED[image.format]
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue(), "png"
