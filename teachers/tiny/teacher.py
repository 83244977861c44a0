"""`tiny:clip`, `tiny:dino` and `tiny:sam` behind the frozen contract, weights from the package itself."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from agglom.errors import UserError, nearest
from agglom.features import Features, InputSpec, TextTower
from agglom.teachers.base import Dtype, Teacher

NAMES = ("clip", "dino", "sam")
Name = Literal["clip", "dino", "sam"]


class TinyTeacher(Teacher):
    """One of the three small ViTs that this project trained on its fashion scenes (64 px, 8 px patches, width 192).

    | name | objective | summary | text |
    |---|---|---|---|
    | clip | pictures against captions | (B, 128), the joint space of pictures and texts | yes |
    | dino | self-distillation, no labels | (B, 192), the mean of the patches | no |
    | sam | point or box to mask | none | no |

    The feature map is (B, 192, 8, 8) for all three. See README.md beside this file for how they were trained and
    what they score.

    Args:
        name: clip, dino or sam.
        pretrained: the shipped weights, or random ones (for tests and for the floor of a comparison).
        dtype: what the image network computes in, "fp32" or "bf16".

    Raises:
        UserError: no such name.
    """

    def __init__(self, name: Name, pretrained: bool = True, *, dtype: Dtype = "fp32") -> None:
        super().__init__()
        if name not in NAMES:
            raise UserError(f"tiny teacher name: {name!r}; {nearest(name, NAMES)}")
        from agglom.teachers.tiny.model import JOINT, PATCH, SIZE, WIDTH, TinyClip, TinyViT

        self.input = InputSpec(mean=(0.5,) * 3, std=(0.5,) * 3, size=(SIZE, SIZE), stride=PATCH)
        self.summary_dim = {"clip": JOINT, "dino": WIDTH, "sam": None}[name]
        self.spatial_dim = WIDTH
        self.name = name
        clip = TinyClip() if name == "clip" else None
        network: nn.Module = clip or TinyViT()
        if pretrained:
            _load(network, name)
            self.source, self.licence = f"tiny:{name}", "Apache-2.0"
        self.freeze(clip.vision if clip else network, dtype=dtype)  # the text tower stays in fp32
        self.network = network

    @property
    def text(self) -> TextTower | None:
        """The text tower of clip, for zero-shot; None for the others."""
        return cast(TextTower, self.network) if self.name == "clip" else None

    def encode(self, pixels: Tensor) -> Features:
        return self.encode_blocks(pixels, 1)[0]

    def encode_blocks(self, pixels: Tensor, count: int) -> tuple[Features, list[Features]]:
        """See Teacher. A block's summary is the mean of its map."""
        vision: Any = self.network.vision if self.name == "clip" else self.network
        _, blocks = vision.forward_intermediates(
            pixels, indices=min(count, len(vision.blocks)), norm=True, output_fmt="NLC"
        )  # (B, 64, 192) each
        grid = self.input.grid((pixels.shape[-2], pixels.shape[-1]))
        last = [Features(x.mean(1), x.transpose(1, 2).unflatten(2, grid)) for x in blocks]
        summary, spatial = last[-1]
        if self.name == "clip":
            return Features(self.network.projection(summary), spatial), last
        return Features(None if self.name == "sam" else summary, spatial), last


def _load(network: nn.Module, name: str) -> None:
    from safetensors.torch import load_file

    with as_file(files("agglom.teachers.tiny") / f"{name}.safetensors") as path:
        halves = load_file(path)
    if next(network.parameters()).is_meta:  # built for a check: shapes only
        return
    with torch.no_grad():
        network.load_state_dict({key: value.float() for key, value in halves.items()})
