"""`agglom fit` as real processes: interrupted by signals and resumed it ends where an uninterrupted run does."""

import csv
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import agglom
from agglom.callbacks import checkpoint_path
from agglom.cli import main
from agglom.runs import build_teachers

STEPS = 60


def config(scenes, root, **teachers):
    tiny = {"class_path": "agglom.teachers.TinyTeacher"}
    names = teachers or {"clip": "clip", "sam": "sam"}
    return {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {
                    "name": "vit_tiny_patch16_224",
                    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
                },
            },
            "teachers": {
                key: {"encoder": {**tiny, "init_args": {"name": name, "pretrained": False}}}
                for key, name in names.items()
            },
            "warmup_steps": 2,
        },
        "data": {"data": str(scenes), "batch_size": 4, "size": 32, "val_samples": 8, "num_workers": 1},
        "trainer": {
            "max_steps": STEPS,
            "val_check_interval": 20,
            "log_every_n_steps": 1,
            "default_root_dir": str(root),
            "accelerator": "cpu",
        },
        "checkpoint_every": 3,
    }


def write(path, value):
    path.write_text(yaml.safe_dump(value))
    return path


def start(path, env, *args):
    command = [sys.executable, "-m", "agglom.cli", "fit", "--config", str(path), *args]
    with path.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def stop(path, env, root, signum, *args):
    """Start, send the signal to the whole group (as a terminal does) once a new checkpoint is there, wait."""
    last = checkpoint_path(root)
    before = last.stat().st_mtime_ns if last.exists() else 0
    process = start(path, env, *args)
    while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > before):
        time.sleep(0.005)
    assert process.poll() is None, path.with_suffix(".log").read_text()[-3000:]
    os.killpg(process.pid, signum)
    return process.wait(timeout=120)


def steps(root):
    with (root / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(row["step"]) for row in rows if row["train/loss"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes, one_thread):
    """(uninterrupted run, run that was stopped twice, what the stops returned, the config's path)."""
    folder = tmp_path_factory.mktemp("fit")
    straight = write(folder / "straight.yaml", config(scenes, folder / "straight"))
    broken = write(folder / "broken.yaml", config(scenes, folder / "broken"))
    whole = start(straight, one_thread)
    assert whole.wait(timeout=300) == 0, straight.with_suffix(".log").read_text()[-3000:]
    root = folder / "broken"
    codes = [stop(broken, one_thread, root, signal.SIGTERM)]
    at = [torch.load(checkpoint_path(root), weights_only=True)["global_step"]]
    codes.append(stop(broken, one_thread, root, signal.SIGINT, "--ckpt_path", "last"))
    at.append(torch.load(checkpoint_path(root), weights_only=True)["global_step"])
    codes.append(start(broken, one_thread, "--ckpt_path", "last").wait(timeout=300))
    return folder / "straight", root, codes, at, broken


@pytest.mark.slow
def test_exit_codes_and_words(runs):
    _, _, codes, at, path = runs
    log = path.with_suffix(".log").read_text()
    assert codes == [0, 130, 0], log[-3000:]
    assert 0 < at[0] < at[1] < STEPS  # both stops were in the middle
    assert "stopped by SIGTERM after step" in log and "stopped by SIGINT after step" in log
    assert "resume with --ckpt_path last" in log and "Traceback" not in log


@pytest.mark.slow
def test_resumed_run_ends_at_the_same_step(runs):
    straight, root, *_ = runs
    states = [torch.load(checkpoint_path(path), weights_only=True) for path in (straight, root)]
    assert [state["global_step"] for state in states] == [STEPS, STEPS]
    rates = [state["lr_schedulers"][0]["last_epoch"] for state in states]
    assert rates == [STEPS, STEPS]
    assert agglom.load(root).about["steps"] == STEPS


@pytest.mark.slow
def test_metrics_continue(runs):
    straight, root, *_ = runs
    assert steps(straight) == list(range(STEPS))
    assert steps(root) == list(range(STEPS))  # none lost, none twice


@pytest.mark.slow
def test_checkpoint_holds_no_teacher_tensor(runs):
    """By value: whatever the name, no tensor of a teacher is in the file."""
    _, root, *_ = runs
    state = torch.load(checkpoint_path(root), weights_only=True)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    def digest(tensor):
        return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()

    kept = {digest(tensor) for tensor in tensors(state) if tensor.numel() > 1}
    import lightning

    lightning.seed_everything(0, verbose=False)
    written = yaml.safe_load((root / "config.yaml").read_text())
    for encoder in build_teachers(written).values():
        foreign = {digest(t) for _, t in encoder.tensors() if t.numel() > 1 and t.unique().numel() > 1}
        assert foreign and not foreign & kept
    shapes = {tuple(t.shape) for _, t in encoder.tensors() if t.ndim > 1 and 192 in t.shape}
    assert not [t for t in tensors(state["state_dict"]) if tuple(t.shape) in shapes - {(192, 192)}]


@pytest.mark.slow
def test_a_run_in_use_is_not_overwritten(runs, capsys):
    *_, path = runs
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(path)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert err.value.code == 2 and len(lines) == 1
    assert "holds a run" in lines[0] and "--overwrite true" in lines[0]


def test_a_folder_that_the_file_system_refuses(scenes, tmp_path, monkeypatch, capsys):
    root = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config(scenes, root))
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self == root:
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("agglom")]
    assert err.value.code == 2 and len(lines) == 1
    assert f"default_root_dir: {root}: Read-only file system; valid: a folder of yours" in lines[0]


