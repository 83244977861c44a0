"""What a cell's features say of its place: ridge regression to (y, x), its strength chosen by folds of whole images."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.probes.ridge import ridge_path
from agglom.probes.solver import Standardise

RIDGES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
FOLDS = 5


class PositionFit(NamedTuple):
    """A linear map from features to positions.

    Attributes:
        scale: of the training features, the same for all channels: a channel that hardly ever speaks is not made loud,
            or the one test cell in which it does would decide.
        weight: (D, 2) float64, for features so scaled.
        mean: (2,) the training cells' mean position.
        ridge: the strength that was chosen.
    """

    scale: Standardise
    weight: Tensor
    mean: Tensor
    ridge: float

    @classmethod
    def of(cls, x: Tensor, where: Tensor, ridges: Sequence[float] = RIDGES) -> PositionFit:
        """Minimise the mean of ||W'x - y||^2 plus ridge ||W||^2, features centred and of mean variance 1.

        Args:
            x: (n, m, D) features of m cells of n images, n > 1.
            where: (n, m, 2) their positions.
            ridges: candidates, strongest first; images are dealt into 5 folds and the best mean error wins.
        """
        scale, mean = _one_scale(Standardise.of(x.flatten(0, 1))), where.flatten(0, 1).double().mean(0)
        count = min(FOLDS, len(x))
        grams, moments = [], []
        for fold in range(count):
            a = scale(x[fold::count].flatten(0, 1)).double()
            grams.append(a.T @ a)
            moments.append(a.T @ (where[fold::count].flatten(0, 1).double() - mean))
        gram, moment = torch.stack(grams).sum(0), torch.stack(moments).sum(0)
        cells = [len(x[fold::count]) * x.shape[1] for fold in range(count)]
        errors = torch.zeros(len(ridges), dtype=torch.float64)
        for fold in range(count):
            tried = ridge_path(gram - grams[fold], moment - moments[fold], sum(cells) - cells[fold], ridges)
            for i, weight in enumerate(tried):  # ||A W - Y||^2 without the part that all share
                errors[i] += (weight * (grams[fold] @ weight)).sum() - 2 * (weight * moments[fold]).sum()
        best = int(errors.argmin())
        weight = ridge_path(gram, moment, sum(cells), [ridges[best]])[0]
        return cls(scale, weight, mean, ridges[best])

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> positions (..., 2) float64."""
        return self.scale(x).double() @ self.weight + self.mean


def _one_scale(each: Standardise) -> Standardise:
    """The root mean square of the channels' deviations for all of them; constant channels stay 0."""
    varies = each.std.isfinite()
    common = each.std[varies].square().mean().sqrt()
    return Standardise(each.mean, torch.where(varies, common, torch.inf))


def position_errors(fit: PositionFit, x: Tensor, where: Tensor) -> np.ndarray:
    """Per image: mean squared error of the prediction, and mean squared distance from the mean position of training.

    Args:
        fit: the regression.
        x: (n, m, D).
        where: (n, m, 2).

    Returns:
        (n, 2) float64.
    """
    wrong = (fit(x) - where).square().sum(-1).mean(1)
    spread = (where.double() - fit.mean).square().sum(-1).mean(1)
    return torch.stack([wrong, spread], 1).numpy()


def r2(means: np.ndarray) -> np.ndarray:
    """(..., 2) means of `position_errors` -> (...) 1 - error / spread: 0 for saying the middle, 1 for no error."""
    return 1 - means[..., 0] / means[..., 1]
