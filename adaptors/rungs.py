"""sum over r of W2_r GELU(W1_r x_r + b1_r), in few large products and with the hidden units kept once.

Written plainly, autograd keeps every hidden unit twice (before the GELU for its derivative, after it for the gradient
of W2) and adds R outputs one by one. Here the rungs' hidden units lie side by side in one matrix, so that the second
layers and the sum are one product, and what comes after the GELU is computed again in the backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of hidden units that a product takes at once on a CPU. It gains nothing from more, and glibc's malloc gives
# blocks of 32 MiB and above back to the system, to be faulted in anew at every step.
CPU_PIECE = 10 * 2**20


def sum_of_rungs(
    rungs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    last: Tensor,
    last_bias: Tensor | None,
    *,
    recompute: bool = False,
) -> Tensor:
    """The ladder's sum for rungs on one grid.

    Args:
        rungs: x_r, (M, d_r) each.
        weights: W1_r, (h_r, d_r) each.
        biases: b1_r, (h_r,) each.
        last: the W2_r side by side, (D, sum of h_r).
        last_bias: (D,) or None.
        recompute: keep no hidden units for the backward pass at all.

    Returns:
        (M, D), in autocast's dtype where autocast is on.
    """
    device = rungs[0].device.type
    if torch.compiler.is_compiling():  # a compiler decides by itself what to keep, and sees through plain code
        hidden = torch.cat([F.linear(x, w, b) for x, w, b in zip(rungs, weights, biases, strict=True)], 1)
        return F.linear(F.gelu(hidden), last, last_bias)
    available = torch.amp.is_autocast_available(device)  # not on the meta device, which refuses the question
    if available and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rungs, weights, biases = ([t.to(dtype) for t in group] for group in (rungs, weights, biases))
        last, last_bias = last.to(dtype), None if last_bias is None else last_bias.to(dtype)
    # Pieces add up in the output's precision, so half precision takes all in one.
    piece = None
    if device == "cpu" and last.dtype.itemsize >= 4:
        piece = max(64, CPU_PIECE // (last.dtype.itemsize * max(1, len(rungs[0]))))
    keep = torch.is_grad_enabled() and not recompute
    with torch.autocast(device, enabled=False) if available else nullcontext():
        return _SumOfRungs.apply(len(rungs), piece, keep, last, last_bias, *rungs, *weights, *biases)


class _SumOfRungs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, count: int, piece: int, keep: bool, last: Tensor, last_bias: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        rungs, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        rows, kept = len(rungs[0]), []
        out = last.new_zeros(rows, len(last)) if last_bias is None else last_bias.repeat(rows, 1)
        for columns, parts in _pieces([len(w) for w in weights], piece):
            hidden = _hidden(rungs, weights, biases, parts)
            out.addmm_(F.gelu(hidden), last[:, columns].T)
            if keep:
                kept.append(hidden)
        ctx.count, ctx.piece, ctx.keep = count, piece, keep
        ctx.save_for_backward(last, *kept, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count: int = ctx.count
        last, *saved = ctx.saved_tensors
        kept, tensors = saved[: -3 * count], saved[-3 * count :]
        rungs, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        needs = ctx.needs_input_grad
        rung_needs, weight_needs = needs[5 : 5 + count], needs[5 + count : 5 + 2 * count]
        grad_last = torch.empty_like(last, memory_format=torch.contiguous_format) if needs[3] else None
        grad_last_bias = grad.sum(0) if needs[4] else None
        grad_rungs: list[Tensor | None] = [None] * count
        grad_weights = [torch.empty_like(w) if need else None for w, need in zip(weights, weight_needs, strict=True)]
        grad_biases = [torch.empty_like(b) for b in biases]
        pieces = list(_pieces([len(w) for w in weights], ctx.piece))
        scratch = grad.new_empty(len(grad) * max(parts[-1][2].stop for _, parts in pieces))
        for i, (columns, parts) in enumerate(pieces):
            hidden = kept[i] if ctx.keep else _hidden(rungs, weights, biases, parts)
            # One scratch matrix holds in turn GELU(hidden), the gradient after the GELU and the one before it.
            work = scratch[: hidden.numel()].view_as(hidden)
            if grad_last is not None:
                torch.ops.aten.gelu.out(hidden, out=work)
                torch.mm(grad.T, work, out=grad_last[:, columns])
            torch.mm(grad, last[:, columns], out=work)
            torch.ops.aten.gelu_backward.grad_input(work, hidden, grad_input=work)
            sums = work.sum(0)
            for r, units, place in parts:
                here = work[:, place]
                grad_biases[r][units] = sums[place]
                if (grad_weight := grad_weights[r]) is not None:
                    torch.mm(here.T, rungs[r], out=grad_weight[units])
                if (grad_rung := grad_rungs[r]) is not None:
                    grad_rung.addmm_(here, weights[r][units])
                elif rung_needs[r]:
                    grad_rungs[r] = here @ weights[r][units]
        return None, None, None, grad_last, grad_last_bias, *grad_rungs, *grad_weights, *grad_biases


def _hidden(
    rungs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], parts: list[tuple[int, slice, slice]]
) -> Tensor:
    """One piece's hidden units before the GELU, (M, units)."""
    out = rungs[0].new_empty(len(rungs[0]), parts[-1][2].stop)
    for r, units, place in parts:
        torch.addmm(biases[r][units], rungs[r], weights[r][units].T, out=out[:, place])
    return out


def _pieces(hidden: Sequence[int], piece: int | None) -> Iterator[tuple[slice, list[tuple[int, slice, slice]]]]:
    """Cut the rungs' hidden units, side by side, into pieces of at most `piece`: whole rungs where they fit.

    Yields:
        the piece's columns of `last`, and its parts: (rung, units of that rung, their columns of the piece).
    """
    start, width = 0, 0
    parts: list[Any] = []
    for r, units in enumerate(hidden):
        share = -(-units // -(-units // (piece or units)))  # a rung that is too wide is cut into equal shares
        for low in range(0, units, share):
            high = min(low + share, units)
            if parts and piece and width + high - low > piece:
                yield slice(start, start + width), parts
                start, width, parts = start + width, 0, []
            parts.append((r, slice(low, high), slice(width, width + high - low)))
            width += high - low
    yield slice(start, start + width), parts
