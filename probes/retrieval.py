"""Image-text retrieval: which caption belongs to an image, and which image to a caption."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject
from agglom.probes.statistics import bootstrap
from agglom.probes.towers import embed, readable, unreadable

TOPS = (1, 5, 10)
SCORES = 2**24  # similarities at a time: 64 MiB


class RetrievalProbe(Probe):
    """R@1, R@5, R@10 in both directions, by cosine on the test split; `r1` is the mean of both R@1.

    Captions are told apart by their words: two images with the same caption share one entry of the gallery, so that
    what counts is the text that was found.

    `image_to_text_rK`: share of images of which a caption is among the K nearest distinct captions.
    `text_to_image_rK`: share of captions, every one of every image a query, of which an image is among the K nearest.

    An equal similarity counts against: features that are all the same find nothing. R@K is left out where K is the
    whole gallery. Intervals are over images, each with its captions, the gallery kept. Whose summary a tower reads:
    `towers.readable`; the first tower gives `r1`, further ones `r1@NAME`.
    """

    name, metric, fields = "retrieval", "r1", ("txt",)

    def __init__(self) -> None:
        self._embedded: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def missing(self, subject: Subject) -> str | None:
        captions = subject.targets["test"].captions
        if captions is None:
            return "the test split has no .txt"
        if len(captions) < 2 or len(distinct(captions)[0]) < 2:
            return "the test split has less than two images or two different captions"
        return unreadable(subject)

    def evaluate(self, subject: Subject) -> Result:
        """Nothing is trained or chosen."""
        captions = subject.targets["test"].captions
        assert captions is not None
        texts, of_image, of_text = distinct(captions)
        metrics: dict[str, float] = {}
        resamples: dict[str, np.ndarray] = {}
        examples = None
        sides = readable(subject)
        for tower, (features, _) in sides.items():
            images, words = F.normalize(features.vectors("summary"), dim=1), self._embed(subject, tower, texts)
            at = "" if examples is None else f"@{tower}"
            found, drawn = recalls(images, words, of_image, of_text, seed=subject.seed)
            metrics |= {name + at: value for name, value in found.items()}
            resamples |= {name + at: values for name, values in drawn.items()}
            if examples is None:
                examples = [nearest(images[row], words, texts) for row in subject.show]
        return Result(
            metrics=metrics,
            protocol={
                "features": {tower: side for tower, (_, side) in sides.items()},
                "captions": sum(map(len, of_image)),
                "gallery": {"images": len(captions), "distinct captions": len(texts)},
                "hit": "one of the image's captions, word for word; equal similarities count against",
                "chance": chance(of_image, of_text),
            },
            resamples=resamples,
            show={"retrieval": examples},
        )

    def _embed(self, subject: Subject, tower: str, texts: tuple[str, ...]) -> Tensor:
        key = (id(subject.text[tower]), texts)
        if key not in self._embedded:  # the same for every model of a report
            self._embedded = {key: embed(subject.text[tower], texts)}
        return self._embedded[key]


def recalls(
    images: Tensor, words: Tensor, of_image: Sequence[np.ndarray], of_text: Sequence[np.ndarray], *, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Every R@K in both directions and `r1`, and their bootstrap resamples over images.

    Args:
        images: (N, D), normalised.
        words: (T, D), normalised.
        of_image, of_text: see `distinct`.
        seed: of the resamples.
    """
    queries = [i for i, own in enumerate(of_image) if len(own)]  # images without a caption are only found
    count = np.array([len(own) for own in of_image], np.float64)
    to_text = np.full(len(images), np.inf)
    to_text[queries] = ranks(images[queries], words, [of_image[i] for i in queries])
    to_image = ranks(words, images, of_text)
    hits = {}
    for top in TOPS:
        if top < len(words):
            hits[f"image_to_text_r{top}"] = np.stack([to_text < top, count > 0], 1)
        if top < len(images):
            found = [float((to_image[own] < top).sum()) for own in of_image]
            hits[f"text_to_image_r{top}"] = np.stack([np.array(found), count], 1)
    metrics = {name: float(share(pair.mean(0))) for name, pair in hits.items()}
    drawn = {name: bootstrap(pair, share, seed=seed) for name, pair in hits.items()}
    both = ("image_to_text_r1", "text_to_image_r1")
    r1 = sum(metrics[name] for name in both) / 2
    return {"r1": r1, **metrics}, {"r1": (drawn[both[0]] + drawn[both[1]]) / 2, **drawn}


def distinct(captions: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[np.ndarray], list[np.ndarray]]:
    """Captions of N images -> T distinct texts, and which belong to which.

    Returns:
        texts in the order of their first use, empty ones left out; for each image the texts of its captions (as often
        as it has them); for each text the images that have it.
    """
    cleaned = [[text for text in some if text.strip()] for some in captions]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for some in cleaned for text in some))}
    of_image = [np.array([number[text] for text in some], np.int64) for some in cleaned]
    of_text: list[list[int]] = [[] for _ in number]
    for image, own in enumerate(of_image):
        for text in np.unique(own):
            of_text[text].append(image)
    return tuple(number), of_image, [np.array(images, np.int64) for images in of_text]


def ranks(queries: Tensor, gallery: Tensor, matches: Sequence[np.ndarray]) -> np.ndarray:
    """How many others are at least as similar to each query as the best of its matches.

    Args:
        queries: (Q, D), normalised.
        gallery: (G, D), normalised.
        matches: for each query the rows of the gallery that are right, at least one.

    Returns:
        (Q,) int64; 0 where a match comes first.
    """
    chunk = max(1, SCORES // len(gallery))
    out = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ gallery.T
        own = torch.zeros_like(similarity, dtype=torch.bool)
        some = matches[start : start + chunk]
        rows = np.repeat(np.arange(len(some)), [len(match) for match in some])
        own[torch.from_numpy(rows), torch.from_numpy(np.concatenate(some))] = True
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        out.append(((similarity >= best) & ~own).sum(1))
    return torch.cat(out).cpu().numpy()


def share(means: np.ndarray) -> np.ndarray:
    """(..., 2) mean hits and mean queries -> (...) hits a query."""
    hits, queries = means[..., 0], means[..., 1]
    return np.divide(hits, queries, out=np.full_like(hits, np.nan), where=queries > 0)


def chance(of_image: Sequence[np.ndarray], of_text: Sequence[np.ndarray]) -> float:
    """`r1` of answering at random."""
    to_text = [len(np.unique(own)) / len(of_text) for own in of_image if len(own)]
    to_image = [len(of_text[text]) / len(of_image) for own in of_image for text in own]
    return float(np.mean(to_text) + np.mean(to_image)) / 2


def nearest(image: Tensor, words: Tensor, texts: Sequence[str], top: int = 3) -> list[tuple[str, float]]:
    """The most similar texts and their cosines."""
    found = (words @ image).topk(min(top, len(texts)))
    return [(texts[i], round(s, 4)) for s, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]
