"""Fingerprints: what changes them and what must not. The manifest of a run, and what forbids a resume."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import timm
import torch
from torch import nn

from agglom.teachers import TimmTeacher, compare, fingerprint, manifest
from agglom.teachers.provenance import save


@pytest.fixture
def teachers() -> dict[str, TimmTeacher]:
    torch.manual_seed(0)
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    make = {"name": "vit_tiny_patch16_224", "pretrained": False, "kwargs": kwargs, "input_size": 32}
    return {"clip": TimmTeacher(**make), "dino": TimmTeacher(**make)}


def test_by_hand():
    tensor = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"w|float32|(1, 2)|" + tensor.numpy().tobytes()).hexdigest()
    assert fingerprint({"w": tensor}) == expected


def test_depends_on_everything_that_is_a_weight():
    base = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    variants = [
        {**base, "a": base["a"] + 1e-6},
        {**base, "a": base["a"].view(3, 2)},
        {**base, "a": base["a"].double()},
        {"b": base["a"], "n": base["n"]},
        {**base, "n": torch.tensor(4)},
        {**base, "m": torch.zeros(0)},
    ]
    prints = {fingerprint(base), *map(fingerprint, variants)}
    assert len(prints) == len(variants) + 1


def test_depends_on_nothing_else():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "flag": torch.tensor(True)}
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)
    assert fingerprint({**base, "a": base["a"].T.contiguous().T}) == fingerprint(base)  # strides
    assert fingerprint({**base, "a": nn.Parameter(base["a"])}) == fingerprint(base)


def test_modules_count_parameters_and_buffers():
    module = nn.BatchNorm2d(3)
    before = fingerprint(module)
    assert before == fingerprint(module.state_dict())
    module.running_mean += 1
    assert fingerprint(module) != before


def test_teachers_have_a_fingerprint_though_no_state_dict(teachers):
    clip, dino = teachers.values()
    assert fingerprint(clip) != fingerprint(dino) != fingerprint(nn.Module())
    assert fingerprint(copy.deepcopy(clip)) == fingerprint(clip)


def test_manifest_is_json(teachers, tmp_path):
    save(teachers, tmp_path / "teachers.json")
    read = json.loads((tmp_path / "teachers.json").read_text())
    assert read == manifest(teachers)
    entry = read["teachers"]["clip"]
    assert entry["class"].endswith("TimmTeacher") and entry["source"] == "random" and len(entry["sha256"]) == 64
    assert entry["dims"] == {"summary": 32, "spatial": 32}
    assert entry["input"]["size"] == [32, 32] and entry["input"]["stride"] == 16
    assert read["versions"]["timm"] == timm.__version__ and {"torch", "open_clip_torch"} <= set(read["versions"])


def test_the_same_set_may_resume(teachers):
    old = manifest(teachers)
    new = manifest(dict(reversed(teachers.items())))
    new["versions"]["timm"] = "9.9"
    new["teachers"]["clip"]["source"] = "/moved/elsewhere.safetensors"
    assert compare(old, new) == []


def test_another_set_may_not(teachers):
    old = manifest(teachers)
    gone = manifest({"clip": teachers["clip"]})
    assert compare(old, gone) == ["teacher dino: gone (was random)"]
    assert compare(gone, old) == ["teacher dino: new (random)"]
    next(teachers["clip"].network.parameters()).data.add_(1)
    lines = compare(old, manifest(teachers))
    assert len(lines) == 1 and lines[0].startswith("teacher clip: sha256 was ")


def test_size_and_precision_are_named_each(teachers):
    old, new = manifest(teachers), manifest(teachers)
    new["teachers"]["clip"]["input"]["size"] = [64, 64]
    assert compare(old, new)[0].startswith("teacher clip: input was ")
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    low = TimmTeacher(name="vit_tiny_patch16_224", pretrained=False, kwargs=kwargs, input_size=32, dtype="bf16")
    assert compare(old, manifest({**teachers, "clip": low})) == ["teacher clip: dtype was fp32, is bf16"]
