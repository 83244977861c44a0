"""What every adaptor promises, and the token layout that they share."""

from __future__ import annotations

from typing import Any, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from agglom.errors import UserError
from agglom.features import Dims, Features, StudentFeatures, align


class Adaptor(nn.Module):
    """Maps a student's features into one teacher's space.

    Built as `SomeAdaptor(student, teacher, token, tap_names, **options)`. A subclass implements `project`, which works
    at the student's own grid; `forward` aligns its output, so that the order (head, then align) is the same everywhere.
    No adaptor holds state of the backbone: dropping one changes nothing else.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher; None where it has no summary or no feature map.
        token: which of the student's K summary tokens is this teacher's.
        tap_names: the student's blocks that can be tapped, first to last.

    Attributes:
        taps: names of the student blocks that it reads beside the student's output.
        options: the keyword-only options that it was built with.

    Raises:
        UserError: the token does not exist, or the teacher gives something that the student has no features for.
    """

    taps: Sequence[str] = ()
    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Adaptor:
        # An export has to write down how to build the adaptor again; kept here so that no subclass can forget it.
        self = super().__new__(cls)
        self.__dict__["options"] = {
            k: v for k, v in kwargs.items() if k not in ("student", "teacher", "token", "tap_names")
        }
        return self

    def __init__(self, student: Dims, teacher: Dims, token: int = 0, tap_names: Sequence[str] = ()) -> None:
        super().__init__()
        if not 0 <= token < student.tokens:
            raise UserError(
                f"token: {token}; the student has {student.tokens} summary tokens, valid: 0 to {student.tokens - 1}; "
                f"lower it or give the student more"
            )
        for kind in ("summary", "spatial"):
            if getattr(teacher, kind) is not None and getattr(student, kind) is None:
                raise UserError(
                    f"{kind}: the teacher's is {getattr(teacher, kind)} wide and the student gives none; "
                    f"take a student that does, or leave it out of the teacher"
                )
        self.student, self.teacher, self.token, self.tap_names = student, teacher, token, tuple(tap_names)

    def forward(self, student: StudentFeatures, grid: tuple[int, int] | None = None) -> Features:
        """Predict the teacher's features.

        Args:
            student: the student's features.
            grid: (H, W) of the teacher's map; the head runs at the student's grid and its output is aligned to this
                one. None keeps the student's grid (times the head's own upsampling, where it has one).

        Returns:
            summary (B, D_t) or None, spatial (B, C_t, H, W) or None.
        """
        summary, spatial = self.project(student)
        return Features(summary, spatial if spatial is None or grid is None else align(spatial, grid))

    def project(self, student: StudentFeatures) -> Features:
        """The heads alone, at the student's grid. The subclass's only duty beside `last_linears`."""
        raise NotImplementedError

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        """The layers whose output is the prediction: {"summary": layer or None, "spatial": layer or None}.

        Where a normaliser folds itself in for an export; called on a copy, since an adaptor whose last layer is
        constrained gives the constraint up here. Where a head upsamples by u, its layer has C_t * u * u outputs, in
        `nn.PixelShuffle`'s order (C_t, u, u).
        """
        raise NotImplementedError


class TokenAdaptor(Adaptor):
    """Two heads that work on single tokens; `summary` and `spatial` are set by the subclass, None for what isn't given.

    Attributes:
        upsample: u, cells that `spatial` predicts along each side of one of the student's: its output is u * u times
            as wide as the teacher.
    """

    summary: nn.Module | None
    spatial: nn.Module | None
    upsample: int = 1

    def project(self, student: StudentFeatures) -> Features:
        summary = spatial = None
        if self.summary is not None:
            summary = self.summary(student.summary[:, self.token])
        if self.spatial is not None:
            tokens = self.spatial(to_tokens(student.spatial))
            spatial = to_cells(tokens, student.spatial.shape[-2:], self.upsample)
        return Features(summary, spatial)


def to_tokens(spatial: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C). Free for a ViT's map, which is a permuted view of its tokens."""
    return spatial.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def to_cells(tokens: Tensor, grid: Sequence[int], factor: int) -> Tensor:
    """(B, H * W, C * u * u) -> (B, C, u * H, u * W): every token becomes u x u cells, u = `factor`."""
    return F.pixel_shuffle(to_map(tokens, grid), factor) if factor > 1 else to_map(tokens, grid)


def trunc_normal(module: nn.Module) -> None:
    """For `module.apply`: Linear weights from a normal of std 0.02 truncated at 2 std, biases 0 (timm's ViT)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
