"""Image-text retrieval of models without a text tower: a linear map from frozen features to bags of words.

What a linear map of frozen features knows of the words of an image's captions, as Joulin et al. 2016 ("Learning visual
features from large weakly supervised data", 1511.02251) train whole networks. The numbers say nothing about a text
tower: compare them with those of this probe alone.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject
from agglom.probes.retrieval import chance, distinct, recalls
from agglom.probes.ridge import ridge_path
from agglom.probes.solver import Standardise, chunks

WORDS = 4096  # the most frequent ones
RIDGES = (1e3, 100.0, 10.0, 1.0, 0.1, 0.01, 1e-3)


class LinearRetrievalProbe(Probe):
    """The numbers of `RetrievalProbe` in a space of words, for any model.

    A caption is its tf-idf over the words of the train captions, length 1, less the mean of the train captions. Ridge
    regression, fitted on train, maps the standardised summary (the mean patch where there is none) to the mean of an
    image's captions; similarities are cosines, so captions without a known word are never found.

    Args:
        ridges: candidate strengths, chosen by `r1` on val.
    """

    name, metric, fields, sees = "retrieval_linear", "r1", ("txt",), "both"

    def __init__(self, *, ridges: Sequence[float] = RIDGES) -> None:
        self.ridges = tuple(ridges)

    def missing(self, subject: Subject) -> str | None:
        for role, targets in subject.targets.items():
            if targets.captions is None:
                return f"the {role} split has no .txt"
            if len(targets.captions) < 2 or len(distinct(targets.captions)[0]) < 2:
                return f"the {role} split has less than two images or two different captions"
        return None

    def evaluate(self, subject: Subject) -> Result:
        """The metrics on test, with the strength that was best on val."""
        which = "summary" if subject.features["train"].summary is not None else "mean"
        x = {role: features.vectors(which) for role, features in subject.features.items()}
        texts, of_image, of_text = {}, {}, {}
        for role, targets in subject.targets.items():
            assert targets.captions is not None
            texts[role], of_image[role], of_text[role] = distinct(targets.captions)
        words, scale = Words(texts["train"]), Standardise.of(x["train"])
        weights = _fit(scale, x["train"], words, texts["train"], of_image["train"], self.ridges)

        def scores(role: str, tried: Sequence[Tensor]) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
            seen, gallery = scale(x[role]), words(texts[role])
            said = (F.normalize(seen @ weight, dim=1) for weight in tried)
            return [recalls(some, gallery, of_image[role], of_text[role], seed=subject.seed) for some in said]

        on_val = [metrics["r1"] for metrics, _ in scores("val", weights)]
        best = int(np.argmax(on_val))
        ((metrics, resamples),) = scores("test", [weights[best]])
        return Result(
            metrics=metrics,
            protocol={
                "features": which,
                "chosen": {"ridge": self.ridges[best]},
                "grid": {"ridge": list(self.ridges)},
                "val_r1": {f"{ridge:g}": r1 for ridge, r1 in zip(self.ridges, on_val, strict=True)},
                "words": len(words),
                "gallery": {"images": len(of_image["test"]), "distinct captions": len(texts["test"])},
                "hit": "one of the image's captions, word for word; equal similarities count against",
                "chance": chance(of_image["test"], of_text["test"]),
            },
            resamples=resamples,
        )


class Words:
    """Texts to (T, V) float32 rows of length 1, or 0 for a text of unknown words.

    Args:
        texts: those that say which words there are, how rare each is, and what is common to all texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.vectorizer = TfidfVectorizer(max_features=WORDS, dtype=np.float32, token_pattern=r"(?u)\b\w+\b").fit(texts)
        self.mean = torch.from_numpy(np.asarray(self.vectorizer.transform(texts).mean(0)))  # sparse: there may be many

    def __len__(self) -> int:
        return len(self.vectorizer.vocabulary_)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = torch.from_numpy(self.vectorizer.transform(texts).toarray())
        known = rows.any(1, keepdim=True)
        return F.normalize((rows - self.mean) * known, dim=1)


def _fit(
    scale: Standardise,
    x: Tensor,
    words: Words,
    texts: Sequence[str],
    of_image: Sequence[np.ndarray],
    ridges: Sequence[float],
) -> list[Tensor]:
    """(D, V) float32 for each strength, from the images that have captions; these are words a few images at a time."""
    spoken = [i for i, own in enumerate(of_image) if len(own)]
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    moment = torch.zeros(x.shape[1], len(words), dtype=torch.float64)
    most = max(len(of_image[i]) for i in spoken)
    for part in chunks(len(spoken), x.shape[1] + (1 + most) * len(words)):
        rows = spoken[part]
        own = words([texts[k] for i in rows for k in of_image[i]]).split([len(of_image[i]) for i in rows])
        some, wanted = scale(x[torch.as_tensor(rows)]).double(), torch.stack([each.mean(0) for each in own]).double()
        gram += some.T @ some
        moment += some.T @ wanted
    return [weight.float() for weight in ridge_path(gram, moment, len(spoken), ridges)]
