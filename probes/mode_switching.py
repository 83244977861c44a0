"""Whether a student stays the same model at another resolution, seen through its adaptors.

A student trained with each teacher at a resolution of its own may learn to be one model at one size and another at the
next: "mode switching" (Heinrich et al. 2024, "RADIOv2.5", 2412.07679, section 3). It shows when the same images are
given at several sizes r and the features p_r through an adaptor are held against one target, the teacher's features t
at the teacher's own size:

    error(r) = sum ||align(p_r) - t||^2 / sum ||t - mean t||^2     over images and cells of the teacher's grid.

The paper plots the plain mean square error; divided by the variance of t it can be compared between teachers, and 1 is
the teacher's mean. A coarser grid than the teacher's costs some error of its own, by interpolation.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.features import Backbone, align, resize
from agglom.probes.base import Subject
from agglom.probes.features import FeatureSet
from agglom.probes.fingerprint import device_of
from agglom.probes.similarity import agreement, relative_error
from agglom.probes.source import fit

Series = dict[str, list[tuple[float, float]]]
PIXELS = 2**21  # in one forward pass: 41 images of 224 x 224


def mode_switching(
    subject: Subject, teacher: FeatureSet, scales: Sequence[float], images: int
) -> tuple[Series, dict[str, Any] | str]:
    """The curve of a student through an adaptor.

    Args:
        subject: the student through the adaptor; its model is run again.
        teacher: the teacher's test features.
        scales: of the sizes, relative to that of the probes; each is rounded to whole multiples of the stride.
        images: how many of the test images, evenly spaced.

    Returns:
        series: "mode_switching" -> (pixels of the short side, relative error of the map), and
        "mode_switching_summary" -> (pixels, 1 - mean cosine of the summary); and what defines them, or why there are
        none.
    """
    if subject.model.input.size is not None:
        return {}, f"no curve: the model takes {' x '.join(map(str, subject.model.input.size))} pixels only"
    if not scales or subject.source is None:
        return {}, "no curve: no resolutions or no images to show"
    rows = np.unique(np.linspace(0, len(subject.targets["test"].keys) - 1, images).round().astype(np.int64))
    pictures = _pictures(subject, rows, scales)
    target = teacher.take(rows)
    series: Series = {}
    for size, shown in pictures.items():
        for name, value in _compare(subject.model, shown, target, teacher).items():
            series.setdefault(name, []).append((float(min(size)), value))
    sizes = [list(size) for size in pictures]
    return series, {"sizes": sizes, "images": len(rows), "target": "the teacher's features at its own size"}


def _pictures(subject: Subject, rows: np.ndarray, scales: Sequence[float]) -> dict[tuple[int, int], Tensor]:
    """Size -> (n, 3, *size) uint8, small to large, made from the stored images and not from those already resized."""
    assert subject.source is not None
    stride, probed = subject.model.input.stride, subject.source.size
    out: dict[tuple[int, int], list[Tensor]] = {}
    wanted = set(rows.tolist())
    for number, sample in enumerate(subject.samples("test", raw=True)):
        if number not in wanted:
            continue
        image = torch.as_tensor(sample["image"])
        height, width = (probed, probed) if probed is not None else image.shape[-2:]
        sizes = {(_whole(height * scale, stride), _whole(width * scale, stride)) for scale in scales}
        for size in sorted(sizes):
            if probed is not None:
                shown = fit({"image": image}, size[0])["image"]
            else:
                shown = (resize(image[None].float() / 255, size, "bicubic")[0] * 255).round().to(torch.uint8)
            out.setdefault(size, []).append(shown)
        if number == rows[-1]:
            break
    return {size: torch.stack(shown) for size, shown in out.items()}


def _whole(side: float, stride: int) -> int:
    """The nearest multiple of the stride, at least one."""
    return max(1, round(side / stride)) * stride


@torch.inference_mode()
def _compare(model: Backbone, images: Tensor, target: FeatureSet, teacher: FeatureSet) -> dict[str, float]:
    """Relative error of the map and 1 - cosine of the summary, as far as both have them."""
    batch = max(1, PIXELS // (images.shape[-2] * images.shape[-1]))
    maps, summaries = [], []
    for start in range(0, len(images), batch):
        found = model(images[start : start + batch].to(device_of(model)).float().div_(255))
        rows = slice(start, start + batch)
        if found.spatial is not None and target.spatial is not None and teacher.mean is not None:
            t = torch.from_numpy(target.spatial[rows]).float()
            p = align(found.spatial.float().cpu(), (t.shape[2], t.shape[3]))
            centre = torch.from_numpy(teacher.mean.mean(0))
            maps.append(agreement(p.flatten(2).transpose(1, 2), t.flatten(2).transpose(1, 2), centre))
        if found.summary is not None and target.summary is not None:
            p, t = found.summary.float().cpu(), torch.from_numpy(target.summary[rows]).float()
            summaries.append(F.cosine_similarity(p, t, dim=1).double())
    out = {}
    if maps:
        out["mode_switching"] = float(relative_error(np.concatenate(maps).mean(0)))
    if summaries:
        out["mode_switching_summary"] = 1 - float(torch.cat(summaries).mean())
    return out
