"""Train `tiny:dino`: self-distillation from a moving average of itself, with local crops and masked patches, no labels.

    python -m agglom.teachers.tiny.train_dino --data DIR --out DIR --steps 3300

The average looks at two crops of a scene, the student at the same two with patches hidden and at two small ones of the
same place. Three losses: the student's summary picks its scene's summary out of the batch (InfoNCE), the local crops do
so too, and hidden patches are predicted in the average's own feature space. Crops are drawn where colour is strong
(garments are the colourful part of a scene), and what is colourless is painted over in most views, or backgrounds would
be all that is learned. No box, mask, class or caption is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.teachers.tiny.loop import arguments, crop, jitter, pixels, prepare_run, train
from agglom.teachers.tiny.model import SIZE, WIDTH, TinyViT

BATCH, LOCAL, TEMPERATURE = 128, 16, 0.15
HIDDEN = 0.5  # of the patches, in half of the global crops


class SelfDistilled(nn.Module):
    """The network with its training heads: a projection for summaries, predictors for summaries and for patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = TinyViT()
        self.project = nn.Sequential(nn.Linear(WIDTH, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 128))
        self.predict = nn.Sequential(nn.Linear(128, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 128))
        self.patch = nn.Sequential(nn.Linear(WIDTH, 384), nn.GELU(), nn.Linear(384, WIDTH))


def contrast(query: Tensor, keys: Tensor) -> Tensor:
    """Each query (B, D) against the keys (B, D) of all scenes of the batch; its own is the right one."""
    logits = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query)))


def colourfulness(images: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 -> (B, 1, H, W) in 0..1, near 1 where a garment is."""
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    return ((F.avg_pool2d(chroma, 3, 1, 1) - 0.45) / 0.25).clamp(0, 1)


def repaint(images: Tensor, chance: float) -> Tensor:
    """Paint new smooth muted noise under the colourful part of some of the pictures."""
    noise = torch.rand(len(images), 1, 4, 4) * 1.4 - 0.7 + (torch.rand(len(images), 3, 4, 4) - 0.5) * 0.4
    paint = F.interpolate(noise, images.shape[-2:], mode="bilinear", align_corners=False)
    keep = colourfulness(images).maximum((torch.rand(len(images), 1, 1, 1) >= chance).float())
    return keep * images + (1 - keep) * paint


def spots(images: Tensor) -> Tensor:
    """(B, 2) x, y of a place drawn where the picture is colourful."""
    cells = F.avg_pool2d(colourfulness(images), 4).flatten(1) + 1e-3  # (B, 256)
    drawn = torch.multinomial(cells, 1)[:, 0]
    width = images.shape[-1] // 4
    return torch.stack([drawn % width, drawn // width], 1) * 4.0 + 2


def views(images: Tensor, centre: Tensor, size: int, low: float, high: float, wander: float) -> Tensor:
    """One crop a picture, `low`..`high` px wide at about `centre`, resized to `size` px, in other colours."""
    side = low + (high - low) * torch.rand(len(images))
    centre = centre + (torch.rand(len(images), 2) - 0.5) * side[:, None] * wander
    out = crop(repaint(images, 0.7), centre, side, size)
    return jitter(out, hue=0.5, light=0.2, contrast=0.3, grey=0.1)


def main() -> None:
    args = arguments(__doc__)
    scenes = prepare_run(args)

    def loss_of(model: nn.Module, average: nn.Module, progress: float) -> dict[str, Tensor]:
        small = progress < 0.8  # crops of garments at first, whole scenes at the end
        count, size, low, high = (BATCH, 32, 28.0, 50.0) if small else (BATCH // 2, SIZE, 44.0, 64.0)
        images = pixels(scenes.images[torch.randint(len(scenes.images), (count,))])
        centre = spots(images)
        pair = torch.cat([views(images, centre, size, low, high, 0.3) for _ in range(2)])
        local = torch.cat([views(images, centre, LOCAL, 14.0, 28.0, 0.3) for _ in range(2)])
        with torch.no_grad():
            seen = average.vision.tokens(pair)  # (2B, N, C)
            keys = average.project(seen.mean(1))
            target = F.layer_norm(seen, (WIDTH,))
        mask = torch.rand(seen.shape[:2]) < HIDDEN * (torch.rand(len(seen), 1) < 0.5).float()
        tokens = model.vision.tokens(pair, mask)
        summary = model.predict(model.project(tokens.mean(1)))
        detail = model.predict(model.project(model.vision.tokens(local).mean(1)))
        swapped = keys.roll(count, 0)
        return {
            "global": (contrast(summary[:count], swapped[:count]) + contrast(summary[count:], swapped[count:])) / 2,
            "local": (contrast(detail[:count], keys[:count]) + contrast(detail[count:], keys[count:])) / 4,
            "masked": F.smooth_l1_loss(model.patch(tokens[mask]), target[mask], beta=1.0),
        }

    train(SelfDistilled(), loss_of, lambda model: model.vision.state_dict(), name="dino", args=args, momentum=0.996)


if __name__ == "__main__":
    main()
