"""Score the tiny zoo, or files of a training in progress, against a random ViT; small probes of their own.

    python -m agglom.teachers.tiny.score --data DIR --split test [--weights DIR] [--out scores.json]

| probe | what | metric, % |
|---|---|---|
| knn, linear | dominant class from the summary (sam, which has none: mean of the patches) | top-1 |
| zeroshot | dominant class from texts | top-1 |
| segmentation | ridge regression from a patch to its share of each class, bilinear to 64 px | mIoU of 11 classes |
| figure | ridge regression from a patch to its 64 pixels, garment or not | IoU |
| copies | a scene among the split's first 1,000 from a cropped, recoloured, mirrored copy | recall at 1 |
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from agglom.data.garments import CLASSES
from agglom.data.scenes import PROMPTS
from agglom.features import Features
from agglom.teachers.tiny.loop import Scenes, crop, jitter, load_scenes, pixels
from agglom.teachers.tiny.model import GRID, PATCH, SIZE
from agglom.teachers.tiny.teacher import NAMES, TinyTeacher

TRAIN, COPIES = 4000, 1000


def extract(teacher: TinyTeacher, images: Tensor) -> Features:
    """images (N, 3, 64, 64) in 0..1; a model without summary is given the mean of its patches."""
    parts = [teacher(part) for part in images.split(250)]
    spatial = torch.cat([part.spatial for part in parts])
    has = parts[0].summary is not None
    return Features(torch.cat([part.summary for part in parts]) if has else spatial.mean((2, 3)), spatial)


def knn(train: Tensor, classes: Tensor, test: Tensor, wanted: Tensor, k: int = 20) -> float:
    similar, rows = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(k, dim=1)
    votes = torch.zeros(len(test), len(CLASSES)).scatter_add_(1, classes[rows], (similar / 0.07).softmax(1))
    return percent(votes.argmax(1) == wanted)


def linear(train: Tensor, classes: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Logistic regression; its strength is chosen on the last quarter of the training scenes."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, z, y = ((train - mean) / std).numpy(), ((test - mean) / std).numpy(), classes.numpy()
    cut = len(x) * 3 // 4
    fits = {
        c: LogisticRegression(C=c, max_iter=300).fit(x[:cut], y[:cut]).score(x[cut:], y[cut:])
        for c in (0.003, 0.03, 0.3)
    }
    best = max(fits, key=lambda c: fits[c])
    return percent(torch.from_numpy(LogisticRegression(C=best, max_iter=300).fit(x, y).predict(z)) == wanted)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) and (N, K) -> (D + 1, K): least squares with a bias and a little decay."""
    x = F.pad(x, (0, 1), value=1.0).double()
    gram = x.T @ x
    return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y.double()).float()


def patches(spatial: Tensor) -> Tensor:
    return spatial.permute(0, 2, 3, 1).flatten(0, 2)  # (N * 64, C)


def segmentation(train: Features, seg: Tensor, test: Features, wanted: Tensor) -> float:
    count = len(CLASSES) + 1
    shares = F.avg_pool2d(F.one_hot(seg.long(), count).permute(0, 3, 1, 2).float(), PATCH)
    answer = F.pad(patches(test.spatial), (0, 1), value=1.0) @ ridge(patches(train.spatial), patches(shares))
    answer = answer.view(-1, GRID, GRID, count).permute(0, 3, 1, 2)
    guess = F.interpolate(answer, SIZE, mode="bilinear", align_corners=False).argmax(1)
    cells = torch.bincount((wanted.long() * count + guess).flatten(), minlength=count * count).view(count, count)
    return 100 * (cells.diagonal() / (cells.sum(0) + cells.sum(1) - cells.diagonal())).mean().item()


def figure(train: Features, seg: Tensor, test: Features, wanted: Tensor) -> float:
    target = patches(F.pixel_unshuffle((seg > 0).float()[:, None], PATCH))
    answer = F.pad(patches(test.spatial), (0, 1), value=1.0) @ ridge(patches(train.spatial), target)
    mask = F.pixel_shuffle(answer.view(-1, GRID, GRID, PATCH**2).permute(0, 3, 1, 2), PATCH)[:, 0] > 0.5
    truth = wanted > 0
    return 100 * ((mask & truth).sum() / (mask | truth).sum()).item()


def copied(images: Tensor) -> Tensor:
    """uint8 scenes -> their altered copies, floats in 0..1, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        side, centre = 44 + 16 * torch.rand(len(images)), SIZE / 2 + 20 * (torch.rand(len(images), 2) - 0.5)
        return jitter(crop(pixels(images), centre, side, SIZE), hue=0.5, light=0.2, contrast=0.3) / 2 + 0.5


def score(teacher: TinyTeacher, train: Scenes, test: Scenes) -> dict[str, float]:
    inside, outside = extract(teacher, train.images.float() / 255), extract(teacher, test.images.float() / 255)
    labels = train.classes, test.classes
    copies = F.normalize(extract(teacher, copied(test.images[:COPIES])).summary, dim=1)
    found = (copies @ F.normalize(outside.summary[:COPIES], dim=1).T).argmax(1)
    scores = {
        "knn": knn(inside.summary, labels[0], outside.summary, labels[1]),
        "linear": linear(inside.summary, labels[0], outside.summary, labels[1]),
        "segmentation": segmentation(inside, train.seg, outside, test.seg),
        "figure": figure(inside, train.seg, outside, test.seg),
        "copies": percent(found == torch.arange(len(found))),
    }
    if teacher.text is not None and teacher.source != "random":
        words = teacher.text.encode_text([prompt.format(name) for name in CLASSES for prompt in PROMPTS])
        words = words.view(len(CLASSES), len(PROMPTS), -1).mean(1)
        scores["zeroshot"] = percent((outside.summary @ F.normalize(words, dim=1).T).argmax(1) == labels[1])
    return {key: round(value, 1) for key, value in scores.items()}


def percent(right: Tensor) -> float:
    return 100 * right.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val", choices=["val", "test"])
    parser.add_argument(
        "--weights", type=Path, help="folder with NAME.safetensors to score instead of the shipped ones"
    )
    parser.add_argument("--out", type=Path, help="write the scores here as JSON")
    parser.add_argument("--only", nargs="*", default=[*NAMES, "random"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = load_scenes(args.data, "train"), load_scenes(args.data, args.split)
    train = Scenes(*(column[:TRAIN] for column in train))
    table = {}
    for name in args.only:
        torch.manual_seed(0)
        teacher = TinyTeacher(
            "dino" if name == "random" else name, pretrained=name != "random" and args.weights is None
        )
        if args.weights is not None and name != "random":
            file = args.weights / f"{name}.safetensors"
            if not file.exists():
                continue
            teacher.network.load_state_dict({key: value.float() for key, value in load_file(file).items()})
            teacher.source = str(file)
        table[name] = score(teacher, train, test)
        print(f"{name:8}", *(f"{key} {value:5.1f}" for key, value in table[name].items()), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"split": args.split, "scores": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
