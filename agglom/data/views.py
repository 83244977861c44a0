"""One crop, flip and change of colours of an image: the student and every frozen teacher see the same one.

A view is drawn once a sample, before anybody looks at the image, so that nobody can see another one.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from agglom.data.colours import UNCHANGED, ColourOptions, Recipe, change, draw, pack
from agglom.data.colours import problems as colour_problems
from agglom.data.pictures import Picture
from agglom.errors import UserError


class Window(NamedTuple):
    """A rectangle of an image, in pixels, whether it is mirrored afterwards, and what happens to its colours then."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    colours: Recipe | None = None


class View:
    """Cuts a window out of an image and resizes it to `size` x `size` pixels.

    A subclass says which window, by overriding `window`.

    Args:
        size: height and width of the result, in pixels.

    Attributes:
        colours: how colours change, None for not at all.
        aside: leave them as they are, and let `sample` say what is to happen to them (`colours`, a packed recipe); a
            device then changes whole batches (`colours.change_batch`).
    """

    colours: ColourOptions | None = None
    aside: bool = False

    def __init__(self, *, size: int) -> None:
        if size < 1:
            raise UserError(f"size: {size}; valid: a positive number of pixels")
        self.size = size

    def window(self, height: int, width: int, generator: torch.Generator | None) -> Window:
        """The part of an image of height x width pixels that is seen."""
        raise NotImplementedError

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size). Draws from `generator`, or from torch's global one."""
        return self._image(image, self.window(image.shape[-2], image.shape[-1], generator))

    def cut(self, image: Tensor, window: Window) -> Tensor:
        """The same of a window that was drawn before, bit for bit: uint8 (3, H, W) -> uint8 (3, size, size)."""
        return self._image(image, window)

    def sample(
        self, sample: Mapping[str, Any], generator: torch.Generator | None = None, window: Window | None = None
    ) -> dict[str, Any]:
        """The same for a decoded sample: `image`, `seg` (nearest neighbour) and `boxes` stay on top of each other.

        Args:
            sample: its fields. A `Picture` is decoded here, no larger than the window needs; the window is the same one
                as of the decoded image.
            generator: to draw the window from.
            window: one that was drawn before; nothing is drawn then.
        """
        out = dict(sample)
        pixels = sample.get("image", sample.get("seg"))
        if pixels is None:
            if "boxes" in sample:
                raise UserError("fields: a view of 'boxes' needs 'image' or 'seg' too, for its size")
            return out
        window = window or self.window(pixels.shape[-2], pixels.shape[-1], generator)
        if "image" in sample:
            out["image"] = self._image(sample["image"], window)
        if "seg" in sample:
            out["seg"] = self._seg(sample["seg"], window)
        if "boxes" in sample:
            out["boxes"] = self._boxes(sample["boxes"], window)
        if self.aside and self.colours is not None and "image" in sample:
            out["colours"] = pack(window.colours or UNCHANGED, self.colours, self.size)
        return out

    def _image(self, image: Tensor | Picture, window: Window) -> Tensor:
        recipe = window.colours
        if isinstance(image, Picture):
            image, box = image.part(window[:4], self.size)
            window = Window(*box, window.flip)
        out = self._cut(image, window, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return out if recipe is None or self.aside else change(out, recipe)

    def _seg(self, seg: Tensor, window: Window) -> Tensor:
        return self._cut(seg[None], window, interpolation=InterpolationMode.NEAREST_EXACT)[0]

    def _cut(self, image: Tensor, window: Window, **resize: Any) -> Tensor:
        top, left, height, width, flip = window[:5]
        image = image[..., top : top + height, left : left + width]
        if (height, width) != (self.size, self.size):
            if len(image) == 3:  # the layout in which resizing is fastest, and one for all: it may matter to a bit
                image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
            image = TF.resize(image, [self.size, self.size], **resize)
        return (image.flip(-1) if flip else image).contiguous()

    def _boxes(self, boxes: list[dict[str, Any]], window: Window) -> list[dict[str, Any]]:
        """Boxes clipped to the window, in pixels of the result; those without any area left are gone."""
        kept = []
        for box in boxes:
            x, y, w, h = box["bbox"]
            x0, x1 = (min(max(v - window.left, 0), window.width) for v in (x, x + w))
            y0, y1 = (min(max(v - window.top, 0), window.height) for v in (y, y + h))
            if window.flip:
                x0, x1 = window.width - x1, window.width - x0
            if x1 > x0 and y1 > y0:
                sx, sy = self.size / window.width, self.size / window.height
                kept.append({**box, "bbox": [x0 * sx, y0 * sy, (x1 - x0) * sx, (y1 - y0) * sy]})
        return kept


class EvalView(View):
    """The largest centred square, resized to `size`; an image of that size already comes back untouched."""

    def window(self, height: int, width: int, generator: torch.Generator | None = None) -> Window:
        side = min(height, width)
        return Window((height - side) // 2, (width - side) // 2, side, side)


class TrainView(View):
    """A random resized crop (Szegedy et al. 2015), a random mirror image and random changes of its colours.

    Args:
        size: height and width of the result, in pixels.
        scale: least and greatest part of the image's area that is kept. (1, 1) means no random crop: the largest
            centred square is taken, and an image of the right size is not resampled.
        ratio: least and greatest width / height of the crop; drawn uniformly in its logarithm.
        flip: probability of mirroring left and right.
        colours: how colours and sharpness change; None for not at all.

    Raises:
        UserError: a scale, ratio or probability outside its range.
    """

    TRIES = 10  # crops drawn before giving up on one that fits, as everybody does

    def __init__(
        self,
        *,
        size: int,
        scale: tuple[float, float] = (0.4, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        colours: ColourOptions | None = None,
    ) -> None:
        super().__init__(size=size)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(
                f"view.scale: {tuple(scale)}; valid: 0 < least <= greatest <= 1 (parts of the image's area)"
            )
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"view.ratio: {tuple(ratio)}; valid: 0 < least <= greatest (width / height)")
        if not 0 <= flip <= 1:
            raise UserError(f"view.flip: {flip}; valid: a probability from 0 to 1")
        if colours is not None and (found := list(colour_problems(colours, "view.colours"))):
            raise UserError("; ".join(found))
        self.scale, self.ratio, self.flip, self.colours = tuple(scale), tuple(ratio), flip, colours

    def window(self, height: int, width: int, generator: torch.Generator | None = None) -> Window:
        """The crop, then its colours, all drawn from `generator`; the crop is the same with and without colours."""
        window = self._crop(height, width, generator)
        return window if self.colours is None else window._replace(colours=draw(self.colours, generator))

    def _crop(self, height: int, width: int, generator: torch.Generator | None) -> Window:
        draws = torch.rand(self.TRIES, 4, generator=generator).tolist()
        flip = torch.rand((), generator=generator).item() < self.flip
        if self.scale == (1, 1):
            return EvalView(size=self.size).window(height, width)._replace(flip=flip)
        low, high = (math.log(r) for r in self.ratio)
        for area, aspect, y, x in draws:
            pixels = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Window(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w, flip)
        # nothing fits (a very long image): the largest centred window whose shape is allowed
        w, h = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        return Window((height - h) // 2, (width - w) // 2, h, w, flip)
