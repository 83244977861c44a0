"""Image-text contrast: each image against the captions of all ranks, each caption against their images.

An image and the equal caption of another one are neither a positive nor a negative pair: they are left out of the sums,
and so is all that has to do with an image without a caption. What is summed over is gathered with its gradient, so the
mean of the ranks' losses, and the mean of their gradients, are those of one rank with all of their images. Everything
is float32 (float64 if the input is), whatever autocast says.

Sources: CLIP (2103.00020) for the softmax, SigLIP (2303.15343) for the sigmoid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from agglom.objectives.base import widen
from agglom.objectives.pointwise import EPS
from agglom.targets.moments import no_autocast


class Pairs(NamedTuple):
    """B images of this rank and their captions against all N of the group.

    Attributes:
        image_text: (B, N) cosines of this rank's images and all captions.
        text_image: (B, N) cosines of this rank's captions and all images.
        own: (B,) int64, the column of each row's own pair.
        ignored: (B, N) bool, pairs that are left out; never the own one.
        counts: (B,) bool, whether the image has a caption; its loss is 0 otherwise.
    """

    image_text: Tensor
    text_image: Tensor
    own: Tensor
    ignored: Tensor
    counts: Tensor


def pairs(images: Tensor, texts: Tensor, codes: Tensor, counts: Tensor, *, group: Any = None) -> Pairs:
    """Compare a rank's images and captions with those of all ranks.

    Args:
        images: (B, D) embeddings of any length; the same B on every rank.
        texts: (B, D) embeddings of their captions.
        codes: (B,) int64, equal where captions are.
        counts: (B,) bool, whether there is a caption.
        group: a process group; None is all ranks.

    Raises:
        ValueError: the shapes don't fit.
    """
    given = [tuple(x.shape) for x in (images, texts, codes, counts)]
    if images.ndim != 2 or images.shape != texts.shape or not given[2] == given[3] == given[0][:1]:
        raise ValueError(f"images and texts (B, D), codes and counts (B,) wanted, got {given}")
    with no_autocast(images.device):
        images, texts = (F.normalize(widen(x), dim=1, eps=EPS) for x in (images, texts))
        own = torch.arange(len(codes), device=codes.device)
        everything: tuple[Tensor, ...] = (images, texts, codes, counts.to(codes.dtype))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            group = group or dist.group.WORLD
            own = own + dist.get_rank(group) * len(codes)
            everything = tuple(torch.cat(all_gather(x, group)) for x in everything)
        all_images, all_texts, all_codes, all_count = everything
        ignored = ((codes[:, None] == all_codes) | (all_count == 0)).scatter(1, own[:, None], False)
        return Pairs(images @ all_texts.T, texts @ all_images.T, own, ignored, counts)


def softmax_contrast(found: Pairs, scale: Tensor) -> Tensor:
    """Mean of two cross entropies: of an image over the captions, and of its caption over the images.

    Args:
        found: see `pairs`.
        scale: () 1 / temperature.

    Returns:
        (B,); 0 where all captions are equal.
    """
    sides = [(scale * x).masked_fill(found.ignored, -torch.inf) for x in (found.image_text, found.text_image)]
    both = torch.stack([F.cross_entropy(x, found.own, reduction="none") for x in sides])
    return both.mean(0).masked_fill(~found.counts, 0)


def sigmoid_contrast(found: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
    """Each pair by itself: -log sigmoid(z) of an image and its own caption, -log sigmoid(-z) of other captions, summed.

    Args:
        found: see `pairs`.
        scale: () 1 / temperature.
        bias: () added to the scaled cosines, z.

    Returns:
        (B,) sums over the N captions.
    """
    logits = scale * found.image_text + bias
    wanted = torch.full_like(logits, -1).scatter(1, found.own[:, None], 1)
    each = -F.logsigmoid(wanted * logits).masked_fill(found.ignored, 0)
    return each.sum(1).masked_fill(~found.counts, 0)


@torch.no_grad()
def own_caption_nearest(found: Pairs) -> Tensor:
    """() share of the images with a caption to which no other caption is nearer than their own."""
    cosines = found.image_text.masked_fill(found.ignored, -torch.inf)
    right = (cosines.argmax(1) == found.own) & found.counts
    return right.sum() / found.counts.sum().clamp(min=1)