@pytest.mark.parametrize(
    "option",
    [
        {"strategy": "nope"},
        {"devices": 0},
        {"val_check_interval": 2.5},
        {"enable_checkpointing": False},
        {"limit_train_batches": 2.5},
    ],
)
def test_what_lightning_refuses_is_one_line(scenes, tmp_path, capsys, option):
    """And leaves the run alone that was to be overwritten."""
    whole = config(scenes, tmp_path / "run")
    whole["trainer"] |= option
    last = checkpoint_path(tmp_path / "run")
    last.parent.mkdir(parents=True)
    last.write_bytes(b"here")
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(write(tmp_path / "run.yaml", whole)), "--overwrite", "true"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("agglom fit: ")]
    assert err.value.code == 2 and len(lines) == 1 and lines[0].startswith("agglom fit: trainer"), lines
    assert last.read_bytes() == b"here"


@pytest.mark.slow
def test_export_with_some_adaptors(runs, tmp_path, capsys):
    _, root, *_ = runs
    main(["export", "--ckpt", str(root), "--out", str(tmp_path / "one"), "--adaptors", "sam"])
    main(["export", "--ckpt", str(root), "--out", str(tmp_path / "bare"), "--adaptors", "none"])
    assert list(agglom.load(tmp_path / "one").adaptors) == ["sam"] and not agglom.load(tmp_path / "bare").adaptors
    capsys.readouterr()
    with pytest.raises(SystemExit) as err:
        main(["export", "--ckpt", str(root), "--out", str(tmp_path / "none"), "--adaptors", "smo"])
    assert err.value.code == 2 and "adaptors: 'smo'; valid: clip, sam (did you mean sam?)" in capsys.readouterr().err


@pytest.mark.slow
def test_other_teachers_are_refused(runs, scenes, tmp_path, capsys):
    _, root, *_ = runs
    before = (root / "teachers.json").read_text()
    other = write(tmp_path / "other.yaml", config(scenes, root, clip="clip", dino="dino"))
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(other), "--ckpt_path", "last"])
    text = capsys.readouterr().err
    assert err.value.code == 2
    assert "teacher sam: gone" in text and "teacher dino: new" in text
    assert (root / "teachers.json").read_text() == before


@pytest.mark.slow
def test_another_student_or_normaliser_is_refused(runs, scenes, tmp_path, capsys):
    """In one line with all differences, before anything is built or written."""
    _, root, *_ = runs
    before = {path: path.read_bytes() for path in root.glob("*.*")}
    other = config(scenes, root)
    other["model"]["student"]["init_args"]["kwargs"]["depth"] = 3
    other["model"]["normalizer"] = {"class_path": "agglom.targets.Identity"}
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(write(tmp_path / "other.yaml", other)), "--ckpt_path", "last"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert err.value.code == 2 and "last.ckpt is of another model: " in line
    assert "model.student.init_args.kwargs.depth was 2, is 3" in line and "model.normalizer" in line
    assert {path: path.read_bytes() for path in root.glob("*.*")} == before


@pytest.mark.parametrize("given", ["last", "FILE"])
def test_no_readable_checkpoint(scenes, tmp_path, capsys, given):
    path = checkpoint_path(tmp_path / "run")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    written = write(tmp_path / "run.yaml", config(scenes, tmp_path / "run"))
    with pytest.raises(SystemExit) as err:
        main(["fit", "--config", str(written), "--ckpt_path", str(path) if given == "FILE" else "last"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert err.value.code == 2 and f"ckpt_path: {path} can't be read (empty file); " in line
