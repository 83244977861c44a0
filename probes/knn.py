"""k nearest neighbours by cosine, weighted as in DINO (Caron et al. 2021): votes of exp(similarity / temperature)."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject, class_count, label_problem, majority
from agglom.probes.statistics import accuracy_resamples


class KnnProbe(Probe):
    """Accuracy of weighted kNN on the train split; k is chosen on val.

    Args:
        ks: candidates; those larger than the train split are left out.
        temperature: of the votes.
    """

    name, metric, fields, sees = "knn", "top1", ("cls",), "both"

    def __init__(self, *, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07) -> None:
        self.ks, self.temperature = tuple(ks), temperature

    def missing(self, subject: Subject) -> str | None:
        return label_problem(subject)

    def evaluate(self, subject: Subject) -> Result:
        """Top-1 on test, with the k that was best on val."""
        which = "summary" if subject.features["train"].summary is not None else "mean"
        vectors = {role: subject.features[role].vectors(which) for role in ("train", "val", "test")}
        labels = {role: torch.from_numpy(np.array(subject.targets[role].labels)) for role in vectors}
        ks = [k for k in self.ks if k <= len(vectors["train"])] or [len(vectors["train"])]
        classes = class_count(subject)

        def predict(role: str, candidates: Sequence[int]) -> Tensor:
            similarity, index = neighbours(vectors[role], vectors["train"], max(candidates))
            return votes(similarity, labels["train"][index], candidates, classes, self.temperature).argmax(-1)

        on_val = (predict("val", ks) == labels["val"]).float().mean(1).tolist()
        best = ks[int(np.argmax(on_val))]
        correct = (predict("test", [best])[0] == labels["test"]).numpy()
        return Result(
            metrics={"top1": float(correct.mean())},
            protocol={
                "features": which,
                "chosen": {"k": best},
                "grid": {"k": ks},
                "val_top1": dict(zip(map(str, ks), on_val, strict=True)),
                "temperature": self.temperature,
                "similarity": "cosine, votes exp(similarity / temperature)",
                "chance": majority(labels["test"].numpy()),
            },
            resamples={"top1": accuracy_resamples(correct, subject.seed)},
        )


def neighbours(
    queries: Tensor, bank: Tensor, k: int, *, query_chunk: int = 1024, bank_chunk: int = 131_072
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of the bank, by cosine.

    Memory beyond the inputs' normalised copies: query_chunk x (bank_chunk + 2 k) floats.

    Args:
        queries: (Q, D).
        bank: (N, D), N >= k.
        k: neighbours a query.
        query_chunk, bank_chunk: rows a matrix product.

    Returns:
        similarities (Q, k), descending, and bank rows (Q, k).
    """
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    similarities, indices = [], []
    for chunk in queries.split(query_chunk):
        best = chunk.new_empty(len(chunk), 0)
        rows = torch.empty(len(chunk), 0, dtype=torch.long, device=chunk.device)
        for start in range(0, len(bank), bank_chunk):
            block = chunk @ bank[start : start + bank_chunk].T
            found, at = block.topk(min(k, block.shape[1]), dim=1)
            best, rows = torch.cat([best, found], 1), torch.cat([rows, at + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        similarities.append(best)
        indices.append(rows)
    return torch.cat(similarities), torch.cat(indices)


def votes(similarity: Tensor, labels: Tensor, ks: Sequence[int], classes: int, temperature: float) -> Tensor:
    """Neighbours' similarities (Q, k) and labels (Q, k) -> (len(ks), Q, classes) votes of the first k of each."""
    weights = (similarity / temperature).exp()
    out = weights.new_zeros(len(ks), len(weights), classes)
    for i, k in enumerate(ks):
        out[i].scatter_add_(1, labels[:, :k], weights[:, :k])
    return out
