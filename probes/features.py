"""What the probes know of N images: features of one model, targets that all models share."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from agglom.probes.store import select


@dataclass(frozen=True)
class FeatureSet:
    """A model's features over N images. Arrays may be memory-mapped: read stretches of them, and never write.

    Attributes:
        summary: (N, D) float32, or None.
        mean: (N, C) float32, the mean over the feature map's cells, or None.
        spatial: (N, C, H, W) float16, or None where there is none or it wasn't asked for.
        block_summaries: (N, n, D') float32, the summaries of the last n blocks of a ViT, first to last; else None.
        block_means: (N, n, C') float32, the means of these blocks' maps; else None.
    """

    summary: np.ndarray | None = None
    mean: np.ndarray | None = None
    spatial: np.ndarray | None = None
    block_summaries: np.ndarray | None = None
    block_means: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> FeatureSet:
        """The same for some of the images; what is mapped and large stays on disk (see `select`)."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return FeatureSet(*(None if a is None else select(a, rows) for a in arrays))

    def vectors(self, which: str, *, copy: bool = False) -> Tensor:
        """(N, D) float32 of "summary", "mean" or "both" (side by side); a view where possible, unless `copy`."""
        parts = {"summary": [self.summary], "mean": [self.mean], "both": [self.summary, self.mean]}[which]
        if len(parts) == 1 and not copy:
            return torch.from_numpy(np.asarray(parts[0], np.float32))
        return torch.from_numpy(np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1))

    @property
    def choices(self) -> tuple[str, ...]:
        """What `vectors` can give."""
        names = [n for n, a in (("summary", self.summary), ("mean", self.mean)) if a is not None]
        return (*names, "both") if len(names) == 2 else tuple(names)


@dataclass(frozen=True)
class Targets:
    """What is known of N images, the same for every model.

    Attributes:
        keys: N sample keys.
        labels: (N,) int64 one class an image, or (N, K) bool which classes it has, or None.
        masks: (N, h, w) uint8, 255 = ignore, or None.
        captions: N tuples of captions, or None.
    """

    keys: list[str]
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None
    captions: list[tuple[str, ...]] | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.labels is not None and self.labels.ndim == 2

    def take(self, rows: np.ndarray) -> Targets:
        """The same for some of the images."""
        return Targets(
            [self.keys[i] for i in rows],
            None if self.labels is None else self.labels[rows],
            None if self.masks is None else select(self.masks, rows),
            None if self.captions is None else [self.captions[i] for i in rows],
        )
