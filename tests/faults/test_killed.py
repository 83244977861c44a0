"""Training that is killed, again and again, and resumed: the same losses and weights as if nothing had been.

Killed by SIGKILL at seeded random moments and at each stage of writing a checkpoint; the newest checkpoint is cut off
once. Dropout draws from the global generator, views from their own, and validation comes in between.
"""

import csv
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from agglom.callbacks import checkpoint_path
from agglom.cli import main

STEPS, EVERY = 26, 3
TIMES = ("train/images_per_s", "train/data_wait")  # the clock's, not the run's


def config(scenes, root, workers):
    """With a worker, of two sources whose shares follow the gap."""
    mixture = {}
    if workers:
        sources = {name: {"data": str(scenes), "weight": weight} for name, weight in (("a", 2.0), ("b", 1.0))}
        mixture = {"sources": sources, "follow_gap": {"every": 4}}
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}
    student = {"name": "vit_tiny_patch16_224", "kwargs": {**kwargs, "proj_drop_rate": 0.1}}
    tiny = {"class_path": "agglom.teachers.TinyTeacher"}
    return {
        "model": {
            "student": {"class_path": "agglom.students.TimmStudent", "init_args": student},
            "teachers": {
                name: {"encoder": {**tiny, "init_args": {"name": name, "pretrained": False}}}
                for name in ("clip", "sam")
            },
            "balance": {"class_path": "agglom.balance.TeacherDropping"},
            "warmup_steps": 2,
        },
        "data": {"data": str(scenes), "batch_size": 4, "size": 32, "val_samples": 4, "num_workers": workers} | mixture,
        "trainer": {
            "max_steps": STEPS,
            "val_check_interval": 6,
            "log_every_n_steps": 1,
            "default_root_dir": str(root),
            "accelerator": "cpu",
        },
        "checkpoint_every": EVERY,
    }


def curves(root):
    with (root / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and k not in TIMES} for row in csv.DictReader(file)]
    return [row for row in rows if len(row) > 1]


def same(a, b, path=""):
    """Where two states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        return [found for k in a.keys() | b.keys() for found in same(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for n, (x, y) in enumerate(zip(a, b, strict=True)) for found in same(x, y, f"{path}/{n}")]
    return [] if a == b else [path]


def scores(root):
    """The report's numbers of the student; its teachers are random ones here, and new in each process."""
    return json.loads((root / "probes/report.json").read_text())["models"]["student"]


