"""Cropped position embeddings (CPE): while training, every sample sees another window of the learned grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from agglom.errors import UserError

MIN_SCALE = math.sqrt(0.1)  # of a crop's side; a tenth of the grid's area
MAX_LOG_ASPECT = math.log(4 / 3)  # of width / height, either way
DROP_RATE = 0.1  # share of the samples that see no patch positions at all


def draw_crops(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random windows (count, 4): top, left, height, width, as shares of the grid; all within it.

    Scale ~ U(sqrt(0.1), 1) and log aspect ~ U(log 3/4, log 4/3) give height and width (at most 1), the offset is
    uniform in what they leave.
    """
    scale = MIN_SCALE + (1 - MIN_SCALE) * torch.rand(count, device=device)
    aspect = torch.exp(MAX_LOG_ASPECT * (2 * torch.rand(count, device=device) - 1))
    extent = torch.stack([scale / aspect, scale * aspect], 1).clamp_(max=1)
    return torch.cat([torch.rand(count, 2, device=device) * (1 - extent), extent], 1)


def crop_grid(grid: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear samples of windows of one grid.

    Args:
        grid: (Gh, Gw, D).
        crops: (B, 4) top, left, height, width as shares of the grid; its corner cells are at 0 and 1.
        size: (H, W) cells that each window is sampled at, its corners included.

    Returns:
        (B, H * W, D) in the grid's dtype.
    """
    start, extent = crops.float().chunk(2, 1)
    height, width = size
    y = start[:, :1] + extent[:, :1] * torch.linspace(0, 1, height, device=grid.device)  # (B, H)
    x = start[:, 1:] + extent[:, 1:] * torch.linspace(0, 1, width, device=grid.device)  # (B, W)
    places = torch.stack(
        [x.unsqueeze(1).expand(-1, height, -1), y.unsqueeze(2).expand(-1, -1, width)], -1
    )  # (B, H, W, 2)
    # The windows lie below each other in one image: B copies of the grid would need B gradients of its size.
    cells = F.grid_sample(
        grid.float().permute(2, 0, 1).unsqueeze(0),  # (1, D, Gh, Gw)
        2 * places.flatten(0, 1).unsqueeze(0) - 1,  # (1, B * H, W, 2)
        mode="bilinear",
        padding_mode="border",  # rounding may step over the edge
        align_corners=True,
    )
    return cells[0].unflatten(1, (len(crops), height)).flatten(2).permute(1, 2, 0).to(grid.dtype)


class CroppedViT(VisionTransformer):
    """timm's ViT which, in training mode, adds a random window of its position grid to each sample's patches.

    Same parameters, arguments and export as the parent's, whose own path it takes in evaluation mode.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (B, H, W, D) -> prefix tokens and patches (B, P + H * W, D) with their positions."""
        if not self.training:
            return super()._pos_embed(x)
        assert self.pos_embed is not None
        count, height, width, _ = x.shape
        own = 0 if self.no_embed_class else self.num_prefix_tokens  # prefix tokens with a position of their own
        first, grid = self.pos_embed[:, :own], self.pos_embed[0, own:].unflatten(0, self.patch_embed.grid_size)
        cropped = crop_grid(grid, draw_crops(count, x.device), (height, width))
        kept = torch.rand(count, 1, 1, device=x.device) >= DROP_RATE
        x = x.flatten(1, 2) + cropped.masked_fill(~kept, 0)
        prefix: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            tokens = torch.cat(prefix, 1)
            x = torch.cat([(tokens + first if own else tokens).expand(count, -1, -1), x], 1)
        return self.pos_drop(x)


def crop_positions(backbone: nn.Module, name: str) -> None:
    """Make a timm ViT crop its positions, in place.

    By its class, so that a copy (the averaged weights are one) crops its own positions: a method bound to this
    instance could hold on to this instance's.

    Raises:
        UserError: another class than timm's VisionTransformer, or one without learned positions or a free size.
    """
    if type(backbone) is not VisionTransformer or backbone.pos_embed is None:
        raise UserError(
            f"student.cropped_positions: true, but {name} ({type(backbone).__name__}) has no plain grid of learned "
            f"absolute positions; valid: false, or a timm VisionTransformer with pos_embed: learn; remove the key"
        )
    if not backbone.dynamic_img_size:
        raise UserError(
            "student.cropped_positions: true with kwargs.dynamic_img_size: false; valid: true, for a grid that "
            "serves every size; remove kwargs.dynamic_img_size"
        )
    backbone.__class__ = CroppedViT
