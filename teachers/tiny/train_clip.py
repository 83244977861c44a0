"""Train `tiny:clip`: pictures and captions into one space, with an open_clip text tower.

    python -m agglom.teachers.tiny.train_clip --data DIR --out DIR --steps 5000

Three contrasts: 32 px crops of single garments with their own phrase, whole scenes with their captions, and in whole
scenes the pooled patches of each box with the phrase of that box. Equal captions are one caption, so they are positives
of each other; half of the batches speak without colours, for colour alone would satisfy the contrast.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.data.garments import CLASSES
from agglom.data.scenes import COLOURS
from agglom.teachers.tiny.loop import Scenes, arguments, crop, jitter, pixels, prepare_run, train
from agglom.teachers.tiny.model import GRID, PATCH, SIZE, TinyClip, tokenize

CROPS, SCENES, REGIONS = 192, 64, 2  # a step sees either that many crops or that many scenes with two regions each
_PHRASE = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(CLASSES)})\b")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)}) ")


class Regions(NamedTuple):
    """Every box whose phrase the caption gives away: its class occurs once in the scene."""

    scene: Tensor  # (R,)
    box: Tensor  # (R, 4) x, y, width, height
    texts: list[str]
    of: list[list[int]]  # scene -> its regions


def regions(scenes: Scenes) -> Regions:
    rows: list[tuple[int, list[int], str]] = []
    of: list[list[int]] = []
    for number, (text, boxes) in enumerate(zip(scenes.texts, scenes.boxes, strict=True)):
        colours: dict[str, list[str]] = {}
        for colour, name in _PHRASE.findall(text):
            colours.setdefault(name, []).append(colour)
        own = [box for box in boxes if len(colours[CLASSES[box[4]]]) == 1]
        of.append([*range(len(rows), len(rows) + len(own))])
        rows += [(number, [*box[:4]], f"{colours[CLASSES[box[4]]][0]} {CLASSES[box[4]]}") for box in own]
    scene, box, texts = zip(*rows, strict=True)
    return Regions(torch.tensor(scene), torch.tensor(box).float(), [*texts], of)


def contrast(model: TinyClip, images: Tensor, texts: list[str]) -> Tensor:
    """Symmetric cross-entropy between pictures (B, 128) and their captions, equal captions counted once."""
    unique = sorted(set(texts))
    index = torch.tensor([unique.index(text) for text in texts])
    words = F.normalize(model.text(tokenize(unique)), dim=-1)  # (U, 128)
    scale = model.logit_scale.exp().clamp(max=50)
    logits = scale * F.normalize(images, dim=-1) @ words.T  # (B, U)
    mine = F.one_hot(index, len(unique)).float().T  # (U, B)
    to_image = -(F.log_softmax(logits.T, -1) * mine).sum(-1) / mine.sum(-1)
    return (F.cross_entropy(logits, index, label_smoothing=0.05) + 0.5 * to_image.mean()) / 1.5


def shorten(texts: list[str], *, first: bool, plain: bool) -> list[str]:
    """Captions cut to their first garment and freed of colour words, as asked."""
    if first:
        texts = [" ".join(_PHRASE.search(text).groups()) for text in texts]  # type: ignore[union-attr]
    return [_COLOUR.sub("", text) for text in texts] if plain else texts


def crop_loss(model: TinyClip, scenes: Scenes, found: Regions) -> dict[str, Tensor]:
    chosen = torch.randint(len(found.texts), (CROPS,))
    box = found.box[chosen]
    longer = box[:, 2:].amax(1)
    side = (longer * (0.95 + 0.5 * torch.rand(CROPS)) + 2).clamp(20, SIZE)
    centre = box[:, :2] + box[:, 2:] / 2 + (torch.rand(CROPS, 2) - 0.5) * side[:, None] * 0.25
    images = crop(pixels(scenes.images[found.scene[chosen]]), centre, side, 32)
    pooled = model.projection(model.vision.tokens(jitter(images)).mean(1))
    plain = bool(torch.rand(()) < 0.5)
    return {"crop": contrast(model, pooled, shorten([found.texts[i] for i in chosen], first=False, plain=plain))}


def scene_loss(model: TinyClip, scenes: Scenes, found: Regions) -> dict[str, Tensor]:
    rows = torch.randint(len(scenes.images), (SCENES,)).tolist()
    tokens = model.vision.tokens(jitter(pixels(scenes.images[rows])))  # (B, 64, C)
    first, plain = torch.rand(()) < 0.6, torch.rand(()) < 0.5
    texts = shorten([scenes.texts[row] for row in rows], first=bool(first), plain=bool(plain))
    losses = {"scene": contrast(model, model.projection(tokens.mean(1)), texts)}
    pairs = [
        (b, found.of[row][int(r * len(found.of[row]))])
        for b, row in enumerate(rows)
        if found.of[row]
        for r in torch.rand(REGIONS).tolist()
    ]
    where, chosen = (torch.tensor(column) for column in zip(*dict.fromkeys(pairs), strict=True))
    pooled = (cover(found.box[chosen])[:, None] @ tokens[where])[:, 0]
    names = shorten([found.texts[i] for i in chosen], first=False, plain=bool(plain))
    return {**losses, "region": contrast(model, model.projection(pooled), names)}


def cover(boxes: Tensor) -> Tensor:
    """(R, 4) boxes -> (R, 64) the share of each patch in the box, summing to 1."""
    edges = torch.arange(GRID) * PATCH
    start, stop = boxes[:, :2, None] - edges, boxes[:, :2, None] + boxes[:, 2:, None] - edges  # (R, 2, GRID)
    length = stop.clamp(0, PATCH) - start.clamp(0, PATCH)
    area = (length[:, 1, :, None] * length[:, 0, None, :]).flatten(1)
    return area / area.sum(1, keepdim=True)


def main() -> None:
    args = arguments(__doc__)
    scenes = prepare_run(args)
    found = regions(scenes)

    def loss_of(model: nn.Module, average: nn.Module, progress: float) -> dict[str, Tensor]:
        # cheap crops teach the classes, whole scenes come in later and have the last word
        share = 0.15 if progress < 0.4 else 0.5 if progress < 0.6 else 1.0
        choose = scene_loss if torch.rand(()) < share else crop_loss
        return choose(model, scenes, found)

    train(TinyClip(), loss_of, lambda model: model.state_dict(), name="clip", args=args)


if __name__ == "__main__":
    main()
