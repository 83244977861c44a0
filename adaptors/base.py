"""What every adaptor promises."""

from __future__ import annotations

from typing import Sequence

from torch import nn

from agglom.features import Features, StudentFeatures


class Adaptor(nn.Module):
    """Maps a student's features into one teacher's space.

    Built as `SomeAdaptor(student_dims, teacher_dims, token=k, **options)`, where `token` says which of the student's
    K summary tokens is this teacher's.

    Attributes:
        taps: names of the student blocks that it reads beside the last one.
    """

    taps: Sequence[str] = ()

    def forward(self, student: StudentFeatures, grid: tuple[int, int] | None = None) -> Features:
        """Predict the teacher's features.

        Args:
            student: the student's features.
            grid: (H, W) of the teacher's map; the head runs at the student's grid and its output is aligned to this
                one. None keeps the student's grid.

        Returns:
            summary (B, D_t) or None, spatial (B, C_t, H, W) or None.
        """
        raise NotImplementedError
