"""How the per-image losses of the teachers become one loss: (T, B) losses -> (T, B) weights.

The caller's total is `(weights * losses).sum(0).mean() + balance.penalty()`: a sum over teachers, a mean over images.
Weights carry no gradient. One vectorised path, and the host never waits for the device.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agglom.draws import generator
from agglom.errors import UserError
from agglom.targets.moments import Statistics, accumulator, sum_over_ranks


class Balance(nn.Module):
    """Weights of every teacher for every image. A subclass implements `weigh`.

    Attributes:
        shares: whether the weights of an image sum to 1 over its valid teachers, so that fewer of them weigh more each.
    """

    shares: bool = True

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


def _one_each(option: str, number: int, losses: Tensor) -> None:
    if number != len(losses):
        raise UserError(
            f"balance.{option} is for {number} teachers, this run has {len(losses)}; name each exactly once"
        )


class Equal(Balance):
    """Every valid teacher of an image weighs the same; every image has total weight 1."""

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        return per_image(valid)


class Manual(Balance):
    """Fixed weights.

    Args:
        weights: one number a teacher, in the order of the teachers; 0 leaves one out of the total.
        normalize: divide by the sum over an image's valid teachers, so that every image has total weight 1. Otherwise
            the numbers are taken as they are.

    Raises:
        UserError: no weights, or a negative one; at the first step, if there are more or fewer than teachers.
    """

    def __init__(self, *, weights: list[float], normalize: bool = False) -> None:
        super().__init__()
        if not weights or min(weights) < 0:
            raise UserError(f"weights {weights}; valid: one number >= 0 a teacher")
        self.weights = list(weights)
        self.normalize = self.shares = normalize

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        _one_each("weights", len(self.weights), losses)
        fixed = torch.tensor(self.weights).to(losses.device, non_blocking=True)
        weights = fixed[:, None] * valid
        return weights / weights.sum(0).clamp(min=1e-12) if self.normalize else weights


class AdaLoss(Balance, Statistics):
    """Every teacher's loss divided by its own running mean, then shared as in `Equal`.

    The mean is over the valid images of all ranks of `group`; it is a plain average over the first 1 / (1 - decay)
    steps and exponential from then on, this step included. It moves in training only.

    Source: AdaLoss (Hu et al. 2019), as compared in AM-RADIO and PHI-S.

    Args:
        decay: of the running mean.
        eps: least running mean.

    Raises:
        UserError: decay outside [0, 1).
    """

    lazy = ("average", "seen")
    group: Any = None
    average: Tensor
    seen: Tensor

    def __init__(self, *, decay: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"decay {decay}; valid: 0 <= decay < 1")
        self.decay = decay
        self.eps = eps
        self.register_buffer("average", torch.zeros(0, dtype=torch.float64))  # (T,) from the first step on
        self.register_buffer("seen", torch.zeros(0, dtype=torch.float64))  # (T,) steps that had a valid image

    def reset(self) -> None:
        self.average.zero_()
        self.seen.zero_()
        self._reset_steps()

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        wide = accumulator(losses.device)
        for name in self.lazy:
            self._resize(name, (len(losses),), losses.device)
        if self.training:
            total, count = losses.masked_fill(~valid, 0).sum(1).to(wide), valid.sum(1).to(wide)
            total, count = sum_over_ranks(total, count, group=self.group)
            self.seen.add_(count > 0)
            momentum = (1 / self.seen.clamp(min=1)).clamp(min=1 - self.decay) * (count > 0)
            self.average.lerp_(total / count.clamp(min=1), momentum)
            self._count_step()
        scale = torch.where(self.seen > 0, self.average.clamp(min=self.eps), torch.ones_like(self.average))
        return per_image(valid) / scale.float()[:, None]


class Uncertainty(Balance):
    """Learned weights: the total is the sum over teachers of exp(-2 s) L / 2 + s, with a parameter s each.

    The weights carry no gradient; `penalty` holds the part of the total that s learns from, and must be added by the
    caller in the same step. The optimiser has to see this module's parameter.

    Source: Kendall, Gal & Cipolla, 1705.07115.

    Args:
        teachers: T, how many there are.

    Raises:
        UserError: teachers below 1; at the first step, if there are more or fewer.
    """

    shares = False

    def __init__(self, *, teachers: int) -> None:
        super().__init__()
        if teachers < 1:
            raise UserError(f"teachers {teachers}; valid: at least 1")
        self.log_sigma = nn.Parameter(torch.zeros(teachers))
        self._terms: tuple[Tensor, Tensor] | None = None

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        _one_each("teachers", len(self.log_sigma), losses)
        self._terms = losses.masked_fill(~valid, 0).mean(1), valid.float().mean(1)
        return 0.5 * torch.exp(-2 * self.log_sigma.float())[:, None] * valid

    def penalty(self) -> Tensor:
        """(): the sum of s in value; in gradient also what the weights would have passed on to s."""
        if self._terms is None:
            raise RuntimeError("no step yet: call the balance first")
        loss, share = self._terms  # (T,) mean over all images, and share of images with a target
        weighted = 0.5 * torch.exp(-2 * self.log_sigma) * loss
        return (share * self.log_sigma + weighted - weighted.detach()).sum()


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

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers in [0, 1)."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        drawn = torch.rand(shape, generator=generator(self.seed, rank, self._draws))
        self._draws += 1
        return drawn.to(device, non_blocking=True)

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


class RandomK(Drawing):
    """k teachers drawn at random, all with equal chance among the valid ones (Theia's random_target_models).

    In eval mode all count.

    Args:
        k: how many count; an image with fewer valid teachers keeps all of them.
        per: "batch": one draw for all images of a step (an image for which a drawn teacher isn't valid goes on to the
            next in the drawn order). "image": one draw an image.
        seed: of the draws.

    Raises:
        UserError: k below 1, an unknown `per`.
    """

    def __init__(self, *, k: int, per: Literal["batch", "image"] = "batch", seed: int = 0) -> None:
        super().__init__(seed=seed)
        if k < 1:
            raise UserError(f"k {k}; valid: at least 1")
        if per not in ("batch", "image"):
            raise UserError(f"per {per!r}; valid: 'batch', 'image'")
        self.k = k
        self.per = per

    def weigh(self, losses: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
        kept = valid
        if self.training and self.k < len(losses):
            teachers, images = losses.shape
            lots = self.uniform((teachers, 1 if self.per == "batch" else images), losses.device).expand(
                teachers, images
            )
            drawn = lots.masked_fill(~valid, -1).topk(self.k, 0).indices
            kept = torch.zeros_like(valid).scatter(0, drawn, True) & valid
        return per_image(kept)
