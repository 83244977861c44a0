"""Extraction as it goes wrong: processes that are killed, that share the work, that die; broken files; full disks.

Features of a process that was stopped must be those of one that wasn't, and nothing that is there is computed again.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from agglom.data import write_index, write_shard
from agglom.errors import UserError
from agglom.features import Answer, Features
from agglom.probes import extract as room
from agglom.probes.features import FeatureSet
from agglom.probes.gather import gather, splits_of
from agglom.probes.source import Source
from agglom.probes.store import Parts, read_meta, select

SCRIPT = Path(__file__).parent / "extraction_job.py"
spec = importlib.util.spec_from_file_location("extraction_job", SCRIPT)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)

COUNT, PARTS = 60, 8  # the split in parts of 7 and 8


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def write(root, count=COUNT, each=25, classes=None, cls=lambda i: i % 3, split="train"):
    samples = [{"key": f"{i:03d}", "image": picture(i), "cls": cls(i)} for i in range(count)]
    stretches = [samples[at : at + each] for at in range(0, count, each)]
    write_index(
        root,
        {split: [write_shard(root / f"{split}-{n:06d}.tar", some) for n, some in enumerate(stretches)]},
        classes=classes,
    )
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(room, "PART", job.PART)


def extract(data, cache, model=None, rank=0, world_size=1, **changes):
    model = model or job.Student()
    found = room.extract(
        job.wanted(model, **changes), Source.open(data, fields=("cls",)), "train", cache, batch=job.BATCH, rank=rank,
        world_size=world_size,
    )  # fmt: skip
    return found[0], found[1], model


def start(data, cache, log, rank=0, world_size=1, die_after=-1):
    argv = [sys.executable, SCRIPT, data, cache, log, str(rank), str(world_size), str(die_after)]
    return subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def seen(log):
    return sum(map(int, log.read_text().split()))


def same(found, expected):
    assert set(found) == set(expected)
    for name, features in expected.items():
        for field in fields(FeatureSet):
            ours, theirs = getattr(found[name], field.name), getattr(features, field.name)
            assert (ours is None) == (theirs is None), (name, field.name)
            if theirs is not None:
                np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return extract(data, tmp_path_factory.mktemp("undisturbed"))[1]  # in one part


def test_features_are_the_models_through_adaptors_too(data, undisturbed):
    model = job.Student()
    images = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(COUNT)]).float() / 255
    close = {"rtol": 1e-5, "atol": 1e-5}
    own, through = model(images), model.adaptors["sam"](images)
    found = undisturbed["student > sam"]
    assert found.summary is None and found.block_means is None
    np.testing.assert_allclose(found.mean, through.spatial.mean((2, 3)), **close)
    np.testing.assert_allclose(found.spatial, through.spatial.half(), atol=2e-3, rtol=1e-3)
    found = undisturbed["student"]
    np.testing.assert_allclose(found.summary, own.summary, **close)
    np.testing.assert_allclose(found.mean, own.spatial.mean((2, 3)), **close)
    blocks = model.answer(images, blocks=2).blocks
    np.testing.assert_allclose(found.block_summaries, torch.stack([b.summary for b in blocks], 1), **close)
    np.testing.assert_allclose(found.block_means, torch.stack([b.spatial.mean((2, 3)) for b in blocks], 1), **close)
    np.testing.assert_allclose(found.block_means[:, -1], found.mean, **close)


def test_one_pass_a_batch_and_none_for_what_is_there(data, tmp_path, small_parts, undisturbed):
    _, found, model = extract(data, tmp_path)
    assert sum(model.passes) == COUNT and max(model.passes) == job.BATCH
    same(found, undisturbed)
    assert extract(data, tmp_path)[2].passes == []
    narrow = extract(data, tmp_path, blocks=1, spatial=False)  # less than what is stored
    assert narrow[2].passes == []
    np.testing.assert_array_equal(narrow[1]["student"].block_means[:, 0], found["student"].block_means[:, 1])
    assert narrow[1]["student"].spatial is None
    wide = extract(data, tmp_path, blocks=3)  # more: the student again, and nothing through its adaptor
    assert sum(wide[2].passes) == COUNT and wide[1]["student"].block_means.shape[1] == 3
    same({"student > sam": wide[1]["student > sam"]}, {"student > sam": found["student > sam"]})


@pytest.mark.slow
def test_a_killed_process_continues_where_it_was(data, tmp_path, undisturbed):
    log, cache = tmp_path / "log", tmp_path / "cache"
    killed = start(data, cache, log, die_after=9)  # in the first batch of the fifth part
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    before = seen(log)
    there = len(list(cache.glob(".partial-student-*/*.safetensors")))
    assert there == 4 and before == 4 + sum(COUNT * (k + 1) // PARTS - COUNT * k // PARTS for k in range(4))
    again = start(data, cache, log)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert seen(log) == COUNT + 4  # the batch that it died in, and nothing else
    _, found, model = extract(data, cache)
    assert model.passes == []
    same(found, undisturbed)
    assert not list(cache.glob(".*"))


@pytest.mark.slow
def test_two_processes_share_the_parts_out(data, tmp_path, undisturbed):
    cache, logs = tmp_path / "cache", [tmp_path / "log0", tmp_path / "log1"]
    both = [start(data, cache, log, rank, 2) for rank, log in enumerate(logs)]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    _, found, model = extract(data, cache)
    assert model.passes == []
    same(found, undisturbed)
    # the first also does what a slow second has not begun
    assert COUNT <= sum(seen(log) for log in logs if log.exists()) <= 2 * COUNT and seen(logs[0]) <= COUNT


@pytest.mark.slow
def test_a_dead_rank_holds_nobody_up(data, tmp_path, small_parts, undisturbed):
    cache, log = tmp_path / "cache", tmp_path / "log"
    dead = start(data, cache, log, 1, 2, die_after=5)  # after two of its four parts
    dead.communicate(timeout=300)
    assert dead.returncode == -signal.SIGKILL
    left = sorted(path.name for path in cache.glob(".partial-student-*/*.safetensors"))
    assert left == ["part-000001.safetensors", "part-000003.safetensors"]
    _, found, model = extract(data, cache, rank=0, world_size=2)
    same(found, undisturbed)
    assert sum(model.passes) == COUNT - 2 * job.PART  # both are of 8 images, others of 7


def test_a_rank_that_comes_when_all_is_joined_computes_nothing(data, tmp_path, small_parts, monkeypatch):
    """Rank 1 has looked before rank 0 joined: then the parts are gone, and what it lacks is there all the same."""
    missing = room._Pass.missing
    model = job.Student()

    def late(self):
        found = missing(self)
        if self.models["student"].model is model:
            extract(data, tmp_path)
        return found

    monkeypatch.setattr(room._Pass, "missing", late)
    extract(data, tmp_path, model, rank=1, world_size=2)
    assert model.passes == [] and not list(tmp_path.glob(".partial-*"))


def test_waiting_is_for_what_is_wanted_and_has_an_end(data, tmp_path, small_parts, monkeypatch):
    extract(data, tmp_path, blocks=0)  # there, but without the blocks
    wait = room._Pass.wait
    monkeypatch.setattr(room._Pass, "wait", lambda self: wait(self, patience=0.3))
    with pytest.raises(UserError, match="rank 0 has not joined them"):
        extract(data, tmp_path, rank=1, world_size=2)


def test_a_broken_part_alone_is_made_again(data, tmp_path, small_parts, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "join", lambda self: None)
        with pytest.raises(AssertionError):  # nothing was joined
            extract(data, tmp_path)
    broken = sorted(tmp_path.glob(".partial-student-*/*.safetensors"))[3]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{broken.name}: is broken .*; removed, run it again") as err:
        extract(data, tmp_path)
    assert "\n" not in str(err.value)
    _, found, model = extract(data, tmp_path)
    assert sum(model.passes) == len(range(COUNT * 3 // PARTS, COUNT * 4 // PARTS))
    same(found, undisturbed)


def test_a_missing_array_is_made_again(data, tmp_path, undisturbed):
    _, _, model = extract(data, tmp_path)
    next(tmp_path.glob("student-*/mean.npy")).unlink()
    _, found, model = extract(data, tmp_path)
    assert sum(model.passes) == COUNT
    same(found, undisturbed)


def test_a_full_disk_is_one_line_and_costs_no_part(data, tmp_path, small_parts, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(UserError, match="can't be written .*No space left.*; make room") as err:
            extract(data, tmp_path)
    assert "\n" not in str(err.value)
    assert not list(tmp_path.glob(".joined-*"))
    assert extract(data, tmp_path)[2].passes == []


def test_parts_of_another_length_are_not_mixed_in(data, tmp_path, monkeypatch, undisturbed):
    with monkeypatch.context() as patch:
        patch.setattr(room, "PART", 20)
        patch.setattr(Parts, "join", lambda self: None)
        with pytest.raises(AssertionError):
            extract(data, tmp_path)
    monkeypatch.setattr(room, "PART", job.PART)
    same(extract(data, tmp_path)[1], undisturbed)


def test_blocks_only_where_they_have_one_shape():
    def block(channels, side, summary=True):
        return Features(torch.zeros(2, channels) if summary else None, torch.zeros(2, channels, side, side))

    assert room._blocks([block(4, 2)]) == {} and room._blocks([]) == {}
    assert room._blocks([block(4, 4), block(8, 2)]) == {} and room._blocks([block(4, 4), block(4, 2)]) == {}
    assert set(room._blocks([block(4, 2), block(4, 2)])) == {"block_summaries", "block_means"}
    assert set(room._blocks([block(4, 2, False), block(4, 2, False)])) == {"block_means"}


def test_blocks_that_are_not_finite_are_named(data, tmp_path):
    class Broken(job.Student):
        def answer(self, images, **options):
            found = super().answer(images, **options)
            bad = found.blocks[0].spatial.clone()
            bad[1] = float("inf")
            return Answer(found.features, [Features(None, bad), found.blocks[1]], found.adaptors)

    with pytest.raises(UserError, match="model student: block_means features are not finite for sample 001"):
        extract(data, tmp_path, Broken())


def test_labels_that_the_index_does_not_name(tmp_path):
    root = write(tmp_path / "d", classes=("a", "b"), cls=lambda i: int(i == 7) * 2)
    with pytest.raises(UserError, match=r"sample 007: class value \(cls 2; valid: 0 to 1, the index's classes\)"):
        extract(root, tmp_path / "c")
    root = write(tmp_path / "e", classes=("a", "b"), cls=lambda i: [1] if i else [])
    targets, _, _ = extract(root, tmp_path / "c")
    assert targets.multi_label and targets.labels.sum(0).tolist() == [0, COUNT - 1]


def test_selected_rows_of_a_mapped_array_stay_on_disk(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 3, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c")
    rows = np.array([4, 3, 7, 7, 49, 0])
    assert not isinstance(select(mapped, rows).base, np.memmap)
    monkeypatch.setattr("agglom.probes.store.LARGE", 60)  # 2 rows at once
    there = select(mapped, rows)
    assert isinstance(there, np.memmap) and [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(there, values[rows])
    assert isinstance(select(values, rows), np.ndarray) and not isinstance(select(values, rows), np.memmap)


def test_a_val_split_made_of_train_is_mapped_too(data, tmp_path, monkeypatch):
    monkeypatch.setattr("agglom.probes.store.LARGE", 100)
    root = tmp_path / "two"
    write(root, split="train")
    info = write_shard(root / "val-000000.tar", [{"key": "v", "image": picture(99), "cls": 0}])
    shards = [
        write_shard(
            root / "train-000000.tar", [{"key": f"{i:03d}", "image": picture(i), "cls": i % 3} for i in range(COUNT)]
        )
    ]
    write_index(root, {"train": shards, "val": [info]})
    source = Source.open(root, fields=("cls",))
    got = gather({"student": job.Student()}, source, splits_of(source.index), [], {}, tmp_path / "c")
    train, val = got.features["student"]["train"].summary, got.features["student"]["val"].summary
    assert isinstance(train, np.memmap) and isinstance(val, np.memmap) and (len(train), len(val)) == (48, 12)
    images = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in (4, 9)]).float() / 255
    np.testing.assert_allclose(val[:2], job.Student()(images).summary, rtol=1e-5, atol=1e-5)
    assert read_meta(next((tmp_path / "c").glob("student-train-*"))) is not None
