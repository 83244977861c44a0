"""How the per-image losses of the teachers become one loss: (T, B) losses -> (T, B) weights.

The caller's total is `(weights * losses).sum(0).mean() + balance.penalty()`: a sum over teachers, a mean over images.
Weights carry no gradient. One vectorised path, and the host never waits for the device.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agglom.errors import UserError


class Balance(nn.Module):
    """Weights of every teacher for every image. A subclass implements `weigh`."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, losses: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
        """The weights of one step.

        Args:
            losses: (T, B) per-image losses. Where not valid any finite value will do.
            valid: (T, B) bool, whether the teacher has a target for the image.
            own: (T, B) bool, whether the image comes from the teacher's own data; only some rules look at it.

        Returns:
            (T, B) float32 without gradient, 0 where not valid.
        """
        with torch.no_grad():
            weights = self.weigh(losses.detach().float(), valid, own).masked_fill(~valid, 0)
        self._last = weights, valid
        return weights

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        """As `forward`, with detached float32 losses; entries that aren't valid are cleared by the caller."""
        raise NotImplementedError

    def penalty(self) -> Tensor | float:
        """A term with gradient that the caller adds to the total of the same step; 0 for most."""
        return 0.0

    def kept_share(self) -> Tensor:
        """(T,) share of the images with a target that had a weight above 0, in the last step; 0 where none had."""
        weights, valid = self._recorded()
        return (weights > 0).sum(1) / valid.sum(1).clamp(min=1)

    def mean_weight(self) -> Tensor:
        """(T,) mean weight over the images with a target, in the last step; 0 where none had."""
        weights, valid = self._recorded()
        return weights.sum(1) / valid.sum(1).clamp(min=1)

    def _recorded(self) -> tuple[Tensor, Tensor]:
        if self._last is None:
            raise RuntimeError("no step yet: call the balance first")
        return self._last


def per_image(kept: Tensor) -> Tensor:
    """(T, B) bool -> weights that share 1 equally among an image's kept teachers (0 if it has none)."""
    return kept / kept.sum(0).clamp(min=1)


def per_pair(kept: Tensor) -> Tensor:
    """(T, B) bool -> the same weight for every kept pair, so that the mean over images is the mean over kept pairs."""
    return kept * (kept.shape[1] / kept.sum().clamp(min=1))


class Equal(Balance):
    """Every valid teacher of an image weighs the same; every image has total weight 1."""

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        return per_image(valid)


class Drawing(Balance):
    """A balance that draws random numbers, the same again after a resume.

    A draw depends on the seed, the rank and the number of draws before it alone, and the last is the whole state: one
    checkpoint serves every rank. Numbers come from the CPU, so they are the same on every device.

    Args:
        seed: of the draws.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._draws = 0
        self._generator = torch.Generator()

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers in [0, 1)."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # hashed, because the generator looks at 32 bits only and near seeds would give near streams
        key = hashlib.blake2b(f"{self.seed}/{rank}/{self._draws}".encode(), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(key, "little"))
        self._draws += 1
        return torch.rand(shape, generator=self._generator).to(device, non_blocking=True)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._draws)

    def set_extra_state(self, state: Any) -> None:
        self._draws = int(state)


class TeacherDropping(Drawing):
    """UNIC's teacher dropping: an image's worst teacher always counts, each other one with probability 1 - p.

    Judged on an image's combined loss, which needs targets of comparable scale (normalised). In eval mode nothing is
    dropped.

    Args:
        p: probability to drop a teacher that isn't the image's worst.
        normalization: "per_image": every image has total weight 1. "per_pair": every kept pair has the same weight
            (UNIC's code), so an image that keeps more teachers weighs more; the number of pairs is that of this rank.
        own_data: DUNE's rule: an image that comes from some teachers' own data (`own` of `forward`) counts for those
            alone; any other image is treated as above.
        seed: of the draws.

    Raises:
        UserError: p outside [0, 1], an unknown normalization.
    """

    def __init__(
        self,
        *,
        p: float = 0.5,
        normalization: Literal["per_image", "per_pair"] = "per_image",
        own_data: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if not 0 <= p <= 1:
            raise UserError(f"p {p} is no probability; valid: 0 to 1")
        if normalization not in ("per_image", "per_pair"):
            raise UserError(f"normalization {normalization!r}; valid: 'per_image', 'per_pair'")
        self.p = p
        self.normalization = normalization
        self.own_data = own_data

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        kept = valid
        if self.training:
            worst = losses.masked_fill(~valid, float("-inf")).argmax(0, keepdim=True)  # (1, B)
            kept = (self.uniform(tuple(losses.shape), losses.device) >= self.p).scatter(0, worst, True) & valid
            if self.own_data:
                if own is None:
                    raise ValueError("own_data needs to be told whose data each image is: forward(losses, valid, own)")
                own = own & valid
                kept = torch.where(own.any(0), own, kept)
        return per_image(kept) if self.normalization == "per_image" else per_pair(kept)
