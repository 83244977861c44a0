"""Encoded pictures to pixels: all of them, or of a JPEG no more than a view needs.

A JPEG is stored as transforms of 8 x 8 pixels, and its decoder can leave out their high frequencies: at half, a quarter
or an eighth of the size it is faster, and what comes after has less to do. torchvision's decoder is the fastest at full
size but can't do this; PIL's can (`Image.draft`). Both are libjpeg-turbo and agree on every bit at full size.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from agglom.data.index import FORMATS

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

REDUCTIONS = (8, 4, 2)  # for which the decoder has fast code
# EXIF orientations (2 to 8) whose upright picture begins where the stored one ends
FROM_RIGHT, FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)
TURNED = (5, 6, 7, 8)  # its rows are the stored columns


def open_picture(data: bytes) -> Image.Image:
    """PIL's image, of which nothing but the header has been read.

    Raises:
        TooLarge: more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970), found out before any is decoded.
        ValueError: no picture of one of `FORMATS`.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its message names a buffer in memory
        raise ValueError(f"{len(data)} bytes that are no picture; valid: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as err:
        raise TooLarge(str(err).partition(", could")[0]) from None


def decode_image(data: bytes) -> Tensor:
    """Encoded image -> uint8 (3, H, W) RGB: upright by its EXIF tag, transparency over white, 16 bits brought to 8.

    It may lie in memory as (H, W, 3), as decoders leave it.
    """
    with open_picture(data) as image:
        pixels = _decode_plain(data) if _is_plain(image) else None
        return _pixels(image) if pixels is None else pixels


class TooLarge(ValueError):
    """A picture of more pixels than is ever decoded."""


class Broken(Exception):
    """A picture whose header could be read and whose pixels can't."""


class Picture:
    """A JPEG of which only the header has been read.

    Args:
        data: the encoded picture.

    Attributes:
        shape: (3, height, width) of the whole picture, upright.

    Raises:
        Exception: whatever PIL raises at a broken header.
    """

    def __init__(self, data: bytes) -> None:
        with open_picture(data) as image:
            self._plain, self._orientation = _is_plain(image), _orientation(image)
            width, height = image.size
        self._data = data
        self.shape = (3, width, height) if self._orientation in TURNED else (3, height, width)

    def part(self, box: Box, size: int) -> tuple[Tensor, Box]:
        """What is needed to show a box of the picture at size x size pixels.

        Args:
            box: of the whole picture.
            size: height and width of what will be made of it.

        Returns:
            uint8 (3, h, w), the picture in full or reduced (`reduction`), and where the box lies in it, to the nearest
            of its pixels.

        Raises:
            Broken: what the decoder says of broken bytes.
        """
        by = reduction(box, size)
        try:
            pixels = self._whole() if by == 1 else self._reduced(by)
        except Exception as err:
            raise Broken(str(err)) from err
        if by == 1:
            return pixels, box
        # the last pixel of a stored row or column may stand for less than the others; upright it may be the first one
        before_left = -self.shape[2] % by if self._orientation in FROM_RIGHT else 0
        before_top = -self.shape[1] % by if self._orientation in FROM_BOTTOM else 0
        top, left, height, width = box
        top, bottom = (_rounded(y + before_top, by) for y in (top, top + height))
        left, right = (_rounded(x + before_left, by) for x in (left, left + width))
        return pixels, (top, left, bottom - top, right - left)

    def _whole(self) -> Tensor:
        pixels = _decode_plain(self._data) if self._plain else None
        return decode_image(self._data) if pixels is None else pixels

    def _reduced(self, by: int) -> Tensor:
        with open_picture(self._data) as image:
            image.draft(None, (image.width // by, image.height // by))
            return _pixels(image)


def reduction(box: Box, size: int) -> int:
    """The greatest of 8, 4, 2 and 1 by which a box may be reduced and still have size x size pixels."""
    return next((by for by in REDUCTIONS if min(box[2:]) // by >= size), 1)


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG does."""
    return data.startswith(b"\xff\xd8\xff")


def _is_plain(image: Image.Image) -> bool:
    """Whether torchvision reads it as PIL does: not in CMYK, and it doesn't know of orientations."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1


def _decode_plain(data: bytes) -> Tensor | None:
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None  # PIL says better what is wrong


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _rounded(value: int, by: int) -> int:
    """value / by to the nearest integer, halves upwards: so no distance shrinks below its own floor."""
    return (value + by // 2) // by


def _pixels(image: Image.Image) -> Tensor:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
