"""`agglom cache` and `agglom probe`, killed 20 times each at random moments: what they leave in the end is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agglom.cache import read_cache_index


def drive(folder, args, env, seed):
    job = {"args": args, "out": str(folder), "seed": seed, "log": str(folder / "log.txt")}
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).with_name("commands.py")), str(folder / "job.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr[-3000:] + log[-3000:]
    assert done.stdout.split()[-2] == "20", done.stdout


def left_over(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def content(path):
    """Bytes; of a safetensors file its header as a table, whose order safetensors draws, and the bytes behind it."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@pytest.mark.slow
def test_a_cache(tmp_path, scenes, one_thread):
    """The same index, headers and bytes of features."""
    tiny = {"class_path": "agglom.teachers.TinyTeacher"}
    config = {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 64}},
            },
            "warmup_steps": 1,
            "teachers": {
                name: {"encoder": {**tiny, "init_args": {"name": name, "pretrained": False}}}
                for name in ("clip", "sam")
            },
        },
        "data": {"data": str(scenes), "batch_size": 8, "size": 64, "num_workers": 0},
        "trainer": {"max_steps": 3},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    args = ["cache", "--config", str(tmp_path / "c.yaml"), "--out", "OUT", "--views", "4", "--batch", "4"]
    drive(tmp_path, args, one_thread, seed=1)
    whole, killed = ({p.name: content(p) for p in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and len(whole) > 3
    assert all(killed[name] == data for name, data in whole.items())
    assert read_cache_index(tmp_path / "killed").splits and left_over(tmp_path / "killed") == []


@pytest.mark.slow
def test_a_report(tmp_path, scenes, one_thread):
    """The same numbers, though features and scores that were there already are taken up again."""
    args = ["probe", "--model", "tiny:clip", "--data", str(scenes), "--out", "OUT"]
    drive(tmp_path, [*args, "--probes", "knn,zeroshot"], one_thread, seed=2)

    def numbers(name):
        report = json.loads((tmp_path / name / "report.json").read_text())
        text = json.dumps(report, sort_keys=True).replace(str(tmp_path / name), "OUT")
        found = json.loads(text)
        return {key: found[key] for key in found if key not in ("created", "seconds", "machine")}

    def without_times(x):
        if isinstance(x, dict):
            return {k: without_times(v) for k, v in x.items() if "seconds" not in k and k not in ("created", "time")}
        return [without_times(v) for v in x] if isinstance(x, list) else x

    assert without_times(numbers("killed")) == without_times(numbers("whole"))
    assert left_over(tmp_path / "killed") == []
