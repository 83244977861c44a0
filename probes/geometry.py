"""What shape a model's features have: how many directions they use, how evenly, and what they know of place."""

from __future__ import annotations

from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.diagnostics import effective_rank
from agglom.features import resize
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.cells import draw_cells, positions, read_cells
from agglom.probes.fingerprint import device_of
from agglom.probes.position import PositionFit, position_errors, r2
from agglom.probes.shift import shift_errors
from agglom.probes.statistics import bootstrap

BATCH = 32  # images shown to the model at a time


class GeometryProbe(Probe):
    """Labels are not needed. Of summaries over the test images, and of a seeded draw of cells of their maps:

    `summary_rankme`, `map_rankme`: effective rank (`diagnostics.effective_rank`), from 1 to the number of dimensions.
    `summary_std`, `map_std`: standard deviation of L2-normalised features, mean over dimensions, times sqrt(D): 0 for
    features that are all the same, 1 for features spread evenly over the sphere (Chen & He 2021, "SimSiam", section
    4.1).
    `shift_error`, `shift_error_half`: error of the map of a shifted image (`shift.shift_errors`), for shifts by one
    cell down and right, and by half a cell: 0 follows the image, about 1.4 has nothing to do with it.
    `position_r2`: R^2 of a ridge regression from a cell's features to where it is in its image (`position`): 0 where
    features don't tell, 1 where they say it outright. Fitted on cells of the train split, tested on test.

    Args:
        cells: how many cells of a split are drawn.
        images: how many test images are shifted.
    """

    name, metric, spatial, sees, bounded = "geometry", "map_rankme", True, "encoder", False

    def __init__(self, *, cells: int = 20_000, images: int = 128) -> None:
        self.cells, self.images = cells, images

    def missing(self, subject: Subject) -> str | None:
        test = subject.features["test"]
        return "it has neither a summary nor a feature map" if test.summary is None and test.spatial is None else None

    def evaluate(self, subject: Subject) -> Result:
        """All of it, as far as the model has a summary and a map."""
        test = subject.features["test"]
        out = Result({}, {"features": "as they are", "references": {}, "intervals": "position and shift"})
        if test.summary is not None:
            _spread(out, "summary", test.vectors("summary"))
        if test.spatial is not None:
            grid = (test.spatial.shape[2], test.spatial.shape[3])
            draw = draw_cells(len(test.spatial), grid, self.cells, subject.seed)
            cells = read_cells(test.spatial, draw)  # (n, m, C)
            _spread(out, "map", cells.flatten(0, 1))
            self._position(out, subject, cells, positions(draw.cells, grid))
            self._shift(out, subject)
        return out

    def _position(self, out: Result, subject: Subject, cells: Tensor, where: Tensor) -> None:
        train = subject.features["train"].spatial
        assert train is not None
        grid = (train.shape[2], train.shape[3])
        if grid == (1, 1) or len(train) < 2:
            out.protocol["position"] = f"none: a map of {grid[0]} x {grid[1]} cells, {len(train)} train images"
            return
        draw = draw_cells(len(train), grid, self.cells, subject.seed)
        fit = PositionFit.of(read_cells(train, draw), positions(draw.cells, grid))
        errors = position_errors(fit, cells, where)
        out.metrics["position_r2"] = float(r2(errors.mean(0)))
        out.resamples["position_r2"] = bootstrap(errors, r2, seed=subject.seed)
        out.protocol["references"]["position_r2"] = {"chance": 0.0, "ceiling": 1.0}
        out.protocol["chosen"] = {"ridge": fit.ridge}
        out.protocol["position"] = f"ridge on {draw.cells.size} train cells, its strength by 5 folds of images"

    def _shift(self, out: Result, subject: Subject) -> None:
        cell = subject.model.input.stride
        found = []
        for images in _batches(subject, self.images):
            grid = subject.model.input.grid((images.shape[-2], images.shape[-1]))
            if min(grid) < 3 or cell < 2:
                out.protocol["shift"] = f"none: a map of {grid[0]} x {grid[1]} cells of {cell} pixels"
                return
            shifts = [(cell, 0), (0, cell), (cell // 2, 0), (0, cell // 2)]
            found.append(shift_errors(subject.model, images, shifts).view(2, 2, -1).mean(1))
        errors = torch.cat(found, 1).double().cpu().numpy()  # (2, images)
        errors = errors[:, np.isfinite(errors).all(0)]  # a map that is the same in all cells has no error to speak of
        out.protocol["shift"] = "one cell, and half a cell, down and right, at the model's own resolution"
        out.protocol["shift_images"] = errors.shape[1]
        for name, some in zip(("shift_error", "shift_error_half"), errors, strict=True):
            if len(some):
                out.metrics[name] = float(some.mean())
                out.resamples[name] = bootstrap(some, lambda means: means[:, 0], seed=subject.seed)
                out.protocol["references"][name] = {"floor": 0.0, "chance": 2**0.5}


def _spread(out: Result, kind: str, x: Tensor) -> None:
    """Put in RankMe and standard deviation of features x (N, D)."""
    count, dim = x.shape
    out.metrics[f"{kind}_rankme"] = rank_me(x)
    out.metrics[f"{kind}_std"] = float(F.normalize(x, dim=1).std(0, correction=0).mean()) * dim**0.5
    out.protocol["references"][f"{kind}_rankme"] = {"floor": 1.0, "ceiling": float(min(dim, count))}
    out.protocol["references"][f"{kind}_std"] = {"floor": 0.0, "even": 1.0}
    out.protocol[f"{kind}_vectors"] = count


def rank_me(rows: Tensor, *, chunk: int = 8192) -> float:
    """(N, D) -> RankMe, see `diagnostics.effective_rank`."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(chunk):
        gram += part.double().T @ part.double()
    return effective_rank(gram)


def _batches(subject: Subject, images: int) -> Iterator[Tensor]:
    """Evenly spaced test images (b, 3, H, W) in [0, 1], already in the model's own size, so that a cell is a stride."""
    rows = set(np.linspace(0, len(subject.targets["test"].keys) - 1, images).round().astype(int).tolist())
    batch, last = list[Tensor](), max(rows)
    spec, device = subject.model.input, device_of(subject.model)

    def ready(some: list[Tensor]) -> Tensor:
        pixels = torch.stack(some).to(device).float().div_(255)
        return pixels if spec.size is None else resize(pixels, spec.size, spec.interpolation)

    for number, sample in enumerate(subject.samples("test")):
        if number in rows:
            batch.append(torch.as_tensor(sample["image"]))
        if len(batch) == BATCH:
            yield ready(batch)
            batch = []
        if number == last:
            break
    if batch:
        yield ready(batch)
