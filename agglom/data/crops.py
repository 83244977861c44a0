"""Crops of EMA self-distillation, beside the main view: few large ones for the EMA teacher, many small ones.

DINO (Caron et al. 2021, arXiv 2104.14294, "multi-crop" after SwAV) compares crops of different parts and sizes. SILC
(Naeem et al. 2023, arXiv 2310.13355) does so beside another objective, whose images stay without augmentation; so do
frozen teachers here: `agglom.data.views` makes what they share with the student, and only these crops are changed in
colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from agglom.data.views import TrainView
from agglom.errors import UserError


@dataclass(frozen=True)
class CropOptions:
    """Sizes, numbers and augmentation of the crops, and when they begin.

    Each crop is augmented by itself, in this order: colour jitter (brightness, contrast, saturation and hue in random
    order), grey, blur, solarisation. Probabilities and strengths are DINO's, with one simplification: it treats its two
    global crops differently (blur 1.0 and 0.1, solarisation 0 and 0.2), here both have the mean of the two. Local crops
    are blurred with its 0.5 and never solarised.

    Attributes:
        global_size: height and width of global crops, in pixels.
        local_size: height and width of local crops, in pixels.
        global_crops: how many of an image.
        local_crops: how many of an image; may be 0.
        global_scale: least and greatest part of the image's area that a global crop shows.
        local_scale: the same for local crops.
        ratio: least and greatest width / height of a crop before it is resized to a square.
        flip: probability of mirroring left and right.
        jitter: probability of colour jitter.
        strengths: of the jitter in brightness, contrast and saturation (a factor from 1 - s to 1 + s) and in hue (a
            turn of -s to s, at most 0.5). 0 leaves one out; hue takes half of the crops' whole time.
        grayscale: probability of taking the colours away.
        blur: probability of a Gaussian blur.
        sigma: least and greatest standard deviation of the blur, in pixels of the crop.
        solarize: probability that a global crop's values from 128 on are inverted.
        start: the first optimiser step with crops, or, below 1 with a decimal point, a fraction of the run
            (`trainer.max_steps`; the nearest step).
    """

    global_size: int
    local_size: int
    global_crops: int = 2
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.1
    start: int | float = 0

    def first_step(self, max_steps: int | None) -> int:
        """The first optimiser step (0 is a run's first) with crops.

        Args:
            max_steps: optimiser steps of the run; None or -1 where that is open.

        Raises:
            UserError: a fraction of a run without an end.
        """
        if isinstance(self.start, int):
            return self.start
        if max_steps is None or max_steps < 0:
            raise UserError(
                f"data.crops.start: {self.start}; valid: an optimiser step (integer), as trainer.max_steps is not set; "
                "set either"
            )
        return round(self.start * max_steps)


def problems(options: CropOptions) -> Iterator[str]:
    """What is wrong with the options by themselves, a line each, with full keys."""

    def line(name: str, valid: str) -> str:
        value = getattr(options, name)
        return f"data.crops.{name}: {list(value) if isinstance(value, (tuple, list)) else value}; valid: {valid}"

    for name, least in (("global_size", 1), ("local_size", 1), ("global_crops", 1), ("local_crops", 0)):
        if getattr(options, name) < least:
            yield line(name, f"{least} or more")
    for name in ("global_scale", "local_scale"):
        low, high = getattr(options, name)
        if not 0 < low <= high <= 1:
            yield line(name, "0 < least <= greatest <= 1 (parts of the image's area)")
    if options.local_crops > 0:
        if options.local_size > options.global_size:
            yield line("local_size", f"at most global_size {options.global_size}")
        if options.local_scale[1] > options.global_scale[0]:
            yield line("local_scale", f"at most {options.global_scale[0]}, the least of global_scale")
    if not 0 < options.ratio[0] <= options.ratio[1] < math.inf:
        yield line("ratio", "0 < least <= greatest (width / height)")
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        if not 0 <= getattr(options, name) <= 1:
            yield line(name, "a probability from 0 to 1")
    *factors, hue = options.strengths
    if not (all(0 <= strength <= 1 for strength in factors) and 0 <= hue <= 0.5):
        yield line("strengths", "brightness, contrast and saturation from 0 to 1, hue from 0 to 0.5")
    if not 0 < options.sigma[0] <= options.sigma[1] < math.inf:
        yield line("sigma", "0 < least <= greatest (pixels)")
    if not (options.start >= 0 and (isinstance(options.start, int) or options.start < 1)):
        yield line("start", "an optimiser step (integer, 0 or more) or a fraction from 0 to below 1")


class MultiCrop:
    """Global and local crops of one image.

    Args:
        options: see `CropOptions`.

    Raises:
        UserError: options outside their ranges, all of them in one line.
    """

    THRESHOLD = 128  # of solarisation, as everybody has it
    REACH = 3  # standard deviations of a blur's kernel on each side; 0.3% of the weight lie outside

    def __init__(self, options: CropOptions) -> None:
        if found := list(problems(options)):
            raise UserError("; ".join(found))
        self.options = options
        ratio, flip = options.ratio, options.flip
        self.global_view = TrainView(size=options.global_size, scale=options.global_scale, ratio=ratio, flip=flip)
        self.local_view = TrainView(size=options.local_size, scale=options.local_scale, ratio=ratio, flip=flip)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw the crops of an image, all from `generator` (or torch's global one).

        Args:
            image: uint8 (3, H, W), as decoded, in any size.

        Returns:
            "global": uint8 (G, 3, global_size, global_size), "local": uint8 (L, 3, local_size, local_size).
        """
        return {
            "global": self._crops(image, self.global_view, self.options.global_crops, self.options.solarize, generator),
            "local": self._crops(image, self.local_view, self.options.local_crops, 0.0, generator),
        }

    def _crops(
        self, image: Tensor, view: TrainView, number: int, solarize: float, generator: torch.Generator | None
    ) -> Tensor:
        out = image.new_empty(number, 3, view.size, view.size)
        for crop in out:
            crop.copy_(self._augment(view(image, generator), solarize, generator))
        return out

    def _augment(self, crop: Tensor, solarize: float, generator: torch.Generator | None) -> Tensor:
        """uint8 (3, s, s) -> uint8 (3, s, s), changed in colour and sharpness."""
        options = self.options
        # all are drawn whatever happens, so that one probability can be changed and the rest stays the same
        jitter, grayscale, blur, inverted, width, *factors = torch.rand(9, generator=generator).tolist()
        order = torch.randperm(4, generator=generator).tolist()
        if jitter < options.jitter:
            for index in order:
                crop = self._jitter(crop, index, (2 * factors[index] - 1) * options.strengths[index])
        if grayscale < options.grayscale:
            crop = TF.rgb_to_grayscale(crop, num_output_channels=3)
        if blur < options.blur:
            crop = self._blur(crop, options.sigma[0] + width * (options.sigma[1] - options.sigma[0]))
        if inverted < solarize:
            crop = TF.solarize(crop, self.THRESHOLD)
        return crop

    def _jitter(self, crop: Tensor, index: int, change: float) -> Tensor:
        """Brightness, contrast, saturation or hue (0 to 3), changed by so much."""
        if change == 0:
            return crop  # an option of 0; the functions would cost the same as for any other value
        if index == 3:
            return TF.adjust_hue(crop, change)
        return (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[index](crop, 1 + change)

    def _blur(self, crop: Tensor, sigma: float) -> Tensor:
        # mirrored edges can't be wider than the image
        width = 2 * min(math.ceil(self.REACH * sigma), crop.shape[-1] - 1) + 1
        # one direction after the other: torchvision would convolve with the whole square
        soft = TF.gaussian_blur(crop.float(), [width, 1], [sigma, sigma])
        return TF.gaussian_blur(soft, [1, width], [sigma, sigma]).round_().to(torch.uint8)
