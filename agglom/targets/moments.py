"""Count, mean and scatter of features: of a batch over all ranks, and merged over batches.

Only sums travel between ranks, never features. A batch is summed in its own precision (at least float32) about its own
mean; everything that accumulates over steps or ranks is float64, which makes the sums over ranks safe too. MPS has no
float64: there the accumulators are float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Moments(NamedTuple):
    """Of N rows of C channels: number () = N, mean (C,), scatter (C,) or (C, C) = sum of (x - mean)^2 or its outer
    product."""

    number: Tensor
    mean: Tensor
    scatter: Tensor

    @property
    def variance(self) -> Tensor:
        """Unbiased variance (C,) or covariance (C, C); 0 for fewer than two rows."""
        return self.scatter / (self.number - 1).clamp(min=1)


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype statistics are kept in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> ContextManager[Any]:
    """Matrix products in the dtype of their operands, whatever the caller's autocast says."""
    # devices without autocast (meta) have none to turn off, and refuse the question
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def sum_over_ranks(*tensors: Tensor, group: Any = None) -> tuple[Tensor, ...]:
    """Each tensor summed over the ranks of the group, in one collective; as they are without a process group.

    Args:
        tensors: same dtype and device, same shapes on every rank.
        group: a process group; None is all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return tensors
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    return tuple(part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True))


def batch_moments(x: Tensor, mask: Tensor | None = None, *, full: bool = False, group: Any = None) -> Moments:
    """Moments of all ranks' valid rows.

    Args:
        x: (..., C).
        mask: (...) bool, the rows that count.
        full: a (C, C) scatter rather than its diagonal.
        group: as in `sum_over_ranks`.

    Returns:
        Moments in the accumulator's dtype; a count of 0 comes with zeros.

    Raises:
        ValueError: the mask isn't bool or doesn't have the shape of x without its channel.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    wide = accumulator(x.device)
    if mask is None:
        count = torch.full((), len(rows), dtype=wide, device=x.device)
    else:
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask {mask.dtype} {tuple(mask.shape)} does not fit rows of {tuple(x.shape)}: bool wanted"
            )
        # weights of 0 rather than a selection: selecting rows would make the host wait for their number
        outside = ~mask.reshape(-1, 1)
        rows = rows.masked_fill(outside, 0)
        count = mask.sum().to(wide)
    mean = rows.sum(0) / count.clamp(min=1).to(rows.dtype)
    rows = rows - mean
    if mask is not None:
        rows = rows.masked_fill(outside, 0)
    if full:
        with no_autocast(x.device):
            scatter = rows.T @ rows
    else:
        scatter = rows.square().sum(0)
    # what rounding left of the mean is small, so its own sum is good to many more digits
    rest = rows.sum(0).to(wide) / count.clamp(min=1)
    mean, scatter = mean.to(wide) + rest, scatter.to(wide) - count * _square(rest, full)
    count, total, moment = sum_over_ranks(count, count * mean, scatter + count * _square(mean, full), group=group)
    mean = total / count.clamp(min=1)
    scatter = moment - count * _square(mean, full)
    return Moments(count, mean, scatter if full else scatter.clamp(min=0))  # a constant channel may round below 0


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows (Chan, Golub & LeVeque 1983)."""
    count = a.number + b.number
    share = b.number / count.clamp(min=1)
    delta = b.mean - a.mean
    between = _square(delta, a.scatter.ndim == 2) * (a.number * share)
    return Moments(count, a.mean + delta * share, a.scatter + b.scatter + between)


def _square(mean: Tensor, full: bool) -> Tensor:
    return torch.outer(mean, mean) if full else mean.square()


class Statistics(nn.Module):
    """A module whose buffers are running statistics: they keep their precision, and a count of its updates.

    The count lives in the buffer `steps`; a Python twin of it is what decisions are taken on, so that no step waits
    for the device. The twin is read anew whenever a state dict is loaded. Buffers named in `lazy` take their size from
    the first update, or from the state dict.
    """

    steps: Tensor
    lazy: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._taken = 0

    @property
    def taken(self) -> int:
        """How many updates there were (since the last reset)."""
        return self._taken

    def _count_step(self) -> None:
        self.steps.add_(1)
        self._taken += 1

    def recount(self) -> None:
        """Read the twin anew, after an update has been taken back on the device. The host waits."""
        self._taken = 0 if self.steps.is_meta else int(self.steps)

    def reset(self) -> None:
        """Forget everything, as at the start of a stage."""
        raise NotImplementedError

    def _reset_steps(self) -> None:
        self.steps.zero_()
        self._taken = 0

    def _resize(self, name: str, shape: tuple[int, ...] | torch.Size, device: torch.device) -> None:
        """Give a lazy buffer its size, filled with zeros, unless it has it already."""
        if getattr(self, name).shape != torch.Size(shape):
            with torch.inference_mode(False):  # a buffer made under inference mode couldn't be updated outside it
                setattr(self, name, torch.zeros(shape, dtype=accumulator(device), device=device))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.lazy:
            if prefix + name in state_dict:
                self._resize(name, state_dict[prefix + name].shape, getattr(self, name).device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.recount()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Statistics:
        # module.to(bfloat16) must move the statistics but not round them
        def keep(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return fn(t)
            moved = fn(t.float())
            wide = accumulator(moved.device) if t.dtype == torch.float64 else t.dtype
            return torch.empty_like(moved, dtype=wide) if t.is_meta else t.to(moved.device, wide)

        return super()._apply(keep, recurse)
