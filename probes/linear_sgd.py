"""Linear classification by SGD: many heads at once, as DINOv2 evaluates (Oquab et al. 2023, section 7.1 and B.3).

Every combination of a learning rate, the features and how many of the last blocks they come from has a head of its own.
All are trained in one pass over the rows: each batch is read once, and the heads that look at the same input are one
matrix. The input of n last blocks is, for

    "summary"   their n summaries side by side
    "mean"      the means of their n maps over the cells
    "both"      their n summaries and the mean of the last one's map

n = 1 is what the model itself answers, and all that CNNs and adaptors have. Inputs are standardised by the train split
(a frozen batch norm without affine part, He et al. 2022, appendix A.1), so that one grid of rates fits any model.

Memory. Rows are read batch by batch from where they are (on disk, mapped), so beside them there are the heads alone:
8 bytes x K x the sum of (rates x D) over the inputs, on the model's device, and temporaries that don't grow with N;
with several classes an image also the scores of the val rows by the heads of one input, 4 bytes x N x rates x K.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from agglom.probes.base import Probe, Result, Subject, label_problem
from agglom.probes.features import FeatureSet
from agglom.probes.fingerprint import device_of
from agglom.probes.solver import Standardise, chunks
from agglom.probes.task import Task

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9


class LinearSgdProbe(Probe):
    """Top-1 of the best of many linear heads; where images have several classes, mean average precision.

    Args:
        lrs: learning rates for batches of 256; scaled by batch / 256.
        features: candidates among "summary", "mean" (mean patch) and "both"; those that a model lacks are left out.
        blocks: candidates for the number of last blocks.
        epochs: passes over the train rows, more where that is less than `steps`.
        steps: fewest steps of SGD.
        batch: rows a step, or all where there are fewer.
    """

    name, metric, several, fields, sees = "linear_sgd", "top1", "map", ("cls",), "both"

    def __init__(
        self,
        *,
        lrs: Sequence[float] = LRS,
        features: Sequence[str] = ("summary", "mean", "both"),
        blocks: Sequence[int] = (1, 4),
        epochs: int = 10,
        steps: int = 500,
        batch: int = 256,
    ) -> None:
        self.lrs, self.features, self.last = tuple(sorted(lrs)), tuple(features), tuple(sorted(blocks))
        self.epochs, self.steps, self.batch = epochs, steps, batch
        self.blocks = max((n for n in self.last if n > 1), default=0)

    def missing(self, subject: Subject) -> str | None:
        return label_problem(subject)

    def evaluate(self, subject: Subject) -> Result:
        """The metric (and mean per-class recall) on test, by the head that was best on val."""
        task, device = Task.of(subject), device_of(subject.model)
        train = subject.features["train"]
        inputs = inputs_of(train, self.features, self.last)
        scales = {name: Standardise.of(torch.from_numpy(array)).to(device) for name, array in _arrays(train, inputs)}
        batch = min(self.batch, len(task.labels["train"]))
        steps = max(self.epochs * (len(task.labels["train"]) // batch), self.steps)
        rates = [lr * batch / 256 for lr in self.lrs]
        stacks = [Stack(rates, task.classes, sum(p.width for p in one.pieces), device) for one in inputs]
        y = task.target("train")
        for step, rows in enumerate(draw_batches(len(y), batch, steps, subject.seed)):
            seen, some = _read(train, scales, rows), y[torch.from_numpy(rows)].to(device)
            for one, stack in zip(inputs, stacks, strict=True):
                stack.step(one.of(seen), some, (1 + math.cos(math.pi * step / steps)) / 2)

        on_val: dict[str, dict[str, float]] = {}
        best: tuple[float, Any] | None = None
        for one, stack in zip(inputs, stacks, strict=True):
            answers = _answers(task, one, stack, subject.features["val"], scales)
            for at, lr in enumerate(self.lrs):
                found = task.score(answers[:, at], "val")
                on_val.setdefault(one.name, {})[f"{lr:g}"] = found
                if best is None or found > best[0]:  # a tie keeps the earlier: fewer blocks, the smaller rate
                    best = found, (one, stack, at)
        assert best is not None
        one, stack, at = best[1]
        answers = _answers(task, one, stack.only(at), subject.features["test"], scales)[:, 0]
        metrics, resamples = task.judge(answers, subject.seed)
        return Result(
            metrics=metrics,
            protocol={
                "features": one.features,
                "chosen": {"features": one.features, "blocks": one.blocks, "lr": self.lrs[at]},
                "grid": {"inputs": [i.name for i in inputs], "lr": list(self.lrs)},
                "heads": len(inputs) * len(self.lrs),
                f"val_{task.metric}": on_val,
                "at_edge": self.lrs[at] in (self.lrs[0], self.lrs[-1]),
                "views": "one fixed view an image, no augmentation",
                "solver": f"SGD, momentum {MOMENTUM}, cosine to 0, no weight decay, lr x batch / 256, from zero; "
                "features standardised by the train split",
                "loss": "binary cross-entropy, summed over classes" if task.multi else "cross-entropy",
                "batch": batch,
                "steps": steps,
                "chance": task.chance,
                **task.notes,
            },
            resamples=resamples,
            series={name: [(float(lr), value) for lr, value in by.items()] for name, by in on_val.items()},
        )


class Piece(NamedTuple):
    """Columns of an array of features, its rows flattened."""

    array: str
    columns: slice
    width: int


class Input(NamedTuple):
    """What some heads look at: pieces side by side.

    Attributes:
        features: "summary", "mean" or "both".
        blocks: n, of how many last blocks.
        pieces: of which arrays.
    """

    features: str
    blocks: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return f"{self.features}, last {self.blocks}"

    def of(self, seen: dict[str, Tensor]) -> Tensor:
        """Rows of the arrays, flattened -> (n, D)."""
        parts = [seen[piece.array][:, piece.columns] for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def inputs_of(found: FeatureSet, features: Sequence[str], blocks: Sequence[int]) -> list[Input]:
    """The inputs that these features can give, fewer blocks first."""

    def piece(array: str, last: int | None = None) -> Piece | None:
        whole = getattr(found, array)
        if whole is None or (last is not None and last > whole.shape[1]):
            return None
        every = math.prod(whole.shape[1:])
        width = every if last is None else last * whole.shape[2]
        return Piece(array, slice(every - width, every), width)

    out = []
    for n in blocks:
        for which in features:
            if n == 1:
                pieces = [piece(array) for array in ("summary", "mean") if which in (array, "both")]
            else:
                pieces = [piece("block_summaries", n)] if which != "mean" else [piece("block_means", n)]
                pieces += [piece("block_means", 1)] if which == "both" else []
            there = tuple(p for p in pieces if p is not None)
            if len(there) == len(pieces):
                out.append(Input(which, n, there))
    return out


class Stack:
    """Heads of several learning rates on one input, trained by SGD with momentum from zero.

    The gradient is by hand: p - y for softmax with cross-entropy and for sigmoid with binary cross-entropy alike.

    Args:
        rates: H learning rates.
        classes: K.
        width: D.
        device: of the heads.
    """

    def __init__(self, rates: Sequence[float], classes: int, width: int, device: torch.device) -> None:
        self.classes = classes
        self.weight = torch.zeros(len(rates) * classes, width, device=device)
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.rates = torch.tensor(rates).repeat_interleave(classes).to(device)  # (H * K,)
        self.velocity, self.bias_velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def step(self, x: Tensor, y: Tensor, share: float) -> None:
        """One step with the mean loss over a batch.

        Args:
            x: (B, D).
            y: (B,) int, or (B, K) bool.
            share: of the learning rates.
        """
        logits = self(x)  # (B, H, K)
        if y.ndim == 1:
            slope = logits.softmax(-1)
            right = y[:, None, None].expand(-1, slope.shape[1], 1)
            slope.scatter_add_(2, right, slope.new_full(right.shape, -1.0))
        else:
            slope = logits.sigmoid_().sub_(y[:, None].to(logits.dtype))
        slope = slope.flatten(1).div_(len(x))  # (B, H * K)
        self.velocity.addmm_(slope.T, x, beta=MOMENTUM)
        self.bias_velocity.mul_(MOMENTUM).add_(slope.sum(0))
        self.weight.addcmul_(self.velocity, self.rates[:, None], value=-share)
        self.bias.addcmul_(self.bias_velocity, self.rates, value=-share)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D) -> logits (B, H, K)."""
        return torch.addmm(self.bias, x, self.weight.T).unflatten(1, (-1, self.classes))

    def only(self, at: int) -> Stack:
        """One of the heads, to be asked and not trained."""
        rows = slice(at * self.classes, (at + 1) * self.classes)
        out = Stack([0.0], self.classes, 0, self.bias.device)
        out.weight, out.bias = self.weight[rows], self.bias[rows]
        return out


