"""An orthogonal projection (VkD): a head that cannot learn what the backbone should."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Literal, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from agglom.adaptors.base import TokenAdaptor
from agglom.errors import UserError, nearest
from agglom.features import Dims

MAPS = ("matrix_exp", "cayley")


class OrthogonalLinear(nn.Module):
    """(..., D_s) -> (..., D_t) by a matrix with orthonormal columns (rows where D_t < D_s), without bias.

    The matrix is made anew in each forward pass from an unconstrained one, in float32 whatever the module or autocast
    is set to: made in half precision it would be off by 1e-2. torch's third map, Householder, is left out, since it
    keeps signs in the trained tensor, which weight decay drags to 0.
    """

    def __init__(self, width: int, out: int, *, orthogonal_map: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=False)
        orthogonal(self.linear, orthogonal_map=orthogonal_map)

    @property
    def weight(self) -> Tensor:
        """(D_t, D_s), float32 (float64 in a float64 module)."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(torch.promote_types(x.dtype, weight.dtype))
        return F.linear(x, weight, self.linear.bias)

    def settle(self) -> nn.Linear:
        """Give up the constraint: from here on a plain Linear with bias, of the same function."""
        if parametrize.is_parametrized(self.linear):
            with torch.no_grad():
                plain = nn.Linear(self.linear.in_features, self.linear.out_features, device="meta")
                plain.weight = nn.Parameter(self.weight.detach().clone())
                plain.bias = nn.Parameter(plain.weight.new_zeros(plain.out_features))
            self.linear = plain
        return self.linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(t: Tensor) -> Tensor:  # to another device, but never to half precision
            moved = fn(t)
            return t.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}linear.weight" in state_dict:  # saved after `settle`, as in an export
            self.settle()
        super()._load_from_state_dict(state_dict, prefix, *args)


class OrthogonalAdaptor(TokenAdaptor):
    """V_kD's projection: W s with W^T W = I, for summary and spatial separately.

    Where the teacher is at least as wide as the student, inner products between features survive it, so the projection
    adds no structure of its own. Where it is narrower, rows are orthonormal instead and inner products are not
    preserved: a warning says so, and an MLP is the better choice.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: not used; the projection reads the student's output.
        orthogonal_map: from a skew-symmetric matrix to an orthogonal one: its exponential, or Cayley's transform, which
            is cheaper. Either costs the cube of the larger width at each step.
    """

    summary: OrthogonalLinear | None
    spatial: OrthogonalLinear | None

    def __init__(
        self,
        student: Dims,
        teacher: Dims,
        token: int = 0,
        tap_names: Sequence[str] = (),
        *,
        orthogonal_map: Literal["matrix_exp", "cayley"] = "matrix_exp",
    ) -> None:
        super().__init__(student, teacher, token, tap_names)
        if orthogonal_map not in MAPS:
            raise UserError(f"orthogonal_map: {orthogonal_map!r}; {nearest(orthogonal_map, MAPS)}")

        def head(kind: str) -> OrthogonalLinear | None:
            width, out = getattr(student, kind), getattr(teacher, kind)
            if width is None or out is None:
                return None
            if out < width:
                warnings.warn(
                    f"OrthogonalAdaptor: {kind} {out} wide at the teacher < {width} at the student: inner products are "
                    f"not preserved; use MLPAdaptor for this teacher",
                    stacklevel=3,
                )
            return OrthogonalLinear(width, out, orthogonal_map=orthogonal_map)

        self.summary, self.spatial = head("summary"), head("spatial")

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        """As plain Linears; ends the constraint (a projection into the teacher's units is not orthogonal)."""
        return {
            "summary": None if self.summary is None else self.summary.settle(),
            "spatial": None if self.spatial is None else self.spatial.settle(),
        }

    def no_weight_decay(self) -> set[str]:
        """Everything: decay would act on the unconstrained matrix, turning the projection without shrinking it."""
        return {name for name, _ in self.named_parameters()}
