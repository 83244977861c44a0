"""ADE20K's SceneParsing release into shards: 150 classes a pixel, and the scene as label where it is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agglom.data.writing import DEFAULTS, IGNORE, Writing, is_picture, read_mask, read_picture, write_pictures
from agglom.errors import UserError

CLASSES = 150
FOLDERS = {"train": "training", "val": "validation"}


class Entry(NamedTuple):
    """One picture: its file and its mask's relative to the source, and its scene's number."""

    file: str
    mask: str
    cls: int | None


def write_ade(out: str | Path, *, source: str | Path, writing: Writing = DEFAULTS) -> Path:
    """Write the SceneParsing layout (Zhou et al. 2017) as shards with `seg`, and `cls` where scenes are told.

    The source has `images/{training,validation}` and beside it `annotations/{training,validation}` with a PNG of the
    same name for each picture, where 0 is "other" and the classes are 1 to 150. In the shards, class k is k - 1 and
    "other" is 255 (ignored), as in the benchmark. `objectInfo150.txt`, if there, names the classes by their first word
    or words; `sceneCategories.txt`, if there, gives `cls`. Pictures without a mask that fits are skipped, counted and
    named in the log.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        source: the folder.
        writing: size of the shards and the like.

    Returns:
        The path of index.json.

    Raises:
        UserError: no such layout, broken names or scenes, no picture that can be read, or `out` can't be written or
            holds shards already.
    """
    source = Path(source)
    found = {split: name for split, name in FOLDERS.items() if (source / "images" / name).is_dir()}
    if not found:
        raise UserError(f"source: {source} has neither images/training nor images/validation; valid: SceneParsing's")
    for name in found.values():
        if not (source / "annotations" / name).is_dir():
            raise UserError(f"source: {source} has images/{name} without annotations/{name}; put the masks there")
    scenes = _scenes(source / "sceneCategories.txt")
    classes = sorted(set(scenes.values())) if scenes else None
    numbers = {scene: number for number, scene in enumerate(classes or ())}
    splits = {}
    for split, name in found.items():
        files = sorted(path.name for path in (source / "images" / name).iterdir() if is_picture(path.name))
        if not files:
            raise UserError(f"source: {source / 'images' / name} has no pictures; put them there or remove the folder")
        lacking = [file for file in files if scenes and Path(file).stem not in scenes]
        if lacking:
            raise UserError(
                f"source: {source / 'sceneCategories.txt'} lacks {len(lacking)} of {len(files)} pictures of {name}, "
                f"first {lacking[0]}; add them or move the file away"
            )
        splits[split] = [
            Entry(
                f"images/{name}/{file}",
                f"annotations/{name}/{Path(file).stem}.png",
                numbers[scenes[Path(file).stem]] if scenes else None,
            )
            for file in files
        ]
    return write_pictures(
        Path(out),
        splits,
        partial(_read, source=source),
        layout="ade",
        where=f"source: {source}",
        about="ADE20K, SceneParsing",
        writing=writing,
        classes=classes,
        seg_classes=_names(source / "objectInfo150.txt"),
    )


def without_other(mask: np.ndarray) -> np.ndarray:
    """uint8 mask with 0 = other and classes from 1 -> classes from 0 and 255 = ignore. 255 stays 255.

    Raises:
        ValueError: a value that is neither.
    """
    odd = mask[(mask > CLASSES) & (mask != IGNORE)]
    if odd.size:
        raise ValueError(f"mask value {odd[0]}, wanted 0 to {CLASSES} or {IGNORE}")
    return np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)


def _read(entry: Entry, *, source: Path) -> dict[str, Any]:
    data, ext, size = read_picture(source / entry.file)
    seg = without_other(read_mask(source / entry.mask, size))
    sample = {"image": data, "ext": ext, "seg": seg}
    return sample if entry.cls is None else {**sample, "cls": entry.cls}


def _scenes(path: Path) -> dict[str, str]:
    """Name of the picture -> scene, from lines `ADE_train_00000001 airport_terminal`; empty without the file."""
    if not path.is_file():
        return {}
    scenes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise UserError(f"{path}: line {number}: {line[:60]!r}; valid: a picture's name and its scene; mend it")
        if words:
            scenes[words[0]] = words[1]
    return scenes


def _names(path: Path) -> list[str] | None:
    """The 150 names in order, from the table `Idx Ratio Train Val Stuff Name` with tabs; None without the file."""
    if not path.is_file():
        return None
    names: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if cells[0].strip().isdecimal():
            names[int(cells[0])] = cells[-1].split(",")[0].split(";")[0].strip()
    if sorted(names) != list(range(1, CLASSES + 1)) or not all(names.values()):
        raise UserError(f"{path}: {len(names)} names; valid: one for each of 1 to {CLASSES}; download it again")
    return [names[number] for number in sorted(names)]