def draw_batches(count: int, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of every step, sorted as the disk likes it: a new order each epoch, its incomplete last batch left out."""
    rng = np.random.default_rng(seed)
    order, at = np.empty(0, np.int64), 0
    for _ in range(steps):
        if at + batch > len(order):
            order, at = rng.permutation(count), 0
        yield np.sort(order[at : at + batch])
        at += batch


def _arrays(found: FeatureSet, inputs: Sequence[Input]) -> list[tuple[str, np.ndarray]]:
    names = dict.fromkeys(piece.array for one in inputs for piece in one.pieces)
    return [(name, getattr(found, name)) for name in names]


def _read(found: FeatureSet, scales: dict[str, Standardise], rows: np.ndarray | slice) -> dict[str, Tensor]:
    """Rows of the arrays, flattened, standardised and on the device."""
    arrays = ((name, torch.from_numpy(np.ascontiguousarray(getattr(found, name)[rows]))) for name in scales)
    return {name: scales[name](x.flatten(1).to(scales[name].mean.device)) for name, x in arrays}


def _answers(task: Task, one: Input, stack: Stack, found: FeatureSet, scales: dict[str, Standardise]) -> Tensor:
    """What heads answer to all rows: classes (N, H), or scores (N, H, K)."""
    own = {piece.array: scales[piece.array] for piece in one.pieces}
    count = len(getattr(found, one.pieces[0].array))
    width = 4 * (len(stack.bias) + sum(len(scale.mean) for scale in own.values()))
    parts = (task.answer(stack(one.of(_read(found, own, rows)))).cpu() for rows in chunks(count, width))
    return torch.cat(list(parts))
