"""Checkpoints on disk: which is the newest that can be read, what is kept; what a resumed run must have in common."""

import errno
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agglom.callbacks import Checkpoints, RandomState, checkpoint_path, model_differences, newest, read_checkpoint
from agglom.callbacks import checkpoint_files as files
from agglom.errors import UserError


def state(step, **more):
    return {"global_step": step, "state_dict": {"w": torch.ones(100)}, "optimizer_states": [], "loops": {}, **more}


def save(root, step, keep=2):
    path = files.temporary_path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state(step), path)
    return files.publish(root, step, keep)


def names(root):
    return sorted(path.name for path in checkpoint_path(root).parent.iterdir())


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("keep", "kept"), [(1, []), (2, [300, 400]), (3, [200, 300, 400]), (9, [100, 200, 300, 400])])
def test_the_last_few_are_kept(tmp_path, monkeypatch, links, keep, kept):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep)
    assert names(tmp_path) == ["last.ckpt", *(f"step-{step:09d}.ckpt" for step in kept)]
    path, found, lines = newest(tmp_path)
    assert (path, found["global_step"], lines) == (checkpoint_path(tmp_path), 400, [])


def test_steps_of_a_run_that_was_resumed_before_them_go(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, 9)
    save(tmp_path, 150, 9)
    assert names(tmp_path) == ["last.ckpt", "step-000000100.ckpt", "step-000000150.ckpt"]


class Foreign:
    """What a pickle may not bring along."""


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "RuntimeError"),
        (lambda path: path.write_bytes(b"no checkpoint at all" * 50), "Error"),
        (lambda path: torch.save({"model": {}, "epoch": 3}, path), "no checkpoint of a training: it has no state_dict"),
        (lambda path: torch.save([1, 2], path), "no checkpoint of a training"),
        (lambda path: torch.save(state(1, callbacks=Foreign()), path), "UnpicklingError"),
        (lambda path: (path.unlink(), path.mkdir()), "directory"),
    ],
)
def test_an_unreadable_one_is_named_and_the_one_before_is_taken(tmp_path, spoil, word):
    save(tmp_path, 100)
    old = checkpoint_path(tmp_path).with_name("step-000000100.ckpt")
    copy = old.read_bytes()
    save(tmp_path, 200)
    checkpoint_path(tmp_path).with_name("step-000000200.ckpt").unlink()
    spoil(checkpoint_path(tmp_path))
    path, found, lines = newest(tmp_path)
    assert (path, found["global_step"]) == (old, 100) and old.read_bytes() == copy
    (line,) = lines
    assert line.startswith(f"{checkpoint_path(tmp_path)} can't be read (") and word in line and "\n" not in line
    with pytest.raises(UserError):
        read_checkpoint(checkpoint_path(tmp_path))
    old.write_bytes(b"")
    with pytest.raises(UserError) as err:
        newest(tmp_path)
    assert "last.ckpt can't be read" in str(err.value) and "step-000000100.ckpt can't be read" in str(err.value)


def test_temporaries_are_removed_and_nothing_else(tmp_path):
    save(tmp_path, 100)
    before = names(tmp_path)
    files.temporary_path(tmp_path).write_bytes(b"half")
    checkpoint_path(tmp_path).with_name("step-000000100.ckpt.tmp").write_bytes(b"half")
    files.remove_temporaries(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize(("options", "word"), [((0,), "every: 0"), ((1, 0), "minutes: 0"), ((1, None, 0), "keep: 0")])
def test_numbers_that_make_no_sense(options, word):
    with pytest.raises(UserError, match=f"checkpoint_{word}; valid:"):
        Checkpoints(*options)


def draws():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(1).tolist()


def test_generators_go_on_where_they_were(tmp_path):
    """Through a file that is read with weights_only, an odd number of normal draws included."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    draws(), random.gauss(0, 1)
    torch.save(RandomState().state_dict(), tmp_path / "a")
    expected = draws(), random.gauss(0, 1)
    draws()
    resumed = RandomState()
    resumed.load_state_dict(torch.load(tmp_path / "a", weights_only=True))
    trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=5)
    resumed.on_train_batch_start(trainer, None)
    assert (draws(), random.gauss(0, 1)) == expected
    resumed.on_train_batch_start(trainer, None)  # only once
    assert draws() != expected[0]
    seen = set()
    for rank in range(2):  # two ranks, where there was one
        resumed.load_state_dict(torch.load(tmp_path / "a", weights_only=True))
        resumed.on_train_batch_start(SimpleNamespace(world_size=2, global_rank=rank, global_step=5), None)
        seen.add(str(draws()))
    assert len(seen) == 2 and str(expected[0]) not in seen


MODEL = {
    "student": {"class_path": "S", "init_args": {"name": "a", "pretrained": True, "kwargs": {"depth": 2}}},
    "normalizer": {"class_path": "N"},
    "teachers": {"clip": {"encoder": {}, "normalizer": None}, "sam": {"encoder": {}}},
    "lr": 1e-3,
}


def changed(**sections):
    return {**MODEL, **sections}


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (MODEL, []),
        (changed(lr=1.0), []),
        (changed(student={**MODEL["student"], "init_args": {"name": "a", "pretrained": False, "new": 1}}), []),
        (
            changed(student={"class_path": "S", "init_args": {"name": "b", "kwargs": {"depth": 3}}}),
            ["model.student.init_args.name was a, is b", "model.student.init_args.kwargs.depth was 2, is 3"],
        ),
        (changed(normalizer={"class_path": "M"}), ["model.normalizer.class_path was N, is M"]),
        (
            changed(teachers={"clip": {"normalizer": {"class_path": "M"}}, "dino": {}}),
            ["teacher sam: gone", "teacher dino: new", "model.teachers.clip.normalizer was None, is M"],
        ),
    ],
)
def test_another_model_is_told_by_its_differences(now, lines):
    assert model_differences(MODEL, now) == lines
