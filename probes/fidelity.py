"""How well an adaptor reproduces its teacher on images that neither training nor choice has seen."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.features import align
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.cells import CHUNK, draw_cells, take_cells
from agglom.probes.features import FeatureSet
from agglom.probes.mode_switching import mode_switching
from agglom.probes.similarity import COSINE, agreement, linear_cka, relative_error
from agglom.probes.statistics import bootstrap


class FidelityProbe(Probe):
    """Features through an adaptor (p) against the teacher's own (t) on the test images.

    `summary_cosine`, `map_cosine`: mean cosine of p and t, over images, and over all cells of all images.
    `summary_mse`, `map_mse`: sum ||p - t||^2 / sum ||t - mean t||^2, that is 1 - R^2: 0 is the teacher, 1 the
    teacher's mean for every image.
    `summary_cka`, `map_cka`: linear CKA (`similarity.linear_cka`), over images, and over a seeded draw of cells.

    Maps meet on the teacher's grid (`features.align`). Cosine and error have intervals; CKA has none, since a resample
    that repeats images raises it. How all this depends on the resolution is told by `mode_switching`.

    Args:
        cells: how many cells CKA looks at.
        scales: resolutions of the mode-switching curve, relative to the size at which images are probed; none: no
            curve.
        images: how many test images that curve looks at.
    """

    name, metric, spatial, bounded = "fidelity", "map_cosine", True, False
    sees = "adaptor"

    def __init__(
        self, *, cells: int = 10_000, scales: Sequence[float] = (0.5, 0.75, 1.0, 1.5, 2.0), images: int = 128
    ) -> None:
        self.cells, self.scales, self.images = cells, tuple(scales), images

    def missing(self, subject: Subject) -> str | None:
        assert subject.adaptor is not None
        if subject.adaptor not in subject.peers:
            return f"its teacher {subject.adaptor} is not among the models"
        if not _kinds(subject.features["test"], subject.peers[subject.adaptor]["test"]):
            return f"it has neither a summary nor a feature map in common with {subject.adaptor}"
        return None

    def evaluate(self, subject: Subject) -> Result:
        """Nothing is fitted; train and val are not looked at."""
        assert subject.adaptor is not None
        ours, theirs = subject.features["test"], subject.peers[subject.adaptor]["test"]
        metrics: dict[str, float] = {}
        shuffled: dict[str, float] = {}
        resamples: dict[str, np.ndarray] = {}
        for kind in _kinds(ours, theirs):
            if kind == "summary":
                p, t = ours.vectors("summary"), theirs.vectors("summary")
                images = agreement(p[:, None], t[:, None], t.mean(0))
            else:
                images, p, t = _maps(ours, theirs, self.cells, subject.seed)
            means = images.mean(0)
            metrics |= {f"{kind}_cosine": float(means[COSINE]), f"{kind}_mse": float(relative_error(means))}
            metrics[f"{kind}_cka"] = linear_cka(p, t)
            resamples[f"{kind}_cosine"] = bootstrap(images, lambda m: m[:, COSINE], seed=subject.seed)
            resamples[f"{kind}_mse"] = bootstrap(images, relative_error, seed=subject.seed)
            order = torch.randperm(len(p), generator=torch.Generator().manual_seed(subject.seed))
            shuffled[f"{kind}_cosine"] = float(F.cosine_similarity(p[order], t, dim=1).mean())
            shuffled[f"{kind}_mse"] = 1.0
            shuffled[f"{kind}_cka"] = linear_cka(p[order], t)
        protocol: dict[str, Any] = {
            "features": f"through the adaptor for {subject.adaptor}, against {subject.adaptor}'s own",
            "definitions": "mse: sum |p - t|^2 / sum |t - mean t|^2; cka: linear; maps on the teacher's grid",
            "references": shuffled,
            "reference": "features of other images drawn at random; for mse the teacher's mean",
            "intervals": "cosine and mse; cka has none, because repeated images raise it",
        }
        if "map_cosine" in metrics:
            assert ours.spatial is not None and theirs.spatial is not None
            protocol["chance"] = shuffled["map_cosine"]
            protocol["grids"] = {"adaptor": list(ours.spatial.shape[2:]), "teacher": list(theirs.spatial.shape[2:])}
            protocol["cka_cells"] = len(p)
        series, said = mode_switching(subject, theirs, self.scales, self.images)
        return Result(metrics, protocol | {"mode_switching": said}, resamples, series=series)


def _kinds(ours: FeatureSet, theirs: FeatureSet) -> list[str]:
    """What both have: "summary", "map"."""
    names = {"summary": "summary", "map": "spatial"}
    return [k for k, name in names.items() if getattr(ours, name) is not None and getattr(theirs, name) is not None]


def _maps(ours: FeatureSet, theirs: FeatureSet, cells: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """`agreement` of all images (N, 3), and drawn cells of both (P, C), on the teacher's grid."""
    assert ours.spatial is not None and theirs.spatial is not None and theirs.mean is not None
    count, (height, width) = len(theirs.spatial), theirs.spatial.shape[2:]
    draw = draw_cells(count, (height, width), cells, seed)
    centre = torch.from_numpy(theirs.mean.mean(0, dtype=np.float64)).float()
    found = []
    p: list[Tensor] = []
    t: list[Tensor] = []
    for start in range(0, count, CHUNK):
        target = torch.from_numpy(np.array(theirs.spatial[start : start + CHUNK])).float()
        mine = align(torch.from_numpy(np.array(ours.spatial[start : start + CHUNK])).float(), (height, width))
        found.append(agreement(mine.flatten(2).transpose(1, 2), target.flatten(2).transpose(1, 2), centre))
        here = np.flatnonzero((draw.rows >= start) & (draw.rows < start + CHUNK))
        for maps, kept in ((mine, p), (target, t)):
            kept.append(take_cells(maps[torch.from_numpy(draw.rows[here] - start)], draw.cells[here]).flatten(0, 1))
    return np.concatenate(found), torch.cat(p), torch.cat(t)
