"""A COCO folder, or any data in COCO's format, into shards: masks, boxes, classes and captions in one go.

| field   | from      | is                                                                               |
|---------|-----------|----------------------------------------------------------------------------------|
| `boxes` | instances | clipped to the image; labels from 0 on in the order of the category ids          |
| `cls`   | instances | list of the classes present, crowds too                                          |
| `seg`   | panoptic  | things and stuff in the order of their category ids; 255 = void                  |
| `seg`   | instances | 0 = background, class k is k + 1; 255 = crowds, and boxes of things without mask |
| `txt`   | captions  | one a line; empty where an image has none                                        |
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
from PIL import Image

from agglom.data.coco_annotations import (
    Annotations,
    Segments,
    Thing,
    read_captions,
    read_instances,
    read_panoptic,
)
from agglom.data.coco_masks import instance_mask, panoptic_mask
from agglom.data.index import FORMATS
from agglom.data.writing import (
    DEFAULTS,
    IGNORE,
    SPLITS,
    Writing,
    check_fractions,
    check_size,
    read_picture,
    split_by_path,
    write_pictures,
)
from agglom.errors import UserError

log = logging.getLogger("agglom.data")

_READ: dict[str, Callable[[Path], Annotations]] = {
    "instances": read_instances,
    "captions": read_captions,
    "panoptic": read_panoptic,
}
MASKS = ("panoptic", "instances", "none")


class Files(NamedTuple):
    """The pictures of a split below the source, and its annotation files by kind."""

    images: str
    annotations: dict[str, Path]


class Entry(NamedTuple):
    """One picture and what is known of it; None where the split has no such file."""

    file: str
    size: tuple[int, int] | None
    things: list[Thing] | None
    captions: list[str] | None
    segments: Segments | None
    maps: Path | None


def write_coco(
    out: str | Path,
    *,
    source: str | Path | None = None,
    images: str | Path | None = None,
    instances: str | Path | None = None,
    captions: str | Path | None = None,
    panoptic: str | Path | None = None,
    masks: str | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    language: str | None = None,
    writing: Writing = DEFAULTS,
) -> Path:
    """Write images in COCO's format as shards, with the fields of the table above.

    An image that can't be read, is not there, or has not the size that its annotations say, is skipped, counted and
    named in the log. Of a split, the images are those that all its annotation files list.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        source: folder in COCO's layout: `annotations/{instances,captions,panoptic}_NAME.json`, any of them, with
            pictures in `NAME` or `images/NAME` and panoptic maps in `annotations/panoptic_NAME`. A NAME that starts
            with train, val or test is that split.
        images, instances, captions, panoptic: instead of `source`, a folder of pictures and annotation files for them.
            Panoptic maps lie in a folder beside their file and named like it, without .json.
        masks: what `seg` is made of: panoptic, instances or none. None: panoptic if all splits have it, else instances
            if there are any with masks.
        val_fraction, test_fraction: part of the pictures that goes to these splits, by a hash of the path. Only
            without `source`.
        language: of the captions, for the index.
        writing: size of the shards and the like.

    Returns:
        The path of index.json.

    Raises:
        UserError: files that are missing, broken or contradict each other, a value out of range, no picture that can be
            read, or `out` can't be written or holds shards already.
    """
    check_fractions(val_fraction, test_fraction)
    if masks not in (None, *MASKS):
        raise UserError(f"masks: {masks!r}; valid: {', '.join(MASKS)}, or leave it out")
    given = {"instances": instances, "captions": captions, "panoptic": panoptic}
    files = {kind: Path(path) for kind, path in given.items() if path is not None}
    if source is not None:
        if images is not None or files:
            raise UserError(f"source: {source}; valid: either source, or images and annotation files; drop one")
        if val_fraction or test_fraction:
            raise UserError(f"source: {source} has splits of its own; leave the fractions at 0")
        root, layout = Path(source), find_files(Path(source))
    else:
        if images is None or not files:
            raise UserError(
                "give --source DIR, or --images DIR with any of --instances, --captions and --panoptic FILE"
            )
        root, layout = Path(images), {"train": Files("", files)}
        if not root.is_dir():
            raise UserError(f"images: {root}: no such folder")

    read = {
        split: {kind: _READ[kind](path) for kind, path in files.annotations.items()} for split, files in layout.items()
    }
    classes = _one_list("instances", layout, read)
    masks = _masks(masks, layout, read)
    seg_classes = _one_list("panoptic", layout, read) if masks == "panoptic" else None
    if masks == "instances":
        seg_classes = ("background", *(classes or ()))
    if len(seg_classes or ()) > IGNORE:
        raise UserError(
            f"masks: {masks} has {len(seg_classes or ())} classes; valid: up to {IGNORE}, as a mask has 8 bits; "
            "say --masks none"
        )
    splits, counts = {}, Counter[str]()
    for split, found in read.items():
        splits[split] = _entries(layout[split], found, masks, counts)
        counts.update({key: n for kind in found.values() for key, n in kind.counts.items()})
    for key, number in counts.items():
        if number:
            log.warning("%s: %s: %d", root, key.replace("_", " "), number)
    if source is None:
        splits = split_by_path(splits["train"], val_fraction, test_fraction)
    return write_pictures(
        Path(out),
        splits,
        partial(_read, root=root, masks=masks),
        layout="coco",
        where=f"{'images' if source is None else 'source'}: {root}",
        about="COCO format, " + ", ".join(p.name for files in layout.values() for p in files.annotations.values()),
        writing=writing,
        extra={"masks": masks, **counts},
        classes=classes,
        seg_classes=seg_classes,
        language=language if any("captions" in found for found in read.values()) else None,
    )


def find_files(source: Path) -> dict[str, Files]:
    """Split -> its files, in a folder of COCO's layout (see `write_coco`).

    Raises:
        UserError: no such folder, no annotation files in it, two of them for one split, or no pictures for one.
    """
    if not source.is_dir():
        raise UserError(f"source: {source}: no such folder")
    named: dict[str, dict[str, Path]] = {}
    for path in sorted((source / "annotations").glob("*.json")):
        if match := re.fullmatch(r"(instances|captions|panoptic)_(.+)\.json", path.name):
            named.setdefault(match[2], {})[match[1]] = path
    if not named:
        raise UserError(
            f"source: {source} has no annotations/instances_*.json, captions_*.json or panoptic_*.json; give --images "
            "and --instances, --captions or --panoptic instead"
        )
    layout: dict[str, Files] = {}
    for name, files in named.items():
        split = next((split for split in SPLITS if name.startswith(split)), None)
        first = next(iter(files.values()))
        if split is None or split in layout:
            problem = "is of no split" if split is None else f"is one more of split {split}"
            raise UserError(
                f"source: {first} {problem}; valid: one train*, one val*, one test*; move it away or give --images and "
                "the files"
            )
        folder = next((f for f in (name, f"images/{name}") if (source / f).is_dir()), None)
        if folder is None:
            raise UserError(
                f"source: {source} has no pictures for {first.name}; valid: a folder {name} or images/{name}"
            )
        layout[split] = Files(f"{folder}/", files)
    return {split: layout[split] for split in SPLITS if split in layout}


def _one_list(
    kind: str, layout: Mapping[str, Files], read: Mapping[str, Mapping[str, Annotations]]
) -> tuple[str, ...] | None:
    """The class names of a kind, the same in all splits that have it."""
    first: tuple[Path, tuple[str, ...]] | None = None
    for split, found in read.items():
        if kind in found:
            path, names = layout[split].annotations[kind], found[kind].classes
            if first is not None and names != first[1]:
                odd = sorted(set(names) ^ set(first[1]))
                what = f"first {odd[0]!r}" if odd else "in another order"
                raise UserError(f"{path}: other categories than {first[0]}, {what}; give both the same")
            first = first or (path, names)
    return first[1] if first else None


def _masks(masks: str | None, layout: Mapping[str, Files], read: Mapping[str, Mapping[str, Annotations]]) -> str:
    """What masks are made of; the files must be there."""
    drawn = {
        split for split, found in read.items()
        if "instances" in found and any(thing.mask for things in found["instances"].of.values() for thing in things)
    }  # fmt: skip
    if masks is None:
        mapped = [split for split, found in read.items() if "panoptic" in found]
        masks = "panoptic" if len(mapped) == len(read) else "instances" if drawn else "none"
        if mapped and masks != "panoptic":
            log.warning("masks: %s, as only %s has panoptic maps", masks, ", ".join(mapped))
    lacking = [split for split, found in read.items() if masks == "panoptic" and "panoptic" not in found]
    if lacking or (masks == "instances" and not drawn):
        raise UserError(
            f"masks: {masks}, but split {(lacking or list(read))[0]} has none; give its file or other masks"
        )
    for files in layout.values():
        if masks == "panoptic" and not files.annotations["panoptic"].with_suffix("").is_dir():
            path = files.annotations["panoptic"]
            raise UserError(f"panoptic: {path}: no folder {path.stem} with its maps beside it; put it there")
    return masks


def _entries(files: Files, found: Mapping[str, Annotations], masks: str, counts: Counter[str]) -> list[Entry]:
    listed = [annotations.images for annotations in found.values()]
    everywhere = sorted(set.intersection(*map(set, listed)))
    if not everywhere:
        names = ", ".join(str(path) for path in files.annotations.values())
        raise UserError(f"{names}: no image that {'all of them list' if len(listed) > 1 else 'it lists'}")
    counts["images_not_in_all_files"] += len(set.union(*map(set, listed))) - len(everywhere)
    instances, captions, panoptic = (found.get(kind) for kind in ("instances", "captions", "panoptic"))
    entries = []
    for key in everywhere:
        if captions and key not in captions.of:
            counts["images_without_caption"] += 1
        sizes = {images[key].size for images in listed} - {None}
        if len(sizes) > 1:
            raise UserError(f"{files.annotations['panoptic']}: image {key}: another size than in the instances' file")
        entries.append(
            Entry(
                file=files.images + listed[0][key].file,
                size=next(iter(sizes), None),
                things=instances.of.get(key, []) if instances else None,
                captions=captions.of.get(key, []) if captions else None,
                segments=panoptic.of.get(key) if panoptic and masks == "panoptic" else None,
                maps=files.annotations["panoptic"].with_suffix("") if panoptic and masks == "panoptic" else None,
            )
        )
    return entries


def _read(entry: Entry, *, root: Path, masks: str) -> dict[str, Any]:
    data, ext, size = read_picture(root / entry.file)
    if entry.size is not None:
        check_size("its annotation", entry.size, size)
    sample: dict[str, Any] = {"image": data, "ext": ext}
    if entry.things is not None:
        sample["boxes"] = [{"bbox": t.box, "label": t.label, "iscrowd": int(t.crowd)} for t in entry.things]
        sample["cls"] = sorted({thing.label for thing in entry.things})
        if masks == "instances":
            sample["seg"] = instance_mask(entry.things, size)
    if entry.captions is not None:
        sample["txt"] = "\n".join(entry.captions)
    if masks == "panoptic":
        if entry.segments is None or entry.maps is None:
            raise ValueError("no panoptic annotation")
        with Image.open(entry.maps / entry.segments.file, formats=FORMATS) as image:
            if image.mode != "RGB":
                raise ValueError(f"panoptic map {entry.segments.file} of mode {image.mode}, wanted RGB")
            check_size(f"panoptic map {entry.segments.file}", image.size, size)
            sample["seg"] = panoptic_mask(np.array(image), entry.segments.classes)
    return sample
