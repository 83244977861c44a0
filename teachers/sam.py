"""Segment Anything's image encoder as a teacher."""

from __future__ import annotations

from typing import Any

from agglom.teachers.base import Dtype
from agglom.teachers.sizes import Size
from agglom.teachers.timm import TimmTeacher


class SamTeacher(TimmTeacher):
    """A frozen timm samvit: the 256-channel map after the neck, which SAM's mask decoder reads. No summary.

    It runs at any multiple of its patch: the position embedding is resampled, the relative positions of global blocks
    are interpolated, windows are padded. SAM itself keeps the aspect ratio and pads; here, as with every teacher, the
    view is resized as a whole.

    Args:
        name: a samvit of timm.
        pretrained: load the SA-1B weights. False: random weights.
        checkpoint: a local .safetensors or .pth (weights only) in timm's or in SAM's own layout.
        input_size: pixels, one side or (height, width). None: 1024. "any": no resize, any multiple of the patch.
        kwargs: more arguments for `timm.create_model`.
        dtype: "fp32" or "bf16" (norms stay in fp32).

    Raises:
        UserError: as `TimmTeacher`.
    """

    def __init__(
        self,
        *,
        name: str = "samvit_base_patch16",
        pretrained: bool = True,
        checkpoint: str | None = None,
        input_size: Size = None,
        kwargs: dict[str, Any] | None = None,
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__(
            name=name,
            pretrained=pretrained,
            checkpoint=checkpoint,
            input_size=input_size,
            summary="none",
            kwargs=kwargs,
            dtype=dtype,
        )
