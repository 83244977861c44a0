"""Several sources: shares are kept and change at the very batch they should; each source's order is its own.

Also DDK's update by its properties and by hand, and that a run which follows the gap favours the harder source.
"""

import csv
import itertools
import math

import pytest
import torch
import yaml

from agglom.checks import check_config
from agglom.cli import main
from agglom.data import GapOptions, ShardDataModule, Source, follow, write_index, write_shard
from agglom.data.mixture import MixedStream, Shares, shares_of
from agglom.data.streams import train_stream
from agglom.errors import UserError

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Three folders of 4 shards with 8 images each, of one colour; the keys are the same in all."""
    root = tmp_path_factory.mktemp("sources")
    paths = {}
    for channel, name in enumerate(NAMES):
        pixels = torch.zeros(16, 16, 3, dtype=torch.uint8)
        pixels[..., channel] = 200
        shards = [
            write_shard(
                root / name / f"train-{s:06d}.tar",
                [{"key": f"{8 * s + i:09d}", "image": pixels.numpy(), "cls": i} for i in range(8)],
            )
            for s in range(4)
        ]
        write_index(root / name, {"train": shards})
        paths[name] = str(root / name)
    return paths


def mixed(roots, shares, start=0, fields=("cls",)):
    streams = {
        name: train_stream(roots[name], "train", fields=fields, seed=i, shuffle=8, start=start, rank=0, world_size=1)
        for i, name in enumerate(roots)
    }
    return MixedStream(streams, Shares(shares), seed=0, start=start)


def test_follow_by_hand():
    new = follow(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5]), strength=0.5, most=3.0)
    share = math.e / (math.e + 1)  # e^2 / (e^2 + e)
    torch.testing.assert_close(new, torch.tensor([0.5 * share + 0.25, 0.5 * (1 - share) + 0.25]))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_follow_keeps_its_promises(strength):
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        weights = torch.rand(4, generator=rng).double() + 0.1
        weights /= weights.sum()
        shares = follow(weights, torch.rand(4, generator=rng).double() * 5, weights, strength=strength, most=3.0)
        assert shares.sum() == pytest.approx(1) and (shares >= (1 - strength) * weights - 1e-12).all()
        torch.testing.assert_close(
            follow(weights, torch.full((4,), 1.7), weights, strength=strength, most=3.0), weights
        )
        even = torch.full((4,), 0.25).double()
        gaps = torch.rand(4, generator=rng).double() * 3
        assert torch.equal(follow(even, gaps, even, strength=1.0, most=3.0).argsort(), gaps.argsort())
        clipped = follow(even, torch.tensor([9.0, 3.0, 1.0, 1.0]).double(), even, strength=1.0, most=3.0)
        assert clipped[0] == clipped[1]  # beyond `most` nothing more is gained
        unknown = follow(even, torch.tensor([math.nan, 1.0, 3.0, 2.0]).double(), even, strength=1.0, most=3.0)
        assert unknown[0] == pytest.approx(unknown[3].item())  # as the mean


def test_samples_come_in_their_shares(roots):
    """Chi-square of 10,000 draws, with 2 degrees of freedom: below 13.8 in 999 of 1000 seeds."""
    shares = [0.6, 0.3, 0.1]
    found = [s["source"].item() for s in itertools.islice(mixed(roots, shares), 10_000)]
    expected = [10_000 * share for share in shares]
    counts = [found.count(i) for i in range(3)]
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 13.8, counts


def test_each_source_keeps_its_own_order_and_endless(roots):
    samples = [*itertools.islice(mixed(roots, [0.5, 0.25, 0.25]), 600)]
    for i, name in enumerate(roots):
        alone = train_stream(roots[name], "train", fields=("cls",), seed=i, shuffle=8, rank=0, world_size=1)
        mine = [s["key"] for s in samples if s["source"] == i]
        assert len(mine) > 64  # more than two passes
        assert mine == [f"{name}/{s['key']}" for s in itertools.islice(alone, len(mine))]


def test_shares_change_at_their_batch():
    table = Shares([0.5, 0.5])
    table.put(10, [0.9, 0.1])
    table.put(25, [0.2, 0.8])
    assert [table.at(n)[0] for n in (0, 9, 10, 24, 25, 999)] == [0.5, 0.5, 0.9, 0.9, 0.2, 0.2]
    other = Shares([0.3, 0.7])
    other.restore(table.state())
    assert [other.at(n) for n in (0, 10, 25)] == [table.at(n) for n in (0, 10, 25)]
    for version in range(30, 30 + 2 * Shares.ROWS):  # the oldest make room
        table.put(version, [version, 0.0])
    assert [table.at(n)[0] for n in (29 + 2 * Shares.ROWS, 9999, 100)] == [29 + 2 * Shares.ROWS] * 2 + [100]


def module(roots, workers, **options):
    sources = {name: Source(roots[name], weight) for name, weight in zip(NAMES, (2.0, 1.0, 1.0), strict=True)}
    options = {"num_workers": workers, "shuffle": 4, "val_split": None, "fields": ("image", "cls"), **options}
    return ShardDataModule(data=roots["red"], sources=sources, batch_size=4, size=16, **options)


def take(data, number):
    data.setup("fit")
    return [
        (batch["key"], batch["source"].tolist(), batch["image"])
        for batch in itertools.islice(data.train_dataloader(), number)
    ]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_keys_and_sources_belong_together(roots, workers):
    for keys, sources, images in take(module(roots, workers), 12):
        assert [key.split("/")[0] for key in keys] == [NAMES[i] for i in sources]
        assert images.float().mean((2, 3)).argmax(1).tolist() == sources


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_it_stopped_with_the_shares_it_had(roots, workers, monkeypatch):
    """New shares are put while workers read ahead; a second module goes on from the state after 7 batches."""
    seen = {"n": 0}
    monkeypatch.setattr(ShardDataModule, "_batches", lambda self: self._batches_before + seen["n"])

    def read(data, first, end):
        out = []
        for number, batch in enumerate(data.train_dataloader(), first):
            out.append((batch["key"], batch["image"]))
            seen["n"] += 1
            if number == 3:
                data.shares.put(number + 1 + data.ahead, [0.0, 0.0, 1.0])
            if number + 1 == end:
                return out, data.state_dict()

    def same(a, b):
        return len(a) == len(b) and all(k == m and torch.equal(x, y) for (k, x), (m, y) in zip(a, b, strict=True))

    whole = module(roots, workers)
    whole.setup("fit")
    everything, _ = read(whole, 0, 20)
    change = 4 + whole.ahead
    assert {key.split("/")[0] for keys, _ in everything[:change] for key in keys} == {*NAMES}
    assert all(key.startswith("blue/") for keys, _ in everything[change:] for key in keys) and change < 18
    seen["n"] = 0
    first = module(roots, workers)
    first.setup("fit")
    begun, state = read(first, 0, 7)
    seen["n"] = 0
    second = module(roots, workers)
    second.setup("fit")
    second.load_state_dict(state)
    rest, _ = read(second, 7, 20)
    assert same(begun + rest, everything)


def test_other_readers_keep_the_shares(roots, monkeypatch, caplog):
    data = module(roots, 0)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    data.shares.put(5, [0.0, 1.0, 0.0])
    state = data.state_dict()
    other = module(roots, 2)
    other.setup("fit")
    other.load_state_dict({**state, "batches": 6})
    monkeypatch.setattr(ShardDataModule, "_batches", lambda self: 6)
    (batch,) = itertools.islice(other.train_dataloader(), 1)
    assert {key.split("/")[0] for key in batch["key"]} == {"green"} and "other readers than before" in caplog.text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sources": {"red": {"data": "nowhere"}}}, "data.sources.red.data: nowhere: no such shard folder"),
        ({"sources": {"red": {"data": "RED", "split": "tran"}}}, "data.sources.red.split: "),
        ({"sources": {"red": {"data": "RED", "wieght": 1}}}, "data.sources.red.wieght: "),
        ({"sources": {"red": {"data": "RED", "weight": 0}}}, "data.sources.red.weight: 0"),
        ({"follow_gap": {"every": 10}}, "data.follow_gap: "),
    ],
)
def test_what_is_refused_before_training(change, line, roots, tmp_path):
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip"}}
    student = {"class_path": "agglom.students.TimmStudent", "init_args": {"name": "vit_tiny_patch16_224"}}
    config = {
        "model": {"student": student, "teachers": {"clip": {"encoder": tiny}}, "warmup_steps": 1},
        "data": {"data": roots["red"], "batch_size": 4, "size": 224, "val_split": None, **change},
        "trainer": {"max_steps": 2, "default_root_dir": str(tmp_path / "run")},
    }
    config = yaml.safe_load(yaml.safe_dump(config).replace("RED", roots["red"]))
    found = check_config(config)
    assert len(found) == 1 and found[0].startswith(line), found


def test_weights_that_make_no_sense(roots):
    with pytest.raises(UserError, match="data.sources.a.weight: -1; valid: > 0"):
        shares_of({"a": Source("x", -1)})
    with pytest.raises(UserError, match="data.cache: given, but"):
        module(roots, 0, cache="somewhere")
    with pytest.raises(UserError, match="data.follow_gap: given, but"):
        ShardDataModule(data=roots["red"], batch_size=2, size=16, follow_gap=GapOptions())


@pytest.mark.slow
def test_a_run_favours_the_source_where_it_is_farther_from_its_teachers(roots, scenes, tmp_path):
    """Images of one colour are soon learnt, scenes are not; the floor holds."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip", "pretrained": False}}
    config = {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": vit},
            },
            "teachers": {"clip": {"encoder": tiny}},
            "warmup_steps": 2,
        },
        "data": {
            "data": str(scenes), "batch_size": 8, "size": 32, "val_split": None,
            "sources": {"scenes": {"data": str(scenes)}, "red": {"data": roots["red"], "weight": 3.0}},
            "follow_gap": {"every": 10, "strength": 0.6},
        },
        "trainer": {
            "max_steps": 60, "log_every_n_steps": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run")
        },
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "c.yaml")])
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/sources/scenes/share")]
    share = [float(row["train/sources/scenes/share"]) for row in rows]
    loss = {name: float(rows[-1][f"train/sources/{name}/loss"]) for name in ("scenes", "red")}
    ahead = 2 + 4
    assert share[: 10 + ahead] == [0.25] * (10 + ahead) and share[10 + ahead] != 0.25
    assert loss["scenes"] > loss["red"] and share[-1] > 0.4
    red = [float(row["train/sources/red/share"]) for row in rows]
    assert min(red) >= 0.4 * 0.75 - 1e-9
    assert all(a + b == pytest.approx(1) for a, b in zip(share, red, strict=True))
