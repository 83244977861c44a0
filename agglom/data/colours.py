"""Changes of a view's colours and sharpness: drawn once, applied to a picture in a worker or to a batch on a device.

What is drawn is a *recipe*, eleven numbers that say all that happens to a picture, so that the same picture can be made
again anywhere: factors of brightness, contrast and saturation, a turn of the hue, whether it is grey, the width of a
blur, whether it is solarised, and the order of the first four. The recipe without any change is `UNCHANGED`.

The order is BYOL's (Grill et al. 2020, arXiv 2006.07733, appendix B), as everybody has it since: jitter (its four parts
in random order), grey, blur, solarisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

Recipe = tuple[float, ...]

UNCHANGED: Recipe = (1, 1, 1, 0, 0, 0, 0, 0, 1, 2, 3)
HUE, GREY, SIGMA, SOLARIZE, ORDER = 3, 4, 5, 6, 7  # places in a recipe; before them the three factors
THRESHOLD = 128  # of solarisation, as everybody has it
REACH = 3  # standard deviations of a blur's kernel on each side; 0.3 % of the weight lie outside
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision has them


@dataclass(frozen=True)
class ColourOptions:
    """How the colours of a picture change at random.

    Attributes:
        jitter: probability of colour jitter.
        strengths: of the jitter in brightness, contrast and saturation (a factor from 1 - s to 1 + s) and in hue (a
            turn of -s to s, at most 0.5). 0 leaves one out; hue takes half of the whole time.
        grayscale: probability of taking the colours away.
        blur: probability of a Gaussian blur.
        sigma: least and greatest standard deviation of the blur, in pixels of the view.
        solarize: probability that values from 128 on are inverted.
    """

    jitter: float = 0.0
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


def problems(options: Any, key: str) -> Iterator[str]:
    """What is wrong with the options of `ColourOptions` that an object has, a line each.

    Args:
        options: with the attributes of `ColourOptions`.
        key: where it stands in a configuration.
    """

    def line(name: str, valid: str) -> str:
        value = getattr(options, name)
        return f"{key}.{name}: {list(value) if isinstance(value, (tuple, list)) else value}; valid: {valid}"

    for name in ("jitter", "grayscale", "blur", "solarize"):
        if not 0 <= getattr(options, name) <= 1:
            yield line(name, "a probability from 0 to 1")
    *factors, hue = options.strengths
    if not (all(0 <= strength <= 1 for strength in factors) and 0 <= hue <= 0.5):
        yield line("strengths", "brightness, contrast and saturation from 0 to 1, hue from 0 to 0.5")
    if not 0 < options.sigma[0] <= options.sigma[1] < math.inf:
        yield line("sigma", "0 < least <= greatest (pixels)")


def draw(options: ColourOptions, generator: torch.Generator | None = None) -> Recipe:
    """A recipe, all from `generator` (or torch's global one)."""
    # all are drawn whatever happens, so that one probability can be changed and the rest stays the same
    jitter, grey, blur, inverted, width, *factors = torch.rand(9, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    changes = [
        (2 * factor - 1) * strength if jitter < options.jitter else 0.0
        for factor, strength in zip(factors, options.strengths, strict=True)
    ]
    low, high = options.sigma
    found = (
        *(1 + change for change in changes[:3]), changes[3], grey < options.grayscale,
        low + width * (high - low) if blur < options.blur else 0.0, inverted < options.solarize, *order,
    )  # fmt: skip
    return tuple(torch.tensor(found, dtype=torch.float32).tolist())  # as it is stored and sent to a device


def change(image: Tensor, recipe: Recipe) -> Tensor:
    """uint8 (3, h, w) -> uint8 (3, h, w), as the recipe says. What changes nothing takes no time."""
    for part in map(int, recipe[ORDER:]):
        if part == HUE:
            image = TF.adjust_hue(image, recipe[HUE]) if recipe[HUE] else image
        elif recipe[part] != 1:
            adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[part]
            image = adjust(image, recipe[part])
    if recipe[GREY]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if sigma := recipe[SIGMA]:
        # mirrored edges can't be wider than the image
        width = 2 * min(math.ceil(REACH * sigma), image.shape[-1] - 1) + 1
        # one direction after the other: torchvision would convolve with the whole square
        soft = TF.gaussian_blur(image.float(), [width, 1], [sigma, sigma])
        image = TF.gaussian_blur(soft, [1, width], [sigma, sigma]).round_().to(torch.uint8)
    return TF.solarize(image, THRESHOLD) if recipe[SOLARIZE] else image


def pack(recipe: Recipe, options: ColourOptions, side: int) -> Tensor:
    """A recipe as a batch on a device needs it: float32 (11 + K,), the recipe and its blur's K weights.

    K follows from the options alone, so that the recipes of a batch can be stacked and no size is read on a device.

    Args:
        recipe: see `draw`.
        options: what it was drawn from.
        side: pixels of the picture's side.
    """
    reach = min(math.ceil(REACH * options.sigma[1]), side - 1) if options.blur else 0
    sigma = recipe[SIGMA]
    far = torch.arange(-reach, reach + 1, dtype=torch.float32).abs_()
    weights = torch.exp(-0.5 * (far / max(sigma, 1e-3)) ** 2) * (far <= math.ceil(REACH * sigma))
    return torch.cat([torch.tensor(recipe), weights / weights.sum()])


def change_batch(images: Tensor, packed: Tensor) -> Tensor:
    """The same as `change`, for a batch of any device, without the rounding to 256 steps in between.

    Args:
        images: floats (B, 3, h, w) in [0, 1].
        packed: (B, 11 + K), see `pack`.

    Returns:
        (B, 3, h, w) in [0, 1].
    """
    recipes, weights = packed[:, : len(UNCHANGED)], packed[:, len(UNCHANGED) :]
    column = [recipes[:, place, None, None, None] for place in range(len(UNCHANGED))]
    luma = torch.tensor(LUMA).to(images.device, non_blocking=True).view(3, 1, 1)
    for turn in range(ORDER, len(UNCHANGED)):
        part = column[turn]
        grey = (images * luma).sum(1, keepdim=True)
        # brightness, contrast and saturation: away from black, from the mean grey, from each pixel's grey
        base = torch.where(part == 0, 0, torch.where(part == 1, grey.mean((2, 3), keepdim=True), grey))
        factor = torch.where(part == 0, column[0], torch.where(part == 1, column[1], column[2]))
        blended = torch.lerp(base.expand_as(images), images, factor).clamp(0, 1)
        turned = turn_hue(images, column[HUE])
        still = torch.where(part == HUE, column[HUE] == 0, factor == 1)
        images = torch.where(still, images, torch.where(part == HUE, turned, blended))
    images = torch.where(column[GREY] > 0, (images * luma).sum(1, keepdim=True), images)
    if weights.shape[1] > 1:
        images = torch.where(column[SIGMA] > 0, blur(images, weights), images)
    return torch.where((column[SOLARIZE] > 0) & (images >= THRESHOLD / 255), 1 - images, images)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of (B, 3, h, w) in [0, 1] by so much of a circle (broadcast to (B, 1, h, w)).

    In the hexagonal model a channel is V - (V - least) * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 H) mod 6 and n = 5,
    3, 1 for red, green, blue (Smith 1978, "Color gamut transform pairs").
    """
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = high - low
    red, green, blue = (images[:, c : c + 1] for c in range(3))
    apart = span.clamp_min(1e-12)
    of_green = torch.where(high == green, 2 + (blue - red) / apart, 4 + (red - green) / apart)
    sixth = torch.where(high == red, (green - blue) / apart, of_green) + 6 * turn
    place = torch.tensor((5.0, 3.0, 1.0)).to(images.device, non_blocking=True).view(3, 1, 1)
    k = (place + sixth) % 6
    return high - span * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, weights: Tensor) -> Tensor:
    """Each of (B, C, h, w) with its own row of weights (B, K) along both sides, mirrored at the edges."""
    count, channels, height, width = images.shape
    reach = weights.shape[1] // 2
    kernels = weights.repeat_interleave(channels, 0)[:, None]  # (B * C, 1, K)
    flat = images.reshape(1, count * channels, height, width)
    flat = F.conv2d(F.pad(flat, [reach, reach, 0, 0], "reflect"), kernels[:, :, None], groups=count * channels)
    flat = F.conv2d(F.pad(flat, [0, 0, reach, reach], "reflect"), kernels[..., None], groups=count * channels)
    return flat.reshape(images.shape)
