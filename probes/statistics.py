"""Bootstrap over test images, paired across models."""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import numpy as np

RESAMPLES = 1000


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of per-image sums over resamples of the images.

    Args:
        values: (N, S) S additive numbers an image: correct or not, or pixel counts.
        statistic: (R, S) means over the images of each resample -> (R,).
        seed: the same seed and N give the same resamples, so two models' values are paired.
        resamples: R.

    Returns:
        (R,) float64.
    """
    images = len(values)
    values = np.asarray(values, np.float64).reshape(images, -1)
    block = max(1, 2**23 // max(1, images))  # counts of a block stay under 64 MiB
    return np.concatenate(
        [
            statistic(draws(images, min(block, resamples - start), seed, start) @ values / images)
            for start in range(0, resamples, block)
        ]
    )


@lru_cache(maxsize=1)  # every probe and model of a report asks for the same resamples
def draws(images: int, resamples: int, seed: int, start: int) -> np.ndarray:
    """(resamples, images) how often each image was drawn."""
    rng = np.random.default_rng([seed, start])
    return np.stack(
        [np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(resamples)]
    ).astype(np.float64)


def accuracy_resamples(correct: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) correct or not -> (R,) resampled accuracies."""
    return bootstrap(correct, lambda means: means[:, 0], seed=seed)


def interval(resamples: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval, or None where no resample gave a finite value."""
    finite = resamples[np.isfinite(resamples)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
