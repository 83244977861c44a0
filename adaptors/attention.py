"""One transformer block per teacher (DUNE), over summary token and spatial tokens together."""

from __future__ import annotations

from typing import Literal, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.adaptors.base import Adaptor, to_map, to_tokens, trunc_normal
from agglom.errors import UserError, nearest
from agglom.features import Dims, Features, StudentFeatures


class Block(nn.Module):
    """A pre-LayerNorm transformer block with LayerScale: tokens (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, *, heads: int, ratio: float, scale: float, attention: str) -> None:
        super().__init__()
        self.heads, self.fused_attn = heads, attention == "fused"
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = round(ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), scale)) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attend(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class AttentionAdaptor(Adaptor):
    """DUNE's projector: one transformer block at the student's width, then a Linear for summary and one for spatial.

    The block sees this teacher's summary token and all spatial tokens; both predictions come from it. A student whose
    summary has another width than its map (some CNNs) has its summary brought there by a Linear of its own. The Linears
    are two, where DUNE has one, since a teacher's summary and map may differ in width.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: not used; the block reads the student's output.
        heads: attention heads; left out: one for every 64 channels, or the nearest number below that divides the width.
        ratio: hidden width of the block's perceptron over the student's.
        layer_scale: initial scale of both residual branches.
        attention: "fused" for torch's fused kernel (whose backward is slow on CPUs in bf16), "plain" for two products.

    Raises:
        UserError: heads that do not divide the width.
    """

    def __init__(
        self,
        student: Dims,
        teacher: Dims,
        token: int = 0,
        tap_names: Sequence[str] = (),
        *,
        heads: int | None = None,
        ratio: float = 4.0,
        layer_scale: float = 1e-4,
        attention: Literal["fused", "plain"] = "fused",
    ) -> None:
        super().__init__(student, teacher, token, tap_names)
        width = student.spatial or student.summary
        if width is None:
            raise UserError("the student gives neither summary nor spatial; valid: at least one")
        if attention not in ("fused", "plain"):
            raise UserError(f"attention: {attention!r}; {nearest(attention, ('fused', 'plain'))}")
        if heads is None:
            heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        if heads < 1 or width % heads:
            valid = [h for h in range(1, width + 1) if width % h == 0]
            raise UserError(f"heads: {heads} does not divide the student's width {width}; valid: {valid}")
        self.tokens = 0 if student.summary is None else 1
        self.enter = (
            nn.Linear(student.summary, width) if student.summary and student.summary != width else nn.Identity()
        )
        self.block = Block(width, heads=heads, ratio=ratio, scale=layer_scale, attention=attention)
        self.summary = None if teacher.summary is None else nn.Linear(width, teacher.summary)
        self.spatial = None if teacher.spatial is None else nn.Linear(width, teacher.spatial)
        self.apply(trunc_normal)

    def project(self, student: StudentFeatures) -> Features:
        parts = []
        if self.tokens:
            parts.append(self.enter(student.summary[:, self.token, None]))
        if student.spatial is not None:
            parts.append(to_tokens(student.spatial))
        x = self.block(torch.cat(parts, 1))
        summary = spatial = None
        if self.summary is not None:
            summary = self.summary(x[:, 0])
        if self.spatial is not None:
            spatial = to_map(self.spatial(x[:, self.tokens :]), student.spatial.shape[-2:])
        return Features(summary, spatial)

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        return {"summary": self.summary, "spatial": self.spatial}
