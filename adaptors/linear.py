"""One linear layer: a head with nothing to hide what the backbone lacks."""

from __future__ import annotations

from typing import Sequence

from torch import nn

from agglom.adaptors.base import TokenAdaptor
from agglom.features import Dims


class LinearAdaptor(TokenAdaptor):
    """W s + b, for summary and spatial separately.

    Whatever the teacher knows has to lie in the student's own features, readable without a non-linearity: what nearest
    neighbours and linear probes look at. In exchange all teachers share the student's width; where that is narrow,
    `MLPAdaptor` gives them room.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: not used; the head reads the student's output.
    """

    summary: nn.Linear | None
    spatial: nn.Linear | None

    def __init__(self, student: Dims, teacher: Dims, token: int = 0, tap_names: Sequence[str] = ()) -> None:
        super().__init__(student, teacher, token, tap_names)

        def head(inputs: int | None, outputs: int | None) -> nn.Linear | None:
            return None if inputs is None or outputs is None else nn.Linear(inputs, outputs)

        self.summary = head(student.summary, teacher.summary)
        self.spatial = head(student.spatial, teacher.spatial)

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        return {"summary": self.summary, "spatial": self.spatial}
