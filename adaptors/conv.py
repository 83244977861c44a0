"""A small convolutional translator per teacher (Theia), for any grid."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor, nn

from agglom.adaptors.base import Adaptor, to_map, to_tokens
from agglom.errors import UserError
from agglom.features import Dims, Features, StudentFeatures


class Translator(nn.Module):
    """(B, C, H, W) -> (B, D, u * H, u * W): norm, [x2, norm,]* conv 3x3, ReLU, norm, conv 3x3, ReLU, norm, Linear.

    Norms are GroupNorm of one group: statistics over all of (C, H, W) as in Theia's LayerNorm, but scale and shift per
    channel instead of per channel and place, so that any grid will do.
    """

    def __init__(self, width: int, out: int, *, hidden: int, doublings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.GroupNorm(1, width)]
        for _ in range(doublings):
            layers += [nn.ConvTranspose2d(width, hidden, 2, stride=2), nn.ReLU(), nn.GroupNorm(1, hidden)]
            width = hidden
        for inputs in (width, hidden):
            layers += [nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, hidden)]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return to_map(self.last(to_tokens(x)), x.shape[-2:])


class ConvAdaptor(Adaptor):
    """Theia's translator: two 3x3 convolutions over the map; a Linear for the summary, as Theia's for the class token.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: not used; the translator reads the student's output.
        hidden: channels of the convolutions; left out: the student's width.
        upsample: 1, or a power of 2 by which the translator enlarges the map before its convolutions (transposed
            convolutions of 2x2); for teachers with a larger grid: 4 from 16x16 to SAM's 64x64. Any other difference of
            grids is left to the alignment of the output.

    Raises:
        UserError: `upsample` is not a power of 2.
    """

    def __init__(
        self,
        student: Dims,
        teacher: Dims,
        token: int = 0,
        tap_names: Sequence[str] = (),
        *,
        hidden: int | None = None,
        upsample: int = 1,
    ) -> None:
        super().__init__(student, teacher, token, tap_names)
        if upsample < 1 or upsample & (upsample - 1):
            raise UserError(f"upsample: {upsample}; valid: 1, 2, 4, 8, ...")
        self.summary: nn.Linear | None = None
        self.spatial: Translator | None = None
        if teacher.summary is not None and student.summary is not None:
            self.summary = nn.Linear(student.summary, teacher.summary)
            nn.init.zeros_(self.summary.bias)
        if teacher.spatial is not None and student.spatial is not None:
            doublings = upsample.bit_length() - 1
            self.spatial = Translator(
                student.spatial, teacher.spatial, hidden=hidden or student.spatial, doublings=doublings
            )

    def project(self, student: StudentFeatures) -> Features:
        summary = spatial = None
        if self.summary is not None:
            summary = self.summary(student.summary[:, self.token])
        if self.spatial is not None:
            spatial = self.spatial(student.spatial)
        return Features(summary, spatial)

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        return {"summary": self.summary, "spatial": None if self.spatial is None else self.spatial.last}
