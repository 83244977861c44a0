"""k nearest neighbours by cosine, weighted as in DINO (Caron et al. 2021): votes of exp(similarity / temperature).

Memory. The features stay where they are (on disk, mapped): no normalised copy is made, the products are divided by the
norms instead. At once there are `QUERIES` x `ROWS` similarities of 4 bytes (256 MiB), `QUERIES` rows of votes for every
candidate k, and the temporaries of finding the largest, less than half of that block. So the peak above an idle process
is at most

    4 (N + Q) D   mapped pages, which the kernel may drop at any time
    + 1.5 x 4 x QUERIES x ROWS + 4 x QUERIES x (len(ks) + 1) x K   working memory

bytes for N train and Q val and test rows of D channels and K classes: for 1.3 million rows of 1024 channels (ImageNet:
N = 1.02 M, Q = 0.31 M) and K = 1000, 5.5 GB mapped and 0.4 GB working memory, 5.5 GiB together.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject, label_problem
from agglom.probes.fingerprint import device_of
from agglom.probes.task import Task

QUERIES, ROWS = 512, 131_072  # of one matrix product
GROUP = 32  # columns that are compared by their largest first


class KnnProbe(Probe):
    """Accuracy of weighted kNN on the train split; k is chosen on val.

    Where images have several classes, each class is scored with its share of the votes: mean average precision.

    Args:
        ks: candidates; those larger than the train split are left out.
        temperature: of the votes.
    """

    name, metric, several, fields, sees = "knn", "top1", "map", ("cls",), "both"

    def __init__(self, *, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07) -> None:
        self.ks, self.temperature = tuple(ks), temperature

    def missing(self, subject: Subject) -> str | None:
        return label_problem(subject)

    def evaluate(self, subject: Subject) -> Result:
        """The metric on test, with the k that was best on val."""
        task, device = Task.of(subject), device_of(subject.model)
        which = "summary" if subject.features["train"].summary is not None else "mean"
        bank, labels = subject.features["train"].vectors(which), task.target("train").to(device)
        ks = [k for k in self.ks if k <= len(bank)] or [len(bank)]

        def predict(role: str, candidates: Sequence[int]) -> Tensor:
            parts = []
            queries = subject.features[role].vectors(which)
            chunks = {"query_chunk": QUERIES, "bank_chunk": ROWS}
            for similarity, index in nearest(queries, bank, max(candidates), **chunks, device=device):
                found = votes(similarity, labels[index], candidates, task.classes, self.temperature)
                parts.append(task.answer(found).cpu())
            return torch.cat(parts, 1)  # (candidates, N) or (candidates, N, K)

        on_val = [task.score(answers, "val") for answers in predict("val", ks)]
        best = ks[int(np.argmax(on_val))]
        metrics, resamples = task.judge(predict("test", [best])[0], subject.seed)
        return Result(
            metrics={task.metric: metrics[task.metric]},
            protocol={
                "features": which,
                "chosen": {"k": best},
                "grid": {"k": ks},
                f"val_{task.metric}": dict(zip(map(str, ks), on_val, strict=True)),
                "temperature": self.temperature,
                "similarity": "cosine, votes exp(similarity / temperature)",
                "chance": task.chance,
                **task.notes,
            },
            resamples=resamples,
        )


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    query_chunk: int = QUERIES,
    bank_chunk: int = ROWS,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k most similar rows of the bank, by cosine, for one stretch of queries after the other.

    Args:
        queries: (Q, D).
        bank: (N, D), N >= k.
        k: neighbours a query.
        query_chunk, bank_chunk: rows of a matrix product.
        device: where to multiply; only chunks are moved there.

    Yields:
        similarities (q, k), descending, and bank rows (q, k), on the device; q is `query_chunk`, or less at the end.
    """
    scale = torch.cat([inverse_norms(rows) for rows in bank.split(bank_chunk)]).to(device)
    space = bank.new_empty(min(query_chunk, len(queries)) * min(bank_chunk, len(bank)), device=device)
    for queried in queries.split(query_chunk):
        chunk = queried.to(device)
        chunk = chunk * inverse_norms(chunk)[:, None]
        best = chunk.new_empty(len(chunk), 0)
        rows = torch.empty(len(chunk), 0, dtype=torch.long, device=device)
        for start in range(0, len(bank), bank_chunk):
            some = bank[start : start + bank_chunk].to(device)
            # always the same memory: fresh pages for every block cost as much as a narrow product
            block = torch.mm(chunk, some.T, out=space[: len(chunk) * len(some)].view(len(chunk), len(some)))
            block *= scale[start : start + bank_chunk]
            found, at = largest(block, min(k, block.shape[1]))
            best, rows = torch.cat([best, found], 1), torch.cat([rows, at + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        yield best, rows


def neighbours(
    queries: Tensor, bank: Tensor, k: int, *, query_chunk: int = QUERIES, bank_chunk: int = ROWS
) -> tuple[Tensor, Tensor]:
    """All of `nearest` at once: similarities (Q, k), descending, and bank rows (Q, k)."""
    similarities, rows = zip(*nearest(queries, bank, k, query_chunk=query_chunk, bank_chunk=bank_chunk), strict=True)
    return torch.cat(similarities), torch.cat(rows)


def inverse_norms(x: Tensor) -> Tensor:
    """(N, D) -> (N,)."""
    return torch.linalg.vector_norm(x, dim=1).clamp_min(1e-12).reciprocal()


def largest(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`block.topk(k)` of each row (q, n), faster for a small share of long rows.

    The columns fall into groups. The k largest values are in the k groups whose largest values are largest (a group
    beyond them has k values above all of its own), so only those groups are sorted.
    """
    groups = block.shape[1] // GROUP
    if groups < 2 * k:
        return block.topk(k, dim=1)
    whole, rest = block[:, : groups * GROUP], block[:, groups * GROUP :]
    # a group takes every groups-th column: maxima over the slow axis are vector operations
    candidates = whole.unflatten(1, (GROUP, groups))  # (q, GROUP, groups)
    chosen = candidates.amax(1).topk(k, dim=1, sorted=False).indices  # (q, k)
    values = candidates.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)  # (q, GROUP * k)
    found, at = torch.cat([values, rest], 1).topk(k, dim=1)
    inside = at < values.shape[1]
    column = at.clamp_max(values.shape[1] - 1)
    columns = column // k * groups + chosen.gather(1, column % k)
    return found, torch.where(inside, columns, at - values.shape[1] + groups * GROUP)


def votes(similarity: Tensor, labels: Tensor, ks: Sequence[int], classes: int, temperature: float) -> Tensor:
    """Votes of the first k neighbours for each k.

    Args:
        similarity: (Q, k).
        labels: (Q, k) of these neighbours, or (Q, k, classes) bool.
        ks: how many count.
        classes: K.
        temperature: of the weights exp(similarity / temperature).

    Returns:
        (len(ks), Q, K): summed weights of the neighbours of a class; with several classes an image their share of all
        weights, which can be compared between queries.
    """
    weights = (similarity / temperature).exp()
    out = weights.new_zeros(len(ks), len(weights), classes)
    for i, k in enumerate(ks):
        if labels.ndim == 2:
            out[i].scatter_add_(1, labels[:, :k], weights[:, :k])
        else:
            share = weights[:, :k] / weights[:, :k].sum(1, keepdim=True)
            out[i] = torch.einsum("qk,qkc->qc", share, labels[:, :k].to(share.dtype))
    return out
