"""Train `tiny:sam`: a point or a box -> the mask of the garment there, whatever its class, through patch features.

python -m agglom.teachers.tiny.train_sam --data DIR --out DIR --steps 2600
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.teachers.tiny.loop import Scenes, arguments, jitter, pixels, prepare_run, train
from agglom.teachers.tiny.model import GRID, PATCH, SIZE, WIDTH, TinyViT

BATCH, PROMPTS, DEPTH = 32, 3, 32  # scenes a step, prompts a scene, width of a pixel's embedding
FINE = SIZE // 2  # masks are compared at half resolution


class Prompted(nn.Module):
    """A prompt picks patch features, which become a query; a pixel is in the mask where its embedding answers it."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = TinyViT()
        self.pixel = nn.Linear(WIDTH, DEPTH * (FINE // GRID) ** 2)
        self.query = nn.Sequential(nn.Linear(WIDTH + 5, WIDTH), nn.GELU(), nn.Linear(WIDTH, DEPTH + 1))

    def forward(self, images: Tensor, weights: Tensor, where: Tensor) -> Tensor:
        """images (B, 3, 64, 64); weights (B, P, 64) over patches; where (B, P, 5) -> logits (B, P, 32, 32)."""
        tokens = self.vision.tokens(images)
        pixel = self.pixel(tokens).transpose(1, 2).unflatten(2, (GRID, GRID))
        pixel = F.pixel_shuffle(pixel, FINE // GRID)  # (B, DEPTH, 32, 32)
        query = self.query(torch.cat([weights @ tokens, where], -1))  # (B, P, DEPTH + 1)
        logits = torch.einsum("bpd,bdhw->bphw", query[..., :-1], pixel) / DEPTH**0.5
        return logits + query[..., -1:, None]


def prompts(scenes: Scenes, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """For scenes `rows`: masks (B, P, 32, 32), patch weights (B, P, 64) and coordinates (B, P, 5) of random prompts.

    A garment's mask is its class inside its box. Half of the prompts are boxes, half are points inside the mask.
    """
    masks = torch.zeros(len(rows), PROMPTS, SIZE, SIZE)
    weights = torch.zeros(len(rows), PROMPTS, GRID, GRID)
    where = torch.zeros(len(rows), PROMPTS, 5)
    pick = torch.rand(len(rows), PROMPTS, 3).tolist()
    for b, row in enumerate(rows):
        for p in range(PROMPTS):
            chosen, kind, place = pick[b][p]
            x, y, w, h, label = scenes.boxes[row][int(chosen * len(scenes.boxes[row]))]
            mask = masks[b, p]
            mask[y : y + h, x : x + w] = scenes.seg[row, y : y + h, x : x + w] == label + 1
            if kind < 0.5:
                inside = mask.flatten().nonzero()[:, 0]
                spot = int(inside[int(place * len(inside))])
                x, y, w, h = spot % SIZE, spot // SIZE, 1, 1
            weights[b, p] = _cover(y, h)[:, None] * _cover(x, w)
            where[b, p] = torch.tensor([x / SIZE, y / SIZE, (x + w) / SIZE, (y + h) / SIZE, float(kind < 0.5)])
    weights = weights.flatten(2)
    return F.avg_pool2d(masks, SIZE // FINE), weights / weights.sum(-1, keepdim=True), where * 2 - 1


def _cover(start: int, length: int) -> Tensor:
    """(GRID,) pixels of each patch row between start and start + length."""
    edges = torch.arange(GRID) * PATCH
    return ((start + length - edges).clamp(0, PATCH) - (start - edges).clamp(0, PATCH)).float()


def mask_loss(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy and dice, a mean over prompts."""
    chance = logits.sigmoid()
    shared, total = (chance * masks).sum((-2, -1)), (chance + masks).sum((-2, -1))
    return {
        "bce": F.binary_cross_entropy_with_logits(logits, masks) * 4,
        "dice": (1 - (2 * shared + 1) / (total + 1)).mean(),
    }


def main() -> None:
    args = arguments(__doc__)
    scenes = prepare_run(args)

    def loss_of(model: nn.Module, average: nn.Module, progress: float) -> dict[str, Tensor]:
        rows = torch.randint(len(scenes.images), (BATCH,))
        masks, weights, where = prompts(scenes, rows.tolist())
        images = jitter(pixels(scenes.images[rows]), hue=0.1)
        return mask_loss(model(images, weights, where), masks)

    train(Prompted(), loss_of, lambda model: model.vision.state_dict(), name="sam", args=args)


if __name__ == "__main__":
    main()