def drive(folder, jobs, env):
    """How each process of the jobs ended."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), str(folder / "jobs.json")]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=1200).stdout.split()


@pytest.fixture(scope="module", params=[0, 1], ids=["no worker", "a worker"])
def runs(request, tmp_path_factory, scenes, one_thread):
    """(uninterrupted run, killed run, its log)"""
    folder = tmp_path_factory.mktemp("killed")
    paths = {}
    for name in ("whole", "killed"):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(config(scenes, folder / name, request.param)))
    rng = random.Random(request.param)
    kills = [("step", rng.randint(5, 8), rng.uniform(0, 0.1)) for _ in range(2)]
    kills += [(place, 2, 0) for place in ("half", "written", "named", "linked")]
    rng.shuffle(kills)
    jobs = [{"args": ["--config", str(paths["whole"])], "log": str(folder / "whole.log")}]
    for number, kill in enumerate([*kills, None]):
        last = ["--ckpt_path", "last"] if number else []
        job = {"args": ["--config", str(paths["killed"]), *last], "log": str(folder / "killed.log")}
        jobs.append({**job, **({"kill": kill} if kill else {})})
    jobs[4]["truncate"] = str(checkpoint_path(folder / "killed"))
    codes = drive(folder, jobs, one_thread)
    log = (folder / "killed.log").read_text()
    assert codes == ["0", *["-9"] * len(kills), "0"], log[-3000:]
    return folder / "whole", folder / "killed", log


@pytest.mark.slow
def test_the_same_loss_curve(runs):
    whole, killed, _ = runs
    assert [row for row in curves(whole) if "train/loss" in row][-1]["step"] == str(STEPS - 1)
    assert curves(killed) == curves(whole)
    shares = {row.get("train/sources/a/share") for row in curves(whole) if "train/loss" in row}
    assert shares == {None} or len(shares) > 3  # those of a mixture did change


@pytest.mark.slow
def test_the_same_state_in_the_end(runs):
    """Weights, optimiser, average, statistics, and the position of every reader and generator."""
    states = [torch.load(checkpoint_path(root), weights_only=True) for root in runs[:2]]
    assert states[0]["global_step"] == STEPS
    assert same(*({k: v for k, v in state.items() if k != "loops"} for state in states)) == []


@pytest.mark.slow
def test_nothing_is_left_over(runs):
    _, killed, log = runs
    assert not [*killed.rglob("*.tmp")]
    assert sorted(path.name for path in checkpoint_path(killed).parent.iterdir())[0] == "last.ckpt"
    assert len([*checkpoint_path(killed).parent.iterdir()]) <= 3
    assert (killed / "export" / "agglom.json").exists() or list((killed / "export").iterdir())


@pytest.mark.slow
def test_the_truncated_checkpoint_was_skipped_and_named(runs):
    _, killed, log = runs
    (line,) = [line for line in log.splitlines() if "can't be read" in line]
    assert f"{checkpoint_path(killed)} can't be read (" in line and "resuming from" in line and "step-0" in line


@pytest.mark.slow
def test_sixty_kills(tmp_path, scenes, one_thread):
    """20 times by SIGKILL in the middle of a step, 20 times by SIGTERM, 20 times while a checkpoint is written."""
    jobs, steps = [], 150
    paths = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed")}
    for name, path in paths.items():
        written = config(scenes, tmp_path / name, 0)
        written["trainer"] |= {"max_steps": steps, "val_check_interval": 40}
        path.write_text(yaml.safe_dump(written))
    rng = random.Random(7)
    kills = [("step", rng.randint(1, 6), rng.uniform(0, 0.1)) for _ in range(20)]
    kills += [("SIGTERM", rng.randint(1, 4), 0) for _ in range(20)]
    kills += [(rng.choice(["half", "written", "named", "linked"]), 1, 0) for _ in range(20)]
    rng.shuffle(kills)
    jobs = [{"args": ["--config", str(paths["whole"])], "log": str(tmp_path / "whole.log")}]
    for number, kill in enumerate([*kills, None]):
        # before the first checkpoint there is nothing to resume
        args = ["--config", str(paths["killed"]), *(["--ckpt_path", "last"] if number else [])]
        job = {"args": args, "log": str(tmp_path / "killed.log"), "fresh": str(checkpoint_path(tmp_path / "killed"))}
        jobs.append({**job, **({"kill": kill} if kill else {})})
    codes = drive(tmp_path, jobs, one_thread)
    log = (tmp_path / "killed.log").read_text()
    ended = ["0" if kill[0] == "SIGTERM" else "-9" for kill in kills]
    assert codes == ["0", *ended, "0"], log[-3000:]
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")
    states = [torch.load(checkpoint_path(tmp_path / name), weights_only=True) for name in ("whole", "killed")]
    assert states[0]["global_step"] == steps
    assert same(*({k: v for k, v in state.items() if k != "loops"} for state in states)) == []
    assert not [*(tmp_path / "killed").rglob("*.tmp")]
    for name in ("whole", "killed"):
        main(["probe", "--run", str(tmp_path / name), "--data", str(scenes), "--probes", "knn", "--size", "32"])
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_go_on_with_the_same_batches_and_draws(tmp_path, scenes, one_thread):
    """Stopped by SIGUSR1 within step 2, they end it and resume; one rank goes on with another order, and says so.

    The uninterrupted run is started as torchrun starts ranks, the other one as SLURM does, which sends that signal.
    """
    jobs, last = [], checkpoint_path(tmp_path / "stopped")
    for name, options in (
        ("whole", []),
        ("stopped", []),
        ("one", ["--ckpt_path", str(last)]),
        ("resumed", ["--ckpt_path", "last"]),
    ):
        written = config(scenes, tmp_path / ("stopped" if name == "resumed" else name), 1)
        written["trainer"] |= {"max_steps": 6, "val_check_interval": 4, "devices": 1 if name == "one" else 2}
        written["trainer"]["strategy"] = "auto" if name == "one" else "ddp_find_unused_parameters_true"
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(written))
        job = {"args": ["--config", str(path), *options], "log": str(path.with_suffix(".log"))}
        if name != "one":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                job |= {"ranks": 2, "port": free.getsockname()[1], "slurm": name != "whole"}
        jobs.append({**job, **({"kill": ["SIGUSR1", 2, 0]} if name == "stopped" else {})})
    codes = drive(tmp_path, jobs, one_thread)
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("whole", "stopped", "one", "resumed")}
    assert codes == ["0"] * 7, "".join(log[-3000:] for log in logs.values())
    assert f"stopped by SIGUSR1 after step 2; {last} holds it" in logs["stopped"]
    assert curves(tmp_path / "stopped") == curves(tmp_path / "whole")
    one = curves(tmp_path / "one")
    assert one[-1]["step"] == "5" and one[0] not in curves(tmp_path / "whole")
    assert "other readers than before" in logs["one"] and "other readers" not in logs["resumed"]
    states = [torch.load(checkpoint_path(tmp_path / name), weights_only=True) for name in ("whole", "stopped")]
    for part in (states[0]["ShardDataModule"]["order"]["drawn"], states[0]["callbacks"]["RandomState"]["ranks"]):
        assert len(part) == 2
    assert same(*({k: v for k, v in state.items() if k != "loops"} for state in states)) == []
