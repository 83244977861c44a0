"""Probes during training: where their numbers stand, what they are of, and that training doesn't notice them."""

import csv

import pytest
import torch
import yaml
from safetensors.torch import load_file

from agglom.callbacks import OnlineProbes
from agglom.cli import main
from agglom.errors import UserError
from agglom.export import load
from agglom.probes.measure import measure


def config(scenes, root, every=None):
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip", "pretrained": False}}
    probes = {
        "class_path": "agglom.callbacks.OnlineProbes",
        "init_args": {"every": every, "probes": ["knn", "segmentation"], "train": 40, "val": 10, "test": 20},
    }
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": vit},
            },
            "teachers": {"clip": {"encoder": tiny}},
            "warmup_steps": 1,
        },
        "data": {"data": str(scenes), "batch_size": 4, "size": 32, "val_split": None, "num_workers": 0},
        "trainer": {
            "max_steps": 6,
            "log_every_n_steps": 1,
            "default_root_dir": str(root),
            "accelerator": "cpu",
            **({"callbacks": [probes]} if every else {}),
        },
    }


def fit(path, value):
    path.write_text(yaml.safe_dump(value))
    main(["fit", "--config", str(path)])
    return path.parent / path.stem


@pytest.mark.slow
def test_probes_are_logged_at_their_steps_and_training_does_not_notice(scenes, tmp_path, capsys):
    fit(tmp_path / "plain.yaml", config(scenes, tmp_path / "plain"))
    fit(tmp_path / "probed.yaml", config(scenes, tmp_path / "probed", every=3))
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("plain", "probed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    rows = list(csv.DictReader((tmp_path / "probed" / "metrics.csv").open()))
    names = [f"probe/{key}" for key in ("knn_top1", "clip/knn_top1", "segmentation_miou", "clip/segmentation_miou")]
    for name in names:
        assert [int(row["step"]) for row in rows if row[name]] == [2, 5]  # the third and the sixth step
    assert not (tmp_path / "probed" / "online_probes").exists()


@pytest.mark.slow
def test_the_numbers_are_those_of_the_averaged_weights(scenes, tmp_path):
    """Without averaging the last round is of the exported weights, which `agglom probe`'s own function measures."""
    value = config(scenes, tmp_path / "run", every=6)
    value["model"]["ema_decay"] = None
    fit(tmp_path / "run.yaml", value)
    found = measure(
        {"student": load(tmp_path / "run")},
        scenes,
        ("knn",),
        tmp_path / "cache",
        limits={"train": 40, "val": 10, "test": 20},
        size=32,
    )
    (last,) = (row for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if row["probe/knn_top1"])
    assert float(last["probe/knn_top1"]) == pytest.approx(found.results["student"]["knn"].metrics["top1"])
    through = found.results["student > clip"]["knn"].metrics["top1"]
    assert float(last["probe/clip/knn_top1"]) == pytest.approx(through)


def test_bad_options_are_one_line():
    with pytest.raises(UserError, match="did you mean knn"):
        OnlineProbes(probes=["kn"])
    with pytest.raises(UserError, match="every: 0; valid: 1 or more"):
        OnlineProbes(every=0)
