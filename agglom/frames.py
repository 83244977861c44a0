"""The views of one batch of images: the student's, each teacher's, an average's; all the same or each in a frame.

Without shifts everybody sees the same pixels. With shifts (`agglom.shifts`) the images have a margin, and each name has
a window of its own in them; a frame's shift is how far its window lies from the student's, in cells of its grid.
"""

from __future__ import annotations

from torch import Tensor

from agglom.errors import UserError
from agglom.features import InputSpec, resize, sides
from agglom.shifts import ShiftOptions, crop, draw

STUDENT = ""  # the name of the student's own frame


class Frames:
    """Windows into a batch.

    Args:
        images: (B, 3, H, W) in [0, 1]; with shifts they have a margin of `limit` patches on each side.
        spec: the student's input contract.
        resolution: pixels of a side at which the student sees them; None: as they are.
        shift: how windows are drawn; None: everybody sees all of the images.
        key: what the draws follow from, beside the name: step, micro-batch, rank.

    Raises:
        UserError: images without the margin that the shifts need.
    """

    def __init__(
        self,
        images: Tensor,
        spec: InputSpec,
        *,
        resolution: int | None = None,
        shift: ShiftOptions | None = None,
        key: tuple[object, ...] = (),
    ) -> None:
        self.images, self.shift, self.key, self.stride = images, shift, key, spec.stride
        self._drawn: dict[str, Tensor] = {}
        self.resolution = sides(images) if resolution is None else (resolution, resolution)
        if shift is not None:
            margin = 2 * shift.limit * spec.stride
            size = (images.shape[-2] - margin, images.shape[-1] - margin)
            if min(size) < spec.stride or (resolution is not None and size != self.resolution):
                wanted = "images" if resolution is None else f"{self.resolution}"
                raise UserError(
                    f"data.margin: images of {sides(images)} pixels; valid: {margin // 2} pixels on each side of the "
                    f"student's {wanted} (shift.limit {shift.limit} x its stride {spec.stride}); set data.margin"
                )
            self.resolution = size
        self.student = self.view(STUDENT) if shift is not None else resize(images, self.resolution, spec.interpolation)

    def view(self, name: str) -> Tensor:
        """What the teacher `name` sees, (B, 3, h, w): its window, or without shifts the whole images."""
        if self.shift is None:
            return self.images
        corner = (self._draw(name) + self.shift.limit) * self.stride
        return crop(self.images, corner.to(self.images.device, non_blocking=True), self.resolution)

    def offset(self, name: str) -> Tensor | None:
        """(B, 2) cells of the student's grid, down and right, from its frame to that of `name`; None: one frame."""
        if self.shift is None:
            return None
        return (self._draw(name) - self._draw(STUDENT)).to(self.images.device, non_blocking=True)

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What an average of the student called `name` sees, at the student's resolution, and its offset."""
        if self.shift is None or name == STUDENT:
            return self.student, None
        return self.view(name), self.offset(name)

    def _draw(self, name: str) -> Tensor:
        assert self.shift is not None
        if name not in self._drawn:
            self._drawn[name] = draw(self.shift, len(self.images), *self.key, name)
        return self._drawn[name]
