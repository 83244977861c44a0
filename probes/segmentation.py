"""Linear segmentation of frozen feature maps: batch norm, 1x1 convolution, bilinear up to the mask.

Interpolation is linear, so a head on the small map followed by bilinear upsampling of its logits is, at every pixel,
the same head on the bilinearly upsampled features. The frozen batch norm (statistics of the train split, its affine
part absorbed by the convolution) makes the training problem a softmax regression over pixels, solved to its optimum on
a fixed random draw of labelled pixels from every training image; there is no learning rate to choose.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.solver import Head, Standardise, fit_logistic
from agglom.probes.statistics import bootstrap

IGNORE = 255


class SegmentationProbe(Probe):
    """mIoU, pixel accuracy (aacc) and mean class accuracy (macc) at the mask's resolution.

    Args:
        l2: candidate strengths of L2 on the convolution, chosen by mIoU on val.
        pixels: how many training pixels are drawn in all, the same number from every image.
    """

    name, metric, fields, spatial, sees = "segmentation", "miou", ("seg",), True, "both"

    def __init__(self, *, l2: Sequence[float] = (0.01, 0.001, 0.0001, 0.00001), pixels: int = 50_000) -> None:
        self.l2, self.pixels = tuple(l2), pixels

    def missing(self, subject: Subject) -> str | None:
        no_map = "it has no feature map" if subject.features["train"].spatial is None else None
        return mask_problem(subject) or no_map

    def evaluate(self, subject: Subject) -> Result:
        """Scores on test, with the L2 that was best on val."""
        classes = mask_classes(subject)
        x, y, drawn = draw_pixels(subject.features["train"], subject.targets["train"], self.pixels, subject.seed)
        scale = Standardise.of(x)
        heads = fit_logistic(scale(x), y, classes=classes, l2=self.l2, steps=40, tolerance=1e-4)
        heads = [scale.fold(head) for head in heads]
        on_val = [scores(areas(head, subject, "val", classes).sum(0))["miou"] for head in heads]
        best = int(np.nanargmax(on_val))
        pictures: dict[int, np.ndarray] = dict.fromkeys(subject.show)  # type: ignore[assignment]  # filled by areas
        counted = areas(heads[best], subject, "test", classes, keep=pictures)
        return Result(
            metrics=scores(counted.sum(0)),
            protocol={
                "features": "feature map, batch norm with train statistics, 1x1 convolution, bilinear logits",
                "chosen": {"l2": self.l2[best]},
                "grid": {"l2": list(self.l2)},
                "val_miou": {f"{l2:g}": miou for l2, miou in zip(self.l2, on_val, strict=True)},
                "at_edge": self.l2[best] in (min(self.l2), max(self.l2)),
                "grid_size": list(subject.features["test"].spatial.shape[2:]),  # type: ignore[union-attr]
                "mask_size": list(subject.targets["test"].masks.shape[1:]),  # type: ignore[union-attr]
                "solver": f"L-BFGS, mean cross-entropy over {len(y)} random pixels, {drawn} of each train image",
                "ignore": IGNORE,
                "classes": classes,
                "chance": constant_miou(counted.sum(0)),
            },
            resamples={
                "miou": bootstrap(
                    counted.reshape(len(counted), -1),
                    lambda means: np.array([scores(m.reshape(3, classes))["miou"] for m in means]),
                    seed=subject.seed,
                )
            },
            show={"masks": np.stack([pictures[row] for row in subject.show]) if subject.show else None},
        )


def mask_problem(subject: Subject) -> str | None:
    """Why nothing can be segmented, or None."""
    for role, targets in subject.targets.items():
        if targets.masks is None:
            return f"the {role} split has no .seg.png"
    if subject.features["train"].mean is None:
        return "it has no feature map"
    masks = subject.targets["train"].masks
    assert masks is not None
    if len(np.setdiff1d(np.unique(masks), [IGNORE])) < 2:
        return "the train split's masks have a single class"
    return None


def draw_pixels(features: FeatureSet, targets: Targets, pixels: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Random labelled pixels of every image with their bilinearly upsampled features.

    Returns:
        x (P, C) float32, y (P,) int64 without ignored pixels, and how many were drawn an image.
    """
    assert features.spatial is not None and targets.masks is not None
    count, height, width = targets.masks.shape
    each = max(1, min(height * width, pixels // count))
    rng = np.random.default_rng(seed)
    xs, ys = [], []
    for start in range(0, count, 256):
        maps = torch.from_numpy(np.array(features.spatial[start : start + 256])).float()  # (n, C, h, w)
        masks = np.array(targets.masks[start : start + 256]).reshape(len(maps), -1)
        at = np.stack([rng.choice(height * width, each, replace=False) for _ in range(len(maps))])  # (n, each)
        rows, columns = torch.from_numpy(at // width), torch.from_numpy(at % width)
        # pixel centres on grid_sample's [-1, 1] scale; with border padding this is F.interpolate's bilinear
        where = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)[:, None]
        picked = F.grid_sample(maps, where, mode="bilinear", padding_mode="border", align_corners=False)
        labels = np.take_along_axis(masks, at, 1).reshape(-1)
        valid = labels != IGNORE
        xs.append(picked[:, :, 0].transpose(1, 2).reshape(-1, maps.shape[1])[torch.from_numpy(valid)])
        ys.append(torch.from_numpy(labels[valid].astype(np.int64)))
    return torch.cat(xs), torch.cat(ys), each


def predict(head: Head, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature maps (n, C, h, w) -> classes (n, H, W) at `size`: the class of the largest upsampled logit."""
    # channels last: interpolation and argmax over a handful of classes are ten times faster that way on a CPU
    logits = head(maps.permute(0, 2, 3, 1)).contiguous().permute(0, 3, 1, 2)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)


def areas(
    head: Head, subject: Subject, role: str, classes: int, *, keep: dict[int, np.ndarray] | None = None
) -> np.ndarray:
    """(N, 3, K) pixel counts an image: intersection, prediction and truth of each class, ignored pixels left out.

    Args:
        keep: rows whose predicted masks are wanted; they are put in.
    """
    features, targets = subject.features[role], subject.targets[role]
    assert features.spatial is not None and targets.masks is not None
    found = []
    for start in range(0, len(targets.masks), 128):
        truth = np.array(targets.masks[start : start + 128])
        maps = torch.from_numpy(np.array(features.spatial[start : start + 128])).float()
        predicted = predict(head, maps, truth.shape[1:]).numpy()
        for row in keep or ():
            if start <= row < start + len(truth):
                keep[row] = predicted[row - start].astype(np.uint8)  # type: ignore[index]
        found.append(count_areas(predicted, truth, classes))
    return np.concatenate(found)


def count_areas(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Masks (n, H, W) -> (n, 3, K) int64: pixels of intersection, prediction and truth, where truth isn't ignored."""
    images = len(truth)
    valid = truth != IGNORE
    offset = np.broadcast_to(np.arange(images).reshape(-1, 1, 1) * classes, truth.shape)

    def count(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount((values + offset)[where], minlength=images * classes).reshape(images, classes)

    wide = truth.astype(np.int64)
    return np.stack([count(wide, valid & (predicted == truth)), count(predicted, valid), count(wide, valid)], 1)


def scores(counted: np.ndarray) -> dict[str, float]:
    """(3, K) summed areas -> mIoU over the classes that are in truth or prediction, aacc, macc over those in truth.

    The definitions of mmsegmentation's IoUMetric, as fractions.
    """
    inter, predicted, truth = counted.astype(np.float64)
    union = predicted + truth - inter
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = np.where(union > 0, inter / union, np.nan)
        recall = np.where(truth > 0, inter / truth, np.nan)
    if not (union > 0).any():
        return {"miou": float("nan"), "aacc": float("nan"), "macc": float("nan")}
    return {
        "miou": float(np.nanmean(iou)),
        "aacc": float(inter.sum() / truth.sum()),
        "macc": float(np.nanmean(recall)),
    }


def constant_miou(counted: np.ndarray) -> float:
    """mIoU of answering the most frequent class at every pixel."""
    truth = counted[2].astype(np.float64)
    return float(truth.max() / truth.sum() / (truth > 0).sum())


def mask_classes(subject: Subject) -> int:
    """K: the named values of the masks, or one more than the largest that occurs.

    Raises:
        UserError: a value without a name.
    """
    largest = -1
    for role, targets in subject.targets.items():
        assert targets.masks is not None
        masks = np.asarray(targets.masks)
        top = int(np.where(masks == IGNORE, 0, masks).max())
        if subject.seg_classes and top >= len(subject.seg_classes):
            row = int((np.where(masks == IGNORE, 0, masks) == top).any((1, 2)).argmax())
            raise UserError(
                f"{role} sample {targets.keys[row]}: mask value {top}; "
                f"valid: 0 to {len(subject.seg_classes) - 1} and 255"
            )
        largest = max(largest, top)
    return max(len(subject.seg_classes or ()), largest + 1)
