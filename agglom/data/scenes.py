"""Fashion scenes: real Fashion-MNIST garments on cluttered canvases, with masks, boxes, classes and captions.

A scene is a pure function of (garments, seed, index, size): any worker may render any scene. Backgrounds are muted and
garments saturated, and garments are larger where there are few, for a small model learns nothing but colour otherwise.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from agglom.data.garments import CLASSES, Garments, load_garments
from agglom.data.index import ShardInfo, read_index, write_index
from agglom.data.processes import cores, spread
from agglom.data.shards import write_shard
from agglom.errors import UserError

COLOURS = {
    "red": (225, 30, 35),
    "orange": (250, 130, 15),
    "yellow": (245, 220, 30),
    "green": (45, 175, 50),
    "cyan": (40, 205, 215),
    "blue": (40, 75, 225),
    "purple": (140, 45, 190),
    "pink": (250, 105, 180),
}
PROMPTS = ("a {}", "a photo of a {}", *(f"a {colour} {{}}" for colour in COLOURS))
"""Zero-shot templates in the captions' own words; "{}" takes a class name."""

SPLITS = ("train", "val", "test")
VERSION = 1  # of what is drawn: raise it whenever `render` gives other bytes
_SCALES = {1: (1.25, 1.6), 2: (0.95, 1.4), 3: (0.8, 1.15), 4: (0.7, 1.0)}  # of 28 px on a canvas of 64
_COUNTS = (0.4, 0.3, 0.18, 0.12)  # chance of 1, 2, 3, 4 garments
_MIN_VISIBLE = 0.6  # a garment is placed only where every earlier one keeps this fraction of its area


class _Placed(NamedTuple):
    label: int
    colour: str
    area: int  # pixels, before anything covered it
    touched: frozenset[int]  # earlier garments that it covers in part


def render(garments: Garments, seed: int, index: int, size: int = 64, plain: bool = False) -> dict[str, Any]:
    """One scene.

    Args:
        garments: what to draw from.
        seed, index: choose the scene; equal arguments give equal bytes.
        size: height and width in pixels.
        plain: one garment on a canvas of one muted colour.

    Returns:
        A sample for `write_shard`: `key`, `image` uint8 (size, size, 3), `seg` uint8 (size, size) with 0 = background
        and 1 + class, `boxes` of the visible extents, `cls` the class with the largest visible area, `txt` the caption.
    """
    rng = np.random.default_rng((seed, index))
    canvas = np.tile(_muted(rng, 1)[0].astype(np.float32), (size, size, 1)) if plain else _background(rng, size)
    owner = np.full((size, size), -1, dtype=np.int8)  # which garment a pixel shows
    placed: list[_Placed] = []
    count = 1 if plain else 1 + int(rng.choice(4, p=_COUNTS))
    for _ in range(count):
        item = int(rng.integers(len(garments.images)))
        colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
        scale = rng.uniform(*_SCALES[count]) * size / 64
        grey, soft = _cut_out(garments.images[item], scale, flip=rng.random() < 0.5)
        spot = _find_spot(rng, soft >= 0.5, owner, placed)
        if spot is None:
            continue
        y, x = spot
        window = np.s_[y : y + soft.shape[0], x : x + soft.shape[1]]
        mask = soft >= 0.5
        touched = frozenset(int(k) for k in np.unique(owner[window][mask]) if k >= 0)
        canvas[window] += soft[..., None] * (_tint(rng, grey, COLOURS[colour]) - canvas[window])
        owner[window][mask] = len(placed)
        placed.append(_Placed(int(garments.labels[item]), colour, int(mask.sum()), touched))
    canvas += rng.normal(0, 4, canvas.shape)
    labels = np.array([p.label for p in placed] + [-1])  # the last one is what owner -1 picks
    seg = (labels[owner] + 1).astype(np.uint8)
    boxes = [_box(owner == k) for k in range(len(placed))]
    dominant = int(np.bincount(seg[seg > 0], minlength=1).argmax()) - 1
    return {
        "key": f"{index:09d}",
        "image": canvas.clip(0, 255).astype(np.uint8),
        "seg": seg,
        "boxes": [{"bbox": box, "label": p.label, "iscrowd": 0} for box, p in zip(boxes, placed, strict=True)],
        "cls": dominant,
        "txt": _caption(rng, placed, boxes, np.bincount(owner[owner >= 0], minlength=len(placed)), dominant),
    }


