"""Shared fixtures: a tiny shard folder, a tiny training module and a trainer for it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion scenes of made-up garments: 96 train, 32 val, 32 test."""
    from agglom.data.scenes import write_scenes

    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = np.zeros((60, 28, 28), dtype=np.uint8)
        for image in images:
            (top, left), (height, width) = rng.integers(1, 9, 2), rng.integers(10, 19, 2)
            image[top : top + height, left : left + width] = rng.integers(120, 256, (height, width))
        (root / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 60, 28, 28) + images.tobytes())
        labels = (np.arange(60) % 10).astype(np.uint8)
        (root / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 60) + labels.tobytes())
    out = root / "scenes"
    write_scenes(out, source=root, train=96, val=32, test=32, size=48, shard_size=32, workers=1)
    return out


@pytest.fixture
def tiny_student():
    """A function: options -> a ViT of 2 blocks and width 32 on 32 px."""
    import torch

    from agglom.students import TimmStudent

    def build(seed: int = 0, **options):
        torch.manual_seed(seed)
        kwargs = {**VIT, **options.pop("kwargs", {})}
        return TimmStudent(**{"name": "vit_tiny_patch16_224", "kwargs": kwargs, **options})

    return build


@pytest.fixture
def tiny_teachers():
    """A function: names -> random frozen teachers: clip and dino with a summary, sam without."""
    import torch

    from agglom.heads import TeacherConfig
    from agglom.teachers import TinyTeacher

    def build(*names: str, seed: int = 0, **options):
        torch.manual_seed(seed)
        return {
            name: TeacherConfig(TinyTeacher(name, pretrained=False), **options)
            for name in names or ("clip", "dino", "sam")
        }

    return build


@pytest.fixture
def quiet_trainer(tmp_path: Path):
    """A function: options -> a Lightning trainer without loggers, bars and checkpoints."""
    import lightning.pytorch as pl

    def build(**options):
        quiet = {
            "accelerator": "cpu",
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path / "trainer"),
        }
        return pl.Trainer(**{**quiet, **options})

    return build


@pytest.fixture(scope="session")
def one_thread() -> dict[str, str]:
    """The environment of a child process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
