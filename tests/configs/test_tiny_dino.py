"""The recipe of self-distillation alone, for a few steps: it learns, and its assignments go on telling images apart."""

import csv
import logging
import math
from importlib.resources import files
from pathlib import Path

import pytest

from agglom.cli import main
from agglom.selfdistill import Dino
from agglom.selfdistill.dino import LEAST_INFORMATION, LEAST_STD

RECIPE = Path(str(files("agglom.configs"))).resolve() / "recipes" / "tiny_dino.yaml"
PROTOTYPES = 256


@pytest.mark.slow
def test_it_does_not_collapse(scenes, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dino, "grace", 0)
    options = {
        "data.data": scenes,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "model.warmup_steps": 10,
        "model.objectives.dino.init_args.freeze_last_steps": 10,
        "trainer.max_steps": 40,
        "trainer.log_every_n_steps": 10,
        "trainer.default_root_dir": tmp_path / "run",
    }
    with caplog.at_level(logging.WARNING, "agglom.fit"):
        main(["fit", "--config", str(RECIPE), *(f"--{key}={value}" for key, value in options.items())])
    assert not [record for record in caplog.records if "collapse" in record.getMessage()]
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = [row for row in rows if "train/dino/loss" in row]
    assert len(rows) == 4
    for row in rows:
        for kind in ("dino", "ibot"):
            one, all_of_them = (row[f"train/dino/{kind}_{name}"] for name in ("mean_entropy", "entropy_of_mean"))
            assert 0 < one < all_of_them <= math.log(PROTOTYPES) + 1e-3
            assert all_of_them - one > 5 * LEAST_INFORMATION * math.log(PROTOTYPES)
        assert 5 * LEAST_STD < row["train/dino/feature_std"] <= 1
    assert rows[-1]["train/dino/ibot_loss"] < 0.98 * rows[0]["train/dino/ibot_loss"]
