"""Average precision of detections as COCO defines it, and over resamples of the images.

A detection is true at an IoU threshold if an object of its class that no better scored one has taken overlaps it by at
least that much; of several the most overlapping one. Crowds are neither found nor missed: a detection that only they
explain counts nowhere, and their overlap is measured against the detection's own area.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Sequence

import numpy as np

METRICS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections an image and class that count


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (n, 4) float64 x, y, width, height in pixels.
        labels: (n,) int64.
        crowd: (n,) bool.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


class Found(NamedTuple):
    """The detections of an image.

    Attributes:
        boxes: (n, 4) float64 x, y, width, height in pixels.
        labels: (n,) int64.
        scores: (n,) float64.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def coco_metrics(truth: Sequence[Truth], found: Sequence[Found]) -> dict[str, float]:
    """The twelve numbers of COCO's summary by faster-coco-eval.

    An object's size is the area of its box; small ones have less than 32 x 32 pixels, large ones more than 96 x 96.

    Args:
        truth, found: of each image.

    Returns:
        `METRICS` -> fraction in [0, 1], or NaN where no object of that size exists.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    labels = np.concatenate([image.labels for images in (truth, found) for image in images])
    objects = [
        {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "area": float(box[2] * box[3]),
         "iscrowd": int(crowd)}
        for i, image in enumerate(truth, 1) for box, label, crowd in zip(*image, strict=True)
    ]  # fmt: skip
    detections = [
        {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "score": float(score),
         "area": float(box[2] * box[3])}
        for i, image in enumerate(found, 1) for box, label, score in zip(*image, strict=True)
    ]  # fmt: skip
    if not any(not entry["iscrowd"] for entry in objects):
        return dict.fromkeys(METRICS, float("nan"))
    images = [{"id": i} for i in range(1, len(truth) + 1)]
    categories = [{"id": label, "name": str(label)} for label in np.unique(labels).tolist()]

    def dataset(entries: list[dict[str, object]]) -> COCO:
        numbered = [{"id": n, **entry} for n, entry in enumerate(entries, 1)]
        return COCO({"images": images, "annotations": numbered, "categories": categories})

    evaluation = COCOeval_faster(
        dataset(objects), dataset(detections), "bbox", print_function=logging.getLogger(__name__).debug
    )
    evaluation.run()
    values = [float(x) for x in evaluation.stats[: len(METRICS)]]
    return {name: value if value >= 0 else float("nan") for name, value in zip(METRICS, values, strict=True)}


def resampled_ap(truth: Sequence[Truth], found: Sequence[Found], counts: np.ndarray) -> np.ndarray:
    """AP as if each image were there several times or not at all.

    Matching happens inside images, so it is done once; a resample only weights what was matched.

    Args:
        truth, found: of N images.
        counts: (R, N) how often each image is there.

    Returns:
        (R, 2) float64: AP over all thresholds, and at 0.5. NaN where a resample has no object.
    """
    counts = np.asarray(counts, np.float64)
    labels = sorted({int(x) for image in truth for x in image.labels[~image.crowd]})
    total, number = np.zeros((len(counts), 2)), np.zeros(len(counts))
    for label in labels:
        objects = np.array([(image.labels[~image.crowd] == label).sum() for image in truth], np.float64)
        scores, images, states = [], [], []
        for i, (objects_of, detections) in enumerate(zip(truth, found, strict=True)):
            mine = np.flatnonzero(detections.labels == label)
            if not len(mine):
                continue
            mine = mine[np.argsort(-detections.scores[mine], kind="stable")][:MOST]
            theirs = objects_of.labels == label
            states.append(match(detections.boxes[mine], objects_of.boxes[theirs], objects_of.crowd[theirs]))
            scores.append(detections.scores[mine])
            images.append(np.full(len(mine), i))
        if scores:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            image, state = np.concatenate(images)[order], np.concatenate(states, 1)[:, order]
        for r, weights in enumerate(counts):
            wanted = weights @ objects
            if wanted:
                number[r] += 1
                if scores:
                    total[r] += _precision(state, weights[image], wanted)
    with np.errstate(invalid="ignore"):
        return total / number[:, None]


def match(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Which detections of one image and class are true.

    Args:
        boxes: (n, 4) detections, best first.
        objects: (m, 4).
        crowd: (m,) bool.

    Returns:
        (10, n) int8 at each of `THRESHOLDS`: 1 true, 0 false, -1 counts nowhere.
    """
    out = np.zeros((len(THRESHOLDS), len(boxes)), np.int8)
    if not len(objects):
        return out
    overlap = iou(boxes, objects, crowd)
    taken = np.zeros((len(THRESHOLDS), len(objects)), bool)
    rows = np.arange(len(THRESHOLDS))
    for n, values in enumerate(overlap):
        free = np.where(taken | crowd, -1.0, values)
        best = len(objects) - 1 - free[:, ::-1].argmax(1)  # of equals the last, as COCO has it
        true = free[rows, best] >= THRESHOLDS
        taken[rows[true], best[true]] = True
        out[:, n] = np.where(true, 1, -(np.where(crowd, values, -1.0).max() >= THRESHOLDS).astype(np.int8))
    return out


def iou(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(n, 4) and (m, 4) boxes x, y, width, height -> (n, m) intersection over union; for crowds, over the first."""
    corner = np.maximum(boxes[:, None, :2], objects[None, :, :2])
    end = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (objects[:, :2] + objects[:, 2:])[None])
    common = (end - corner).clip(0).prod(2)
    own = boxes[:, 2:].prod(1)[:, None]
    return common / np.where(crowd, own, own + objects[:, 2:].prod(1) - common)


def _precision(state: np.ndarray, weights: np.ndarray, wanted: float) -> np.ndarray:
    """(2,) mean precision over recalls, for all thresholds and for 0.5.

    Args:
        state: (10, n) of detections, best first; see `match`.
        weights: (n,) how often each is there.
        wanted: how many objects there are.
    """
    true, false = ((state == 1) * weights).cumsum(1), ((state == 0) * weights).cumsum(1)
    precision = true / np.maximum(true + false, 1e-12)
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # the best at this recall or beyond
    recall = true / wanted
    at = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], 1)
    means = np.take_along_axis(padded, at, 1).mean(1)
    return np.array([means.mean(), means[0]])