def _muted(rng: np.random.Generator, count: int, chroma: float = 0.22) -> np.ndarray:
    """(count, 3) greyish colours on the 0..255 scale."""
    grey = rng.uniform(50, 205, (count, 1))
    return (grey + chroma * 255 * (rng.random((count, 3)) - 0.5)).clip(0, 255)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32: a gradient, smooth noise, stripes or checks, strewn with polygons and blobs."""
    first, second = _muted(rng, 2)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * axis + np.sin(angle) * axis[:, None]
    across = np.cos(angle) * axis[:, None] - np.sin(angle) * axis
    kind, pitch = rng.integers(4), rng.uniform(0.12, 0.5)
    if kind == 0:
        blend = along * 0.35 + 0.5
    elif kind == 1:
        cells = int(rng.integers(3, 9))
        noise = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
        blend = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    elif kind == 2:
        blend = (along / pitch % 1 < 0.5).astype(np.float32)
    else:
        blend = ((along / pitch % 1 < 0.5) ^ (across / pitch % 1 < 0.5)).astype(np.float32)
    picture = Image.fromarray((first + blend[..., None] * (second - first)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for colour in _muted(rng, int(rng.integers(2, 7)), chroma=0.3).astype(int):
        corner, extent = rng.uniform(-0.1, 1, 2) * size, rng.uniform(0.08, 0.35, 2) * size
        if rng.random() < 0.5:
            draw.ellipse([*corner, *(corner + extent)], fill=tuple(colour.tolist()))
        else:
            points = corner + rng.random((int(rng.integers(3, 6)), 2)) * extent * 1.4
            draw.polygon(points.ravel().tolist(), fill=tuple(colour.tolist()))
    return np.asarray(picture, dtype=np.float32).copy()


def _cut_out(image: np.ndarray, scale: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """A (28, 28) item -> its grey values in 0..1 and its soft outline in 0..1, both resized and cut to the outline."""
    inside = image > 12
    # dark cloth belongs to the garment: fill what has garment to its left and right, above and below
    reach = np.logical_or.accumulate
    inside |= reach(inside, 0) & reach(inside[::-1], 0)[::-1] & reach(inside, 1) & reach(inside[:, ::-1], 1)[:, ::-1]
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image, inside = image[window], inside[window]
    if flip:
        image, inside = image[:, ::-1], inside[:, ::-1]
    shape = max(1, round(inside.shape[1] * scale)), max(1, round(inside.shape[0] * scale))
    outline = Image.fromarray(inside.astype(np.uint8) * 255).resize(shape, Image.Resampling.BILINEAR)
    grey = Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC)
    top = max(int(image.max()), 1)
    return np.asarray(grey, dtype=np.float32) / top, np.asarray(outline, dtype=np.float32) / 255


def _find_spot(
    rng: np.random.Generator, mask: np.ndarray, owner: np.ndarray, placed: list[_Placed]
) -> tuple[int, int] | None:
    """(y, x) inside the canvas where every earlier garment stays visible enough, or None after a few tries."""
    room = np.array(owner.shape) - mask.shape
    if (room < 0).any():
        return None
    shown = np.bincount(owner[owner >= 0], minlength=len(placed))
    for _ in range(8):
        y, x = (int(v) for v in rng.integers(room + 1))
        covered = owner[y : y + mask.shape[0], x : x + mask.shape[1]][mask]
        left = shown - np.bincount(covered[covered >= 0], minlength=len(placed))
        if all(n >= _MIN_VISIBLE * p.area for n, p in zip(left, placed, strict=True)):
            return y, x
    return None


def _tint(rng: np.random.Generator, grey: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Cloth of a named colour: dark folds and seams keep the hue, the brightest spots whiten a little."""
    hue = np.array(colour, dtype=np.float32) * rng.uniform(0.9, 1.05) + rng.uniform(-8, 8, 3).astype(np.float32)
    return hue * (0.25 + 0.75 * grey[..., None]) + 40 * (grey[..., None] - 0.6).clip(0)


