"""PASCAL VOC into shards: 20 classes as masks, boxes and lists of labels."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from agglom.data.coco_annotations import clip_box
from agglom.data.writing import (
    DEFAULTS,
    IGNORE,
    SPLITS,
    Writing,
    check_size,
    log,
    read_mask,
    read_picture,
    write_pictures,
)
from agglom.errors import UserError, nearest

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SETS = ("Segmentation", "Main")


class Entry(NamedTuple):
    """One picture: its file and its mask's relative to the source, size as annotated, and boxes as in the shards."""

    file: str
    mask: str | None
    size: tuple[int, int] | None
    boxes: list[dict[str, Any]] | None


def write_voc(
    out: str | Path, *, source: str | Path, image_set: str = "Segmentation", writing: Writing = DEFAULTS
) -> Path:
    """Write the VOC layout (Everingham et al. 2010; 2007 and 2012) as shards.

    Fields: `seg` from `SegmentationClass` (0 background, 1 to 20, 255 the border), and from `Annotations`, if there,
    `boxes` with labels 0 to 19 and `cls`, the list of the classes present. VOC counts pixels from 1 and includes the
    last, so that xmin..xmax becomes x = xmin - 1, w = xmax - xmin + 1. "difficult" objects have iscrowd 1: like COCO's
    crowds, they are neither missed nor wrong when found. Boxes are clipped to the picture; those without any area left
    are dropped and counted. Pictures that can't be read or do not fit their annotation are skipped, counted and named
    in the log.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        source: the folder with `JPEGImages` (VOCdevkit/VOC2012).
        image_set: folder of `ImageSets` whose train.txt, val.txt and test.txt are the splits: Segmentation, or Main,
            which has more pictures and no masks.
        writing: size of the shards and the like.

    Returns:
        The path of index.json.

    Raises:
        UserError: no such layout, an annotation that is missing or broken or has another class, no picture that can be
            read, or `out` can't be written or holds shards already.
    """
    source = Path(source)
    if image_set not in SETS:
        raise UserError(f"image_set: {image_set!r}; {nearest(image_set, SETS)}")
    masks, boxes = image_set == "Segmentation", (source / "Annotations").is_dir()
    needed = ["JPEGImages", f"ImageSets/{image_set}", *(["SegmentationClass"] if masks else ["Annotations"])]
    for name in needed:
        if not (source / name).is_dir():
            raise UserError(f"source: {source} has no folder {name}; give the one of the year, as VOCdevkit/VOC2012")
    splits: dict[str, list[Entry]] = {}
    counts = Counter(boxes_without_area=0)
    for split in SPLITS:
        listed = source / "ImageSets" / image_set / f"{split}.txt"
        names = _names(listed) if listed.is_file() else []
        if names:
            splits[split] = [_entry(source, name, masks=masks, boxes=boxes, counts=counts) for name in names]
    if not splits:
        raise UserError(f"source: {source / 'ImageSets' / image_set} has no names in train.txt, val.txt or test.txt")
    if counts["boxes_without_area"]:
        log.warning("%s: boxes without area: %d", source, counts["boxes_without_area"])
    return write_pictures(
        Path(out),
        splits,
        partial(_read, source=source),
        layout="voc",
        where=f"source: {source}",
        about=f"PASCAL VOC, {source.resolve().name}, image set {image_set}",
        writing=writing,
        extra={"image_set": image_set, **counts},
        classes=CLASSES if boxes else None,
        seg_classes=("background", *CLASSES) if masks else None,
    )


def read_objects(path: Path, counts: Counter[str]) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """An annotation -> (width, height) in pixels, and its boxes as in the shards.

    Raises:
        UserError: missing or broken, or a class that VOC does not have.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = (int(_text(root, "size/width")), int(_text(root, "size/height")))
        boxes = []
        for item in root.findall("object"):
            name = _text(item, "name")
            if name not in CLASSES:
                raise UserError(f"{path}: class {name!r}; {nearest(name, CLASSES)}")
            left, top, right, bottom = (float(_text(item, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            if not all(map(math.isfinite, (left, top, right, bottom))):
                raise ValueError("a corner that is not finite")
            box = clip_box([left - 1, top - 1, right - left + 1, bottom - top + 1], size)
            if box is None:
                counts["boxes_without_area"] += 1
                continue
            crowd = int(item.findtext("difficult", "0").strip() == "1")
            boxes.append({"bbox": box, "label": CLASSES.index(name), "iscrowd": crowd})
    except OSError as err:
        raise UserError(f"{path}: can't be read ({err.strerror}); add it or take the name off the list") from err
    except (ElementTree.ParseError, ValueError) as err:
        raise UserError(f"{path}: broken annotation ({err}); download it again") from err
    return size, boxes


def _entry(source: Path, name: str, *, masks: bool, boxes: bool, counts: Counter[str]) -> Entry:
    size, found = read_objects(source / "Annotations" / f"{name}.xml", counts) if boxes else (None, None)
    return Entry(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png" if masks else None, size, found)


def _names(path: Path) -> list[str]:
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} twice; list each picture once")
    return names


def _text(item: ElementTree.Element, name: str) -> str:
    text = item.findtext(name)
    if text is None:
        raise ValueError(f"no {name}")
    return text.strip()


def _read(entry: Entry, *, source: Path) -> dict[str, Any]:
    data, ext, size = read_picture(source / entry.file)
    sample: dict[str, Any] = {"image": data, "ext": ext}
    if entry.size is not None:
        check_size("its annotation", entry.size, size)
    if entry.mask is not None:
        seg = read_mask(source / entry.mask, size)
        odd = seg[(seg > len(CLASSES)) & (seg != IGNORE)]
        if odd.size:
            raise ValueError(f"mask value {odd[0]}, wanted 0 to {len(CLASSES)} or {IGNORE}")
        sample["seg"] = seg
    if entry.boxes is not None:
        sample["boxes"] = entry.boxes
        sample["cls"] = sorted({box["label"] for box in entry.boxes})
    return sample
