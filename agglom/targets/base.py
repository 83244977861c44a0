"""What every normaliser promises: estimate a teacher's scale, remove it, give it back."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from agglom.errors import UserError
from agglom.targets.moments import Moments, Statistics, batch_moments, no_autocast


class Normalizer(Statistics):
    """An invertible affine map whose parameters are measured on a teacher's features.

    One normaliser per teacher and per kind of output (summary, spatial). Built as `X(dim, **options)`. A training step
    first calls `normalize` and then `update`, so that a step's targets rest on the steps before it (as in UNIC). Only
    the very first step has nothing to rest on: with `initial="batch"` it is normalised by its own batch's statistics,
    with "raw" it stays as it is (UNIC to the letter). In eval mode before any update features stay raw.

    Statistics are summed over the ranks of `group` (None: all of them), so every rank holds the same; they are buffers
    and so part of a checkpoint. All ranks of the group must call `update` together.

    Args:
        dim: C, channels.
        initial: what the first step sees.

    Raises:
        UserError: an unknown `initial`.
    """

    group: Any = None

    def __init__(self, dim: int, *, initial: Literal["batch", "raw"] = "batch") -> None:
        super().__init__()
        if initial not in ("batch", "raw"):
            raise UserError(f"initial {initial!r}; valid: 'batch', 'raw'")
        self.dim = dim
        self.initial = initial

    # What a subclass says: how moments become parameters, and how these act.

    full = False  # whether `fit` needs the whole covariance

    def fit(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Moments -> (mean (C,), forward, inverse), each map (C,) for a scale a channel or (C, C) for a matrix."""
        raise NotImplementedError

    def current(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, forward, inverse) from the buffers."""
        raise NotImplementedError

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take a training step's raw features in; does nothing once `frozen`.

        Args:
            x: (..., C) raw features.
            mask: (...) bool, the rows that count.
        """
        raise NotImplementedError

    def refresh(self) -> None:
        """Called before a training step's targets are normalised: the moment at which parameters may change."""

    @property
    def frozen(self) -> bool:
        """Whether `update` has no further effect."""
        return False

    # What they all share.

    def normalize(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., C) raw -> (..., C) normalised, float32. The mask only matters in the first step, see the class."""
        self._check(x)
        if self.training:
            self.refresh()
        first = self.training and self.taken == 0 and self.initial == "batch"
        mean, forward, _ = self.fit(self._batch(x, mask)) if first else self.current()
        x = _widen(x)
        return _act(x - mean.to(x.dtype), forward)

    def denormalize(self, x: Tensor) -> Tensor:
        """x (..., C) normalised -> (..., C) in the teacher's own units, float32."""
        self._check(x)
        mean, _, inverse = self.current()
        x = _widen(x)
        return _act(x, inverse) + mean.to(x.dtype)

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear | nn.Conv2d, *, repeats: int = 1, shift: bool = True) -> None:
        """Make a head's last layer answer in the teacher's own units, in place: W <- T W, b <- T b + mean.

        Args:
            linear: a Linear, or a Conv2d without groups, of C * repeats outputs; gains a bias if it has none.
            repeats: u * u for a layer before `nn.PixelShuffle(u)`, whose outputs are ordered (C, u * u).
            shift: whether to add the mean; of layers whose outputs are summed only one may.

        Raises:
            TypeError: another kind of layer.
            ValueError: its outputs aren't C * repeats.
        """
        if not isinstance(linear, (nn.Linear, nn.Conv2d)) or getattr(linear, "groups", 1) != 1:
            raise TypeError(f"{linear} can't be folded into; valid: nn.Linear, nn.Conv2d without groups")
        weight = linear.weight
        if len(weight) != self.dim * repeats:
            raise ValueError(f"{len(weight)} outputs of {linear} are not {self.dim} channels x {repeats} repeats")
        mean, _, inverse = (p.double().cpu() for p in self.current())

        def act(w: Tensor) -> Tensor:  # (C * repeats, n)
            w = w.detach().double().cpu().view(self.dim, -1)
            return inverse[:, None] * w if inverse.ndim == 1 else inverse @ w

        weight.copy_(act(weight.flatten(1)).view(weight.shape))
        bias = torch.zeros(len(weight), 1).double() if linear.bias is None else act(linear.bias[:, None])
        bias = bias.view(self.dim, repeats) + (mean[:, None] if shift else 0)
        if linear.bias is not None:
            linear.bias.copy_(bias.flatten())
        elif shift:
            linear.bias = nn.Parameter(bias.flatten().to(weight))

    def _batch(self, x: Tensor, mask: Tensor | None) -> Moments:
        return batch_moments(x, mask, full=self.full, group=self.group)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.dim:
            raise ValueError(f"{x.shape[-1]} channels in {tuple(x.shape)}; this normaliser was built for {self.dim}")


class Identity(Normalizer):
    """Raw targets: for comparisons, and for losses that don't see scale."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, initial="raw")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self._check(x)

    def reset(self) -> None:
        pass

    @property
    def frozen(self) -> bool:
        return True

    def normalize(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(x)
        return _widen(x)

    def denormalize(self, x: Tensor) -> Tensor:
        return self.normalize(x)

    def fold_into(self, linear: nn.Linear | nn.Conv2d, *, repeats: int = 1, shift: bool = True) -> None:
        pass


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _act(x: Tensor, by: Tensor) -> Tensor:
    """A scale a channel, or a matrix (C_out, C_in), applied to the last dimension in x's precision."""
    by = by.to(x.dtype)
    if by.ndim == 1:
        return x * by
    with no_autocast(x.device):
        return x @ by.T