def _box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the True pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def _caption(
    rng: np.random.Generator, placed: list[_Placed], boxes: list[list[int]], areas: np.ndarray, dominant: int
) -> str:
    """Dominant garment first, how it stands to the next one, then the rest."""
    order = sorted(range(len(placed)), key=lambda k: (placed[k].label != dominant, -areas[k]))
    names = [_name(f"{placed[k].colour} {CLASSES[placed[k].label]}") for k in order]
    if len(names) == 1:
        return f"a photo of {names[0]}" if rng.random() < 0.5 else names[0]
    a, b = order[:2]
    text = f"{names[0]} {_relation(rng, placed, boxes, a, b)} {names[1]}"
    return text if len(names) == 2 else f"{text}, with {' and '.join(names[2:])}"


def _relation(rng: np.random.Generator, placed: list[_Placed], boxes: list[list[int]], a: int, b: int) -> str:
    if rng.random() < 0.5:
        if b in placed[a].touched:
            return "in front of"
        if a in placed[b].touched:
            return "behind"
    (ax, ay), (bx, by) = ((2 * box[0] + box[2], 2 * box[1] + box[3]) for box in (boxes[a], boxes[b]))
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def _name(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write_scenes(
    out: str | Path,
    *,
    source: str | Path | None = None,
    train: int = 20000,
    val: int = 2000,
    test: int = 4000,
    size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    shard_size: int = 1000,
    plain: bool = False,
) -> Path:
    """Write the data set as shards; the bytes do not depend on the number of workers.

    Args:
        out: the folder. A finished data set made with the same arguments is reused as it is.
        source: see `load_garments`.
        train, val, test: scenes in each split. Train scenes show Fashion-MNIST's train items, the others its test
            items.
        size: height and width of a scene in pixels.
        seed: another seed, other scenes.
        workers: processes; None: one a core.
        shard_size: scenes a shard.
        plain: one garment a scene, on a canvas of one muted colour: pictures of one thing, as most of what
            self-distillation alone has learned from.

    Returns:
        The path of index.json.

    Raises:
        UserError: a value out of range, no garments, or `out` holds another data set.
    """
    counts = {"train": train, "val": val, "test": test}
    limits = {**dict.fromkeys(counts, 0), "size": 48, "seed": 0, "shard_size": 1, "workers": 1}
    given = {
        **counts,
        "size": size,
        "seed": seed,
        "shard_size": shard_size,
        "workers": cores() if workers is None else workers,
    }
    for key, least in limits.items():
        if given[key] < least:
            raise UserError(f"{key}: {given[key]}; valid: {least} or more")
    out = Path(out)
    made = {"version": VERSION, **counts, "size": size, "seed": seed, "shard_size": shard_size}
    made |= {"plain": True} if plain else {}
    if (out / "index.json").exists():
        found = read_index(out).extra.get("scenes")
        if found == made:
            return out / "index.json"
        raise UserError(f"out: {out} holds another data set ({_differences(found, made)}); choose or empty a folder")
    load_garments(source)  # one clear error here rather than one a worker
    jobs = [
        (name, number, start, min(start + shard_size, count))
        for name, count in counts.items()
        for number, start in enumerate(range(0, count, shard_size))
    ]
    write = partial(_write_one, out=out, source=source, size=size, seed=seed, plain=plain)
    infos = list(spread(write, jobs, given["workers"]))
    return write_index(
        out,
        {
            name: [info for job, info in zip(jobs, infos, strict=True) if job[0] == name]
            for name in SPLITS
            if counts[name]
        },
        classes=CLASSES,
        seg_classes=("background", *CLASSES),
        language="en",
        licence="MIT",
        source="fashion scenes, composed from Fashion-MNIST (Zalando SE)",
        extra={"scenes": made, "templates": list(PROMPTS)},
    )


_garments = lru_cache(maxsize=1)(load_garments)  # once a worker process


def _write_one(
    job: tuple[str, int, int, int], *, out: Path, source: str | Path | None, size: int, seed: int, plain: bool
) -> ShardInfo:
    """Render scenes start..stop of a split into its shard of that number."""
    name, number, start, stop = job
    garments = _garments(source)[name]
    own_seed = seed * len(SPLITS) + SPLITS.index(name)  # or val scenes would be laid out like the train scenes
    scenes = (render(garments, own_seed, index, size, plain) for index in range(start, stop))
    return write_shard(out / f"{name}-{number:06d}.tar", scenes)


def _differences(found: dict[str, Any] | None, made: dict[str, Any]) -> str:
    if not found:
        return "not fashion scenes"
    keys = [key for key in {**made, **found} if found.get(key) != made.get(key)]
    return ", ".join(f"{key} {found.get(key)} instead of {made.get(key)}" for key in keys)
