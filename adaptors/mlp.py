"""Perceptron heads: AM-RADIO's (v1) and the residual one of its successors (v2)."""

from __future__ import annotations

from typing import Literal, Sequence

from torch import Tensor, nn

from agglom.adaptors.base import TokenAdaptor
from agglom.errors import UserError, nearest
from agglom.features import Dims


class MLPHead(nn.Module):
    """(..., C) -> (..., D) on single tokens.

    v1: Linear(C, h), LayerNorm, GELU, Linear(h, D).
    v2: [LayerNorm, GELU,] Linear(C, h), n times x + Linear(GELU(LayerNorm(x))), LayerNorm, GELU, Linear(h, D).
    The bias of the last layer starts at 0.
    """

    def __init__(self, width: int, out: int, *, hidden: int, blocks: int = 0, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.LayerNorm(width), nn.GELU()) if pre_norm else nn.Identity()
        self.first = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(hidden)
        self.act = nn.GELU()
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.pre(x))
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.act(self.norm(x)))


class MLPAdaptor(TokenAdaptor):
    """Separate perceptrons for summary and spatial features (AM-RADIO section 3.2; RADIOv2.5 for v2).

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: not used; the heads read the student's output.
        version: "v1" for one hidden layer, "v2" for residual blocks in the hidden space.
        hidden: hidden width; None takes the larger of the teacher's summary and spatial widths. (AM-RADIO takes the
            widest teacher's for all; write it out to reproduce that.)
        blocks: residual blocks, v2 only.
        pre_norm: LayerNorm and GELU before the first layer, v2 only.
        upsample: u, spatial only: the head predicts u x u cells for each of the student's.
    """

    summary: MLPHead | None
    spatial: MLPHead | None

    def __init__(
        self,
        student: Dims,
        teacher: Dims,
        token: int = 0,
        tap_names: Sequence[str] = (),
        *,
        version: Literal["v1", "v2"] = "v1",
        hidden: int | None = None,
        blocks: int = 1,
        pre_norm: bool = False,
        upsample: int = 1,
    ) -> None:
        super().__init__(student, teacher, token, tap_names)
        if version not in ("v1", "v2"):
            raise UserError(f"version: {version!r}; {nearest(version, ['v1', 'v2'])}")
        width = hidden or max(teacher.summary or 0, teacher.spatial or 0)
        if version == "v1":
            blocks, pre_norm = 0, False

        def head(inputs: int | None, outputs: int | None) -> MLPHead | None:
            if inputs is None or outputs is None:
                return None
            return MLPHead(inputs, outputs, hidden=width, blocks=blocks, pre_norm=pre_norm)

        self.summary = head(student.summary, teacher.summary)
        self.spatial = head(student.spatial, teacher.spatial and teacher.spatial * upsample**2)
        self.upsample = upsample

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        return {
            "summary": None if self.summary is None else self.summary.last,
            "spatial": None if self.spatial is None else self.spatial.last,
        }
