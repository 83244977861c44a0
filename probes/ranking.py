"""Average precision of classes that images are ranked by: what several classes an image are scored with.

AP = sum_n (R_n - R_{n-1}) P_n over the distinct scores from high to low, P_n and R_n precision and recall of the images
at or above the n-th, without interpolation; the definition of scikit-learn's `average_precision_score`.
"""

from __future__ import annotations

import numpy as np

from agglom.probes.statistics import RESAMPLES, draws

BLOCK = 2**23  # numbers in the largest temporary: 64 MiB


def average_precision(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """AP of every class.

    Args:
        scores: (N, K), the larger the likelier.
        truth: (N, K) bool.
        counts: (R, N) how often each image counts, for resamples; None: once.

    Returns:
        (R, K) float64, or (K,) without `counts`; NaN where a class has no positive.
    """
    weights = np.ones((1, len(scores))) if counts is None else counts
    step = max(1, BLOCK // max(1, len(scores)))
    out = np.empty((len(weights), scores.shape[1]))
    for k, (column, positive) in enumerate(zip(scores.T, truth.T, strict=True)):
        order = np.argsort(-column, kind="stable")
        ranked = column[order]
        # images of one score come at once: each is judged by the last of them
        last = np.searchsorted(-ranked, -ranked, side="right") - 1
        hits = np.flatnonzero(positive[order])
        for start in range(0, len(weights), step):
            seen = weights[start : start + step, order]
            own = seen[:, hits]
            found = np.concatenate([np.zeros((len(own), 1)), own.cumsum(1)], 1)  # positives before each
            below = found[:, np.searchsorted(hits, last[hits], side="right")]
            above = seen.cumsum(1)[:, last[hits]]
            with np.errstate(divide="ignore", invalid="ignore"):
                precision = np.where(above > 0, below / above, 0)
                out[start : start + step, k] = (own * precision).sum(1) / own.sum(1)
    return out if counts is not None else out[0]


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """mAP: the mean of the AP over the classes that have positives; NaN where none has."""
    return float(_mean(average_precision(scores, truth)))


def map_resamples(scores: np.ndarray, truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N, K) scores and truth -> (R,) mAP over resamples of the images, the same ones as `bootstrap` draws."""
    images = len(scores)
    block = max(1, BLOCK // max(1, images))
    starts = range(0, RESAMPLES, block)
    counts = (draws(images, min(block, RESAMPLES - start), seed, start) for start in starts)
    return np.concatenate([_mean(average_precision(scores, truth, some)) for some in counts])


def _mean(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)
