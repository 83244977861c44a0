"""Many linear heads at once: each is what torch's own SGD makes of it alone, and each sees the input it should."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agglom.features import InputSpec
from agglom.probes import LinearSgdProbe, Subject, solver
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.linear_sgd import MOMENTUM, Stack, draw_batches, inputs_of

K = 3


def rows(count=40, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randint(K, (count,), generator=generator)


@pytest.mark.parametrize("multi", [False, True])
def test_heads_are_torchs_sgd_one_by_one(multi):
    x, y = rows()
    y = torch.stack([y == 0, y != 1, y == 2], 1) if multi else y
    rates, shares = [0.3, 0.01], [1.0, 0.7, 0.4, 0.05]
    stack = Stack(rates, K, x.shape[1], torch.device("cpu"))
    for share in shares:
        stack.step(x, y, share)
    for at, rate in enumerate(rates):
        head = nn.Linear(x.shape[1], K)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=MOMENTUM)
        for share in shares:
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
            if multi:
                loss = F.binary_cross_entropy_with_logits(head(x), y.float(), reduction="sum") / len(x)
            else:
                loss = F.cross_entropy(head(x), y)
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(stack(x)[:, at], head(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stack.only(at)(x)[:, 0], head(x), atol=1e-5, rtol=1e-5)


def features(count, labels=None, knows=None, seed=0):
    """Four blocks of width 5 for summaries and 6 for means; the labels are in what `knows` says, the rest is noise."""
    rng = np.random.default_rng(seed)
    summaries, means = (rng.normal(size=(count, 4, width)).astype(np.float32) for width in (5, 6))
    if knows is not None:
        array, block = knows
        {"summary": summaries, "mean": means}[array][np.arange(count), block, labels] += 6
    return FeatureSet(summaries[:, -1], means[:, -1], None, summaries, means)


def test_inputs_are_the_last_blocks_side_by_side():
    found = features(9)
    seen = {
        name: torch.from_numpy(getattr(found, name).reshape(9, -1))
        for name in ("summary", "mean", "block_summaries", "block_means")
    }
    s, m = (torch.from_numpy(x) for x in (found.block_summaries, found.block_means))
    inputs = {one.name: one for one in inputs_of(found, ("summary", "mean", "both"), (1, 2, 4))}
    expected = {
        "summary, last 1": [s[:, 3]],
        "mean, last 1": [m[:, 3]],
        "both, last 1": [s[:, 3], m[:, 3]],
        "summary, last 2": [s[:, 2], s[:, 3]],
        "mean, last 2": [m[:, 2], m[:, 3]],
        "both, last 2": [s[:, 2], s[:, 3], m[:, 3]],
        "summary, last 4": list(s.unbind(1)),
        "mean, last 4": list(m.unbind(1)),
        "both, last 4": [*s.unbind(1), m[:, 3]],
    }
    assert list(inputs) == list(expected)
    for name, parts in expected.items():
        assert torch.equal(inputs[name].of(seen), torch.cat(parts, 1)), name
        assert sum(p.width for p in inputs[name].pieces) == torch.cat(parts, 1).shape[1]


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (FeatureSet(features(9).summary, features(9).mean), ["summary", "mean", "both"]),
        (FeatureSet(None, features(9).mean), ["mean"]),
        (replace(features(9), block_summaries=None, block_means=np.ones((9, 3, 6))), ["summary", "mean", "both"]),
    ],
    ids=["a CNN or an adaptor", "without a summary", "too few blocks"],
)
def test_without_blocks_only_the_last_is_looked_at(found, names):
    assert [one.name for one in inputs_of(found, ("summary", "mean", "both"), (1, 4))] == [
        f"{n}, last 1" for n in names
    ]


class Model:
    input = InputSpec()


def subject(knows, sizes=(120, 60, 60)):
    found, targets = {}, {}
    for seed, (role, count) in enumerate(zip(("train", "val", "test"), sizes, strict=True)):
        labels = np.random.default_rng(seed + 10).integers(0, K, count)
        found[role] = features(count, labels, knows, seed)
        targets[role] = Targets([f"{role}{i}" for i in range(count)], labels)
    return Subject("m", Model(), found, targets)


@pytest.mark.parametrize(
    ("knows", "choice"),
    [
        (("summary", 3), ("summary", 1)),
        (("mean", 3), ("mean", 1)),
        (("summary", 0), ("summary", 4)),
        (("mean", 1), ("mean", 4)),
    ],
)
def test_the_best_input_is_chosen_on_val(knows, choice):
    result = LinearSgdProbe(lrs=(1e-4, 0.01), steps=60).evaluate(subject(knows))
    chosen = result.protocol["chosen"]
    assert (chosen["features"], chosen["blocks"]) == choice and result.metrics["top1"] > 0.9
    assert result.protocol["heads"] == 12 and "no augmentation" in result.protocol["views"]
    assert set(result.series) == set(result.protocol["val_top1"]) and len(result.series) == 6
    assert [lr for lr, _ in result.series["both, last 4"]] == [1e-4, 0.01]


def test_the_best_rate_is_chosen_on_val_and_the_grid_does_not_change_a_head():
    """A head is the same whatever it is trained beside; of equals the first is taken."""
    s = subject(("summary", 2))
    wide = LinearSgdProbe(lrs=(1e-9, 3e-3, 0.05), steps=40, blocks=(4,), features=("summary", "mean")).evaluate(s)
    alone = LinearSgdProbe(lrs=(3e-3,), steps=40, blocks=(4,), features=("summary",)).evaluate(s)
    assert (
        wide.protocol["val_top1"]["summary, last 4"]["0.003"] == alone.protocol["val_top1"]["summary, last 4"]["0.003"]
    )
    every = [(found, name, lr) for name, by in wide.protocol["val_top1"].items() for lr, found in by.items()]
    best = next(one for one in every if one[0] == max(every)[0])
    chosen = wide.protocol["chosen"]
    assert best[1:] == (f"{chosen['features']}, last {chosen['blocks']}", f"{chosen['lr']:g}")


def test_chunks_of_rows_change_no_answer(monkeypatch):
    s, probe = subject(("mean", 2)), LinearSgdProbe(lrs=(0.01,), steps=30)
    whole = probe.evaluate(s)
    monkeypatch.setattr(solver, "ENTRIES", 500)
    chunked = probe.evaluate(s)
    assert whole.metrics == chunked.metrics and whole.protocol == chunked.protocol


def test_batches_are_whole_epochs():
    found = list(draw_batches(10, 3, 6, seed=0))
    assert all(len(set(rows.tolist())) == 3 and (np.diff(rows) > 0).all() for rows in found)
    for epoch in (found[:3], found[3:]):
        assert len({int(i) for rows in epoch for i in rows}) == 9
    assert [r.tolist() for r in found[:3]] != [r.tolist() for r in found[3:]]
    assert [r.tolist() for r in draw_batches(10, 3, 6, seed=0)] == [r.tolist() for r in found]
