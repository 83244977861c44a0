"""The network of the tiny zoo: a ViT of 1.7 M parameters for 64 px, on timm's own blocks, and clip's text tower."""

from __future__ import annotations

import re
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from agglom.errors import UserError

SIZE, PATCH, WIDTH, JOINT = 64, 8, 192, 128
GRID = SIZE // PATCH


class ConvStem(nn.Module):
    """Three strided convolutions in the place of the patch embedding: (B, 3, H, W) -> (B, H/8, W/8, C).

    A plain 8x8 projection leaves so small and short-trained a network at chance on classes.
    """

    def __init__(self, *, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **unused: Any) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 32, 3, 2, 1, bias=False),
            nn.GroupNorm(4, 32),
            nn.GELU(),
            nn.Conv2d(32, 96, 3, 2, 1, bias=False),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, embed_dim, 3, 2, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).permute(0, 2, 3, 1)


class TinyViT(VisionTransformer):
    """Width 192, four blocks, 8 px patches, no class token; takes images of up to 64 px.

    An image smaller than 64 px is a window of the position table: a crop keeps the scale of the whole scene.
    """

    def __init__(self) -> None:
        super().__init__(
            img_size=SIZE,
            patch_size=PATCH,
            num_classes=0,
            global_pool="avg",
            fc_norm=False,  # the final norm on every token, so that summary and feature map are one space
            embed_dim=WIDTH,
            depth=4,
            num_heads=3,
            mlp_ratio=3.0,
            class_token=False,
            embed_layer=ConvStem,
        )
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.pos_embed.data = build_sincos2d_pos_embed([GRID, GRID], dim=WIDTH)[None] * 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for block in self.blocks:
            block.attn.fused_attn = False  # the plain form trains faster on CPUs at 64 tokens

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h*w, C) with positions of a window of the table (a random one while training)."""
        height, width = x.shape[1:3]
        if max(height, width) > GRID:
            raise ValueError(f"a grid of {height}x{width} cells; at most {GRID}x{GRID}")
        top, left = (GRID - height) // 2, (GRID - width) // 2
        if self.training:
            top, left = (int(torch.randint(GRID - n + 1, ())) for n in (height, width))
        table = self.pos_embed.view(1, GRID, GRID, -1)
        return (x + table[:, top : top + height, left : left + width]).flatten(1, 2)

    def tokens(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised pixels (B, 3, H, W) -> (B, h*w, C). True cells of mask (B, h*w) are hidden from the blocks."""
        x = self.patch_embed(pixels)  # (B, h, w, C)
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:3], 1), self.mask_token, x)
        return self.norm(self.blocks(self._pos_embed(x)))


class TinyClip(nn.Module):
    """`vision` with a projection and an open_clip text tower into one space of 128 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer  # heavy: only clip pays for it

        self.vision = TinyViT()
        self.projection = nn.Linear(WIDTH, JOINT, bias=False)
        self.text = TextTransformer(
            context_length=CONTEXT, vocab_size=len(VOCABULARY) + 2, width=96, heads=4, layers=2, output_dim=JOINT
        )
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, 128) L2-normalised embeddings of captions in the vocabulary of the fashion scenes."""
        device = self.projection.weight.device
        return F.normalize(self.text(tokenize(texts).to(device)).float(), dim=-1)

    @property
    def scale_and_bias(self) -> tuple[float, float]:
        """Cosine -> logit, as in training: the inverse temperature, and no bias."""
        return float(self.logit_scale.detach().exp()), 0.0

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(N, 20) word numbers, see the function."""
        return tokenize(texts)

    def network(self) -> nn.Module:
        """The text tower as a module, word numbers (N, 20) -> (N, 128), not normalised; it shares its weights."""
        return self.text


CONTEXT = 20
VOCABULARY = (
    "red orange yellow green cyan blue purple pink "
    "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle boot "
    "photo of left right above below in front behind with and"
).split()
_NUMBER = {word: number for number, word in enumerate(VOCABULARY, start=1)}  # 0 pads, the highest ends a text


def tokenize(texts: Sequence[str]) -> Tensor:
    """Texts -> (N, 20) word numbers. Articles and punctuation don't count.

    Raises:
        UserError: a word that the text tower never saw, or too long a text.
    """
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        words = [word for word in re.findall(r"[a-z][a-z-]*", text.lower()) if word not in ("a", "an", "the")]
        unknown = [word for word in words if word not in _NUMBER]
        if unknown:
            raise UserError(
                f"tiny:clip does not know the word {unknown[0]!r} of {text!r}; valid: {', '.join(VOCABULARY)}"
            )
        if len(words) >= CONTEXT:
            raise UserError(f"tiny:clip takes at most {CONTEXT - 1} words, not the {len(words)} of {text!r}")
        row[: len(words) + 1] = torch.tensor([*(_NUMBER[word] for word in words), len(VOCABULARY) + 1])
    return rows
