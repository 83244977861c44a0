"""Normalisers that rest on the whole covariance: PHI-S and whitening."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from agglom.errors import UserError
from agglom.targets.base import Normalizer
from agglom.targets.hadamard import hadamard
from agglom.targets.moments import Moments, merge


class CovarianceNormalizer(Normalizer):
    """Pools mean and covariance over the steps and turns them into a linear map now and then.

    The map is measured anew after updates 1, 2, 4, 8, ... (a first batch says little) and then every `update_every`,
    the last time after `freeze_after` updates. Between these it is a constant. It changes when the next training step
    asks for targets, not before: a head that is exported, or validated, answers in the map that it was last trained
    for. The eigenvectors are found by one rank,
    in float64, and sent to the others, because their sign and order may differ between machines; they are part of the
    checkpoint for the same reason. Measuring anew is the only moment at which the host waits for the device.

    Args:
        dim: C, channels.
        update_every: updates between two measurements.
        freeze_after: updates after which nothing changes any more; None never freezes.
        eps: see the subclass.
        initial: what the first step sees: "batch" or "raw", see Normalizer.

    Raises:
        UserError: update_every or freeze_after below 1.
    """

    full = True
    count: Tensor
    mean: Tensor
    scatter: Tensor
    center: Tensor
    measured: Tensor
    forward_map: Tensor
    inverse_map: Tensor

    def __init__(
        self,
        dim: int,
        *,
        update_every: int = 100,
        freeze_after: int | None = 3000,
        eps: float = 1e-6,
        initial: Literal["batch", "raw"] = "batch",
    ) -> None:
        super().__init__(dim, initial=initial)
        for name, value in (("update_every", update_every), ("freeze_after", freeze_after)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}; valid: at least 1" + (" or null" if name == "freeze_after" else ""))
        self.update_every = update_every
        self.freeze_after = freeze_after
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("forward_map", torch.eye(dim))
        self.register_buffer("inverse_map", torch.eye(dim))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))  # updates behind the map
        self._measured = 0  # its twin on the host, see Statistics

    def maps(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (C,), descending and at least 0, and eigenvectors (C, C), in columns, of the covariance ->
        forward and inverse map (C, C)."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        return self.freeze_after is not None and self.taken >= self.freeze_after

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self._check(x)
        if self.frozen:
            return
        pooled = merge(Moments(self.count, self.mean, self.scatter), self._batch(x, mask))
        self.count.copy_(pooled.number)
        self.mean.copy_(pooled.mean)
        self.scatter.copy_(pooled.scatter)
        self._count_step()

    @torch.no_grad()
    def refresh(self) -> None:
        """Measure the map anew if that is due."""
        if self._due() <= self._measured:
            return
        center, forward, inverse = self.fit(Moments(self.count, self.mean, self.scatter))
        self.center.copy_(center)
        self.forward_map.copy_(forward)
        self.inverse_map.copy_(inverse)
        self.measured.fill_(self.taken)
        self._measured = self.taken

    def _due(self) -> int:
        """The last update after which the map is measured, of those so far."""
        if self.frozen or self.taken == 0:
            return self.taken
        if self.taken < self.update_every:
            return 1 << (self.taken.bit_length() - 1)
        return self.taken - self.taken % self.update_every

    def reset(self) -> None:
        for buffer in (self.count, self.mean, self.scatter, self.center):
            buffer.zero_()
        self.forward_map.copy_(torch.eye(self.dim))
        self.inverse_map.copy_(torch.eye(self.dim))
        self.measured.zero_()
        self._measured = 0
        self._reset_steps()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._measured = 0 if self.measured.is_meta else int(self.measured)

    @torch.no_grad()
    def fit(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.empty(2, self.dim, self.dim, dtype=torch.float64)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1
        if not several or dist.get_rank(self.group) == 0:
            wide = "cpu" if moments.mean.device.type == "mps" else moments.mean.device  # eigh and float64
            both = torch.stack(self._decompose(moments.variance.to(wide, torch.float64), bool(moments.number > 1)))
        both = both.to(moments.mean.device, moments.mean.dtype)
        if several:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast(both, source, group=self.group)
        return moments.mean, both[0], both[1]

    def _decompose(self, covariance: Tensor, enough: bool) -> tuple[Tensor, Tensor]:
        if not enough:
            eye = torch.eye(self.dim).to(covariance)
            return eye, eye
        if not covariance.isfinite().all():  # eigh would raise here, with the other ranks waiting for the result
            nan = torch.full_like(covariance, math.nan)
            return nan, nan
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        # eigenvectors have no sign of their own: make each one's largest entry positive
        sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        return self.maps(values, vectors * sign)

    def current(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.center, self.forward_map, self.inverse_map


class PHIS(CovarianceNormalizer):
    """PHI-S (PCA-Hadamard isotropic standardisation): y -> H Uᵀ (y - mean) / phi.

    U are the eigenvectors of the covariance and phi^2 the mean of its eigenvalues. The rotation H spreads the variance,
    so that every channel of the result has variance exactly 1, while one scalar scale keeps the relative errors of all
    directions as they are. H is a normalised Hadamard matrix where `hadamard` knows one of this width; elsewhere a
    rotation that gives equal variances for the measured eigenvalues.

    Source: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", 2410.01680.

    Args:
        dim: C, channels.
        update_every: updates between two measurements of the rotation.
        freeze_after: updates after which nothing changes any more; null never freezes.
        eps: least phi, for constant features.
        initial: what the first step sees: "batch" or "raw", see Normalizer.
    """

    def maps(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        known = hadamard(self.dim)
        mixing = equalizer(values) if known is None else known.to(values) / math.sqrt(self.dim)
        rotation, phi = mixing @ vectors.T, values.mean().sqrt().clamp(min=self.eps)
        return rotation / phi, rotation.T * phi


class Whiten(CovarianceNormalizer):
    """Whitening: covariance I. Directions of little variance become as loud as the rest, noise included.

    Args:
        dim: C, channels.
        kind: "pca": y -> S^-1/2 Uᵀ (y - mean), channels ordered by variance. "zca": U S^-1/2 Uᵀ (y - mean), the white
            features nearest to the raw ones.
        update_every: updates between two measurements of the map.
        freeze_after: updates after which nothing changes any more; null never freezes.
        eps: added to every eigenvalue, as a share of their mean: bounds the amplification by 1 / sqrt(eps).
        initial: what the first step sees: "batch" or "raw", see Normalizer.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["pca", "zca"] = "pca",
        update_every: int = 100,
        freeze_after: int | None = 3000,
        eps: float = 1e-4,
        initial: Literal["batch", "raw"] = "batch",
    ) -> None:
        super().__init__(dim, update_every=update_every, freeze_after=freeze_after, eps=eps, initial=initial)
        if kind not in ("pca", "zca"):
            raise UserError(f"kind {kind!r}; valid: 'pca', 'zca'")
        self.kind = kind

    def maps(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (values + (self.eps * values.mean()).clamp(min=1e-12)).sqrt()
        left = vectors.T if self.kind == "pca" else vectors @ (vectors.T / deviation[:, None])
        if self.kind == "zca":
            return left, vectors @ (vectors.T * deviation[:, None])
        return left / deviation[:, None], vectors * deviation


def equalizer(values: Tensor) -> Tensor:
    """A rotation G (n, n), float64, for which every diagonal entry of G diag(values) Gᵀ is the mean of `values` (n,).

    One exists for any values (Schur-Horn). A cosine transform comes near; n - 1 plane rotations do the rest, each of
    which sets one entry for good.
    """
    n = len(values)
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    eigen = values.detach().cpu().double().numpy()
    g: Any = rows.numpy()
    mean = eigen.mean()
    diagonal = (g * g) @ eigen
    above = [i for i in range(n) if diagonal[i] > mean]
    below = [i for i in range(n) if diagonal[i] <= mean]
    while above and below:
        i, j = above[-1], below[-1]
        a, b, c = diagonal[i] - mean, diagonal[j] - mean, (g[i] * g[j]) @ eigen
        # t = tan(angle) that puts row j at the mean: a t^2 + 2 c t + b = 0, real because a > 0 >= b
        root = math.sqrt(max(c * c - a * b, 0.0))
        t = -b / (c + math.copysign(root, c)) if b else 0.0
        cos = 1 / math.sqrt(1 + t * t)
        g[i], g[j] = cos * (g[i] - t * g[j]), cos * (g[j] + t * g[i])
        below.pop()
        diagonal[i] = diagonal[i] + b  # what j gave or took
        if diagonal[i] <= mean:
            below.append(above.pop())
    return torch.from_numpy(g).to(values.device)
