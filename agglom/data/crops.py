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

from agglom.data import colours
from agglom.data.colours import ColourOptions
from agglom.data.views import TrainView
from agglom.errors import UserError


@dataclass(frozen=True)
class CropOptions:
    """Sizes, numbers and augmentation of the crops, and when they begin.

    Each crop's colours change by themselves (`ColourOptions`). Probabilities and strengths are DINO's, with one
    simplification: it treats its two global crops differently (blur 1.0 and 0.1, solarisation 0 and 0.2), here both
    have the mean of the two. Local crops are blurred with its 0.5 and never solarised.

    Attributes:
        global_size: height and width of global crops, in pixels.
        local_size: height and width of local crops, in pixels.
        global_crops: how many of an image.
        local_crops: how many of an image; may be 0.
        global_scale: least and greatest part of the image's area that a global crop shows.
        local_scale: the same for local crops.
        ratio: least and greatest width / height of a crop before it is resized to a square.
        flip: probability of mirroring left and right.
        jitter, strengths, grayscale, blur, sigma: see `ColourOptions`.
        solarize: the same, of global crops alone.
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
    if not 0 <= options.flip <= 1:
        yield line("flip", "a probability from 0 to 1")
    yield from colours.problems(options, "data.crops")
    if not (options.start >= 0 and (isinstance(options.start, int) or options.start < 1)):
        yield line("start", "an optimiser step (integer, 0 or more) or a fraction from 0 to below 1")


class MultiCrop:
    """Global and local crops of one image.

    Args:
        options: see `CropOptions`.

    Attributes:
        aside: leave the colours as they are and say what is to happen to them; a device then changes whole batches
            (`colours.change_batch`).

    Raises:
        UserError: options outside their ranges, all of them in one line.
    """

    def __init__(self, options: CropOptions) -> None:
        if found := list(problems(options)):
            raise UserError("; ".join(found))
        self.options, self.aside = options, False
        ratio, flip = options.ratio, options.flip
        self.global_view = TrainView(size=options.global_size, scale=options.global_scale, ratio=ratio, flip=flip)
        self.local_view = TrainView(size=options.local_size, scale=options.local_scale, ratio=ratio, flip=flip)
        self.global_colours, self.local_colours = (
            ColourOptions(
                jitter=options.jitter, strengths=options.strengths, grayscale=options.grayscale, blur=options.blur,
                sigma=options.sigma, solarize=solarize,
            )
            for solarize in (options.solarize, 0.0)
        )  # fmt: skip

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw the crops of an image, all from `generator` (or torch's global one).

        Args:
            image: uint8 (3, H, W), as decoded, in any size.

        Returns:
            "global": uint8 (G, 3, global_size, global_size), "local": uint8 (L, 3, local_size, local_size); with
            `aside` also "global_colours" and "local_colours", packed recipes (`colours.pack`).
        """
        options = self.options
        return {
            **self._crops("global", image, self.global_view, options.global_crops, self.global_colours, generator),
            **self._crops("local", image, self.local_view, options.local_crops, self.local_colours, generator),
        }

    def _crops(
        self, kind: str, image: Tensor, view: TrainView, number: int, options: ColourOptions,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        out = {kind: image.new_empty(number, 3, view.size, view.size)}
        recipes = []
        for crop in out[kind]:
            cut = view(image, generator)
            recipes.append(colours.draw(options, generator))
            crop.copy_(cut if self.aside else colours.change(cut, recipes[-1]))
        if self.aside and number:
            packed = [colours.pack(recipe, options, view.size) for recipe in recipes]
            out[f"{kind}_colours"] = torch.stack(packed)
        return out
