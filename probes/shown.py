"""What the report pictures of a few test images: themselves, feature maps, neighbours, masks, boxes, guesses.

Collected once, while features and models are at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.features import Backbone, resize
from agglom.probes import pictures
from agglom.probes.base import in_part
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.knn import nearest
from agglom.probes.measure import Measured
from agglom.probes.source import fit

NEAREST = 4
SIDE = {"neighbours": 128, "photos": 400}  # pixels; larger pictures are made smaller
STRETCH = 16  # images that are decoded for one


def collect(
    out: Path, found: Measured, models: Mapping[str, Backbone], student: str, teachers: Sequence[str]
) -> list[dict[str, Any]]:
    """Save the arrays that the report pictures to `out`; return what it says beside them, an entry a shown image."""
    rows, targets = found.subjects[0].show, found.got.targets["test"]
    if not rows:
        pictures.save(out, {})
        return []
    stored = fetch(found, "test", rows)
    prepared = [s if found.source.size is None else fit(s, found.source.size) for s in stored]
    images = torch.stack([torch.as_tensor(s["image"]) for s in prepared])
    arrays = {"images/test": images.permute(0, 2, 3, 1).numpy()}
    adaptors = getattr(models[student], "adaptors", {})
    for name, colours in pictures.pca_maps(models, adaptors, images.float() / 255, student).items():
        arrays[f"pca/{name}"] = colours
    classes = found.source.index.classes
    examples: list[dict[str, Any]] = [
        {
            "key": targets.keys[row],
            "caption": targets.captions[row][0] if targets.captions and targets.captions[row] else None,
            "label": label_of(targets, row, classes),
            "zeroshot": {},
            "retrieval": {},
            "neighbours": {},
            "boxes": {},
        }
        for row in rows
    ]
    _answers(found, examples, arrays, targets, rows)
    if any(example["boxes"] for example in examples):
        for i, sample in enumerate(stored):
            arrays[f"photos/{i}"] = _small(torch.as_tensor(sample["image"]), SIDE["photos"])
    _neighbours(found, examples, arrays, [student, *teachers])
    pictures.save(out, arrays)
    return examples


def _answers(
    found: Measured,
    examples: list[dict[str, Any]],
    arrays: dict[str, np.ndarray],
    targets: Targets,
    rows: Sequence[int],
) -> None:
    """What probes gave in `Result.show`."""
    for name, by in found.results.items():
        for probe, result in by.items():
            if result.show.get("masks") is not None and targets.masks is not None:
                arrays["masks/truth"] = np.stack([targets.masks[row] for row in rows])
                arrays[f"masks:{probe}/{name}"] = result.show["masks"]
            for kind in ("zeroshot", "retrieval"):
                for i, guess in enumerate(result.show.get(kind) or ()):
                    examples[i][kind][name] = guess
            for i, boxes in enumerate(result.show.get("boxes") or ()):
                examples[i]["boxes"].setdefault(probe, {})[name] = boxes


def _neighbours(
    found: Measured, examples: list[dict[str, Any]], arrays: dict[str, np.ndarray], names: Sequence[str]
) -> None:
    """The train images most similar to each shown one, by cosine of the summary (without one: of the mean cell)."""
    train, rows = found.got.targets["train"], list(found.subjects[0].show)
    near: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        bank, test = found.got.features[name]["train"], found.got.features[name]["test"]
        which = "summary" if test.summary is not None else "mean"
        if which in test.choices:
            queries = FeatureSet(test.summary, test.mean).take(np.array(rows)).vectors(which)
            found_near = list(nearest(queries, bank.vectors(which), min(NEAREST, len(train.keys))))
            near[name] = torch.cat([s for s, _ in found_near]), torch.cat([i for _, i in found_near])
    wanted = sorted({int(row) for _, index in near.values() for row in index.flatten()})
    if not wanted:
        return
    place = {row: i for i, row in enumerate(wanted)}
    samples = fetch(found, "train", wanted, fitted=True)
    arrays["neighbours/train"] = np.stack(
        [_small(torch.as_tensor(sample["image"]), SIDE["neighbours"]) for sample in samples]
    )
    classes = found.source.index.classes
    for name, (similarity, index) in near.items():
        for example, cosines, found_rows in zip(examples, similarity.tolist(), index.tolist(), strict=True):
            example["neighbours"][name] = [
                {
                    "picture": place[row],
                    "key": train.keys[row],
                    "label": label_of(train, row, classes),
                    "cosine": round(cosine, 4),
                }
                for cosine, row in zip(cosines, found_rows, strict=True)
            ]


def fetch(found: Measured, role: str, rows: Sequence[int], *, fitted: bool = False) -> list[dict[str, Any]]:
    """Some samples of a role as they are stored, or as the probes see them, without decoding the whole split."""
    plan, keys = found.plan[role], found.got.targets[role].keys
    split, source = plan["split"], found.source
    total, wanted = source.rows(split), {keys[row] for row in rows}
    parts = [(0, 1)]
    if not plan["unreadable"]:  # then a row's place in the split is known
        places = [n for n in range(total) if in_part(n, plan["rows"])] if plan["rows"] != "all" else range(total)
        count = source.parts(split, STRETCH)
        # the stretch whose first sample, total * k // count, is the last at or before the place
        parts = [(k, count) for k in sorted({((places[row] + 1) * count - 1) // total for row in rows})]
    got = {
        sample["key"]: sample
        for part in parts
        for sample in source.samples(split, part=part, fields=(), raw=not fitted)
        if sample["key"] in wanted
    }
    return [got[keys[row]] for row in rows]


def label_of(targets: Targets, row: int, classes: Sequence[str] | None) -> list[str] | None:
    """The names of an image's classes, or their numbers where they have none; None: it isn't known."""
    if targets.labels is None:
        return None
    label = targets.labels[row]
    numbers = [int(label)] if targets.labels.ndim == 1 else np.flatnonzero(label).tolist()
    return [classes[n] if classes and n < len(classes) else str(n) for n in numbers]


def _small(image: Tensor, most: int) -> np.ndarray:
    """uint8 (3, H, W) -> (h, w, 3), at most so many pixels a side."""
    scale = most / max(image.shape[-2:])
    if scale < 1:
        size = (max(1, round(image.shape[-2] * scale)), max(1, round(image.shape[-1] * scale)))
        image = resize(image[None].float() / 255, size, "bilinear")[0].mul(255).round().byte()
    return image.permute(1, 2, 0).numpy()
