"""The command line: exit codes, one line an error, nothing heavy imported for help, nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agglom.cli import COMMANDS, HEAVY, main
from agglom.data import write_index, write_shard


def run(capsys, *args):
    """Exit code, stdout, stderr lines of `agglom ARGS`, in this process."""
    code = 0
    try:
        main(list(map(str, args)))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err.splitlines()


def shards(root: Path, splits=("train", "val"), **fields) -> Path:
    """A shard of two pictures a split."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    found = {}
    for split in splits:
        samples = ({"key": f"{i:09d}", "image": pixels + i, **fields} for i in range(2))
        found[split] = [write_shard(root / f"{split}-000000.tar", samples)]
    write_index(root, found, licence="CC0", source="grey squares")
    return root


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "shards")
    (tmp_path / "a-file").write_text("not a folder")
    return tmp_path


def test_the_collector_works_again_after_the_imports():
    code = (
        "import gc, sys; from agglom import cli; cli._load('agglom.plan'); frozen = gc.get_freeze_count();"
        "cli._load('agglom.plan'); assert gc.isenabled() and frozen == gc.get_freeze_count() > 1000"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(HEAVY) < set(COMMANDS)


def test_help_needs_nothing_heavy():
    """Under a second is a matter of what is imported."""
    code = (
        "import sys; from agglom.cli import main; main(['--help']); import agglom.commands;"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "args, parts",
    [
        (["frob"], ["agglom frob: unknown command", "valid:"]),
        (["prob"], ["did you mean probe?"]),
        (["data", "scene"], ["did you mean scenes?"]),
        (["data", "imagefolder", "--source", "nowhere", "--out", "x"], ["nowhere: no such folder"]),
        (
            ["data", "imagefolder", "--source", "shards", "--out", "x", "--vall", "1"],
            ["vall", "--help lists the options"],
        ),
        (["data", "coco", "--source", "nowhere", "--out", "x"], ["nowhere: no such folder"]),
        (["data", "coco", "--out", "x"], ["--source DIR", "--images DIR"]),
        (["data", "ade", "--source", "shards", "--out", "x"], ["neither images/training nor"]),
        (["data", "voc", "--source", "shards", "--out", "x"], ["no folder JPEGImages"]),
        (["data", "csv", "--source", "a-file", "--out", "x"], ["no column image"]),
        (["data", "csv", "--out", "x"], ["source", "--help lists the options"]),
        (["export", "--ckpt", "none.ckpt", "--out", "x"], ["none.ckpt does not exist", "RUN/checkpoints/last.ckpt"]),
        (["export", "--ckpt", "shards", "--out", "x"], ["does not exist"]),
        (["export", "--ckpt", "none.ckpt", "--out", "shards"], ["out: shards holds something else"]),
        (["report", "shards"], ["shards", "report.json"]),
        (["report", "nowhere"], ["nowhere", "report.json"]),
        (["info", "nonsense"], ["nonsense: no such folder", "valid:"]),
        (["info", "a-file"], ["a-file: not recognised"]),
        (["info", "timm:resnet10tt"], ["resnet10tt", "did you mean resnet10t?"]),
        (["info", "frob:x"], ["no reference", "valid: timm:NAME"]),
        (["probe"], ["--run DIR", "--model REF"]),
        (["probe", "--run", "nowhere"], ["nowhere", "missing"]),
        (["probe", "--model+=tiny:clop", "--data", "shards", "--out", "x"], ["tiny", "clip"]),
        (["probe", "--model+=timm:resnet10tt", "--data", "shards", "--out", "x"], ["resnet10t"]),
        (["probe", "--model+=nothing", "--data", "shards", "--out", "x"], ["nothing", "no such folder"]),
        (["probe", "--model+=tiny:sam", "--data", "shards", "--out", "x", "--probes", "knm"], ["knm", "knn"]),
    ],
)
def test_errors_are_one_line_and_exit_2(args, parts, work, capsys):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    code, out, err = run(capsys, *args)
    assert code == 2 and len(err) == 1 and err[0].startswith(f"agglom {args[0]}: "), (out, err)
    assert all(part in err[0] for part in parts), err[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing lost


def test_a_table_becomes_shards(work, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(work / "one.png")
    (work / "table.csv").write_text("image,label,caption\none.png,cat;dog,a pair\n")
    code, out, err = run(capsys, "data", "csv", "--source", "table.csv", "--out", "x", "--licence", "CC0")
    assert code == 0 and out.strip() == "x/index.json", err
    code, out, _ = run(capsys, "info", "x")
    assert code == 0 and "fields cls, image, txt" in out and "licence CC0" in out and "classes: cat, dog" in out


def test_every_writer_lists_its_options(capsys):
    words = {"coco": "--panoptic", "ade": "--source", "voc": "--image_set", "csv": "--seg_classes"}
    for writer, option in words.items():
        code, out, _ = run(capsys, "data", writer, "--help")
        assert code == 0 and option in out and "--overwrite" in out


@pytest.mark.parametrize("out", ["a-file", "a-file/below"])
def test_output_that_can_not_be_written(out, work, capsys):
    """A path below a file: read-only even for root."""
    (work / "photos").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(work / "photos" / "one.png")
    code, _, err = run(capsys, "data", "imagefolder", "--source", "photos", "--out", out)
    assert code == 2 and len(err) == 1 and "a-file" in err[0], err
    code, _, err = run(capsys, "probe", "--model+=tiny:sam", "--data", "shards", "--out", out, "--probes", "knn")
    assert code == 2 and len(err) == 1 and "a-file" in err[0], err
    assert (work / "a-file").read_text() == "not a folder"


def test_an_existing_data_set_is_kept(work, capsys):
    (work / "photos").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(work / "photos" / "one.png")
    before = (work / "shards" / "index.json").read_bytes()
    code, _, err = run(capsys, "data", "imagefolder", "--source", "photos", "--out", "shards")
    assert code == 2 and "holds shards already" in err[0] and (work / "shards" / "index.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage, part",
    [
        (lambda root: (root / "index.json").unlink(), "index.json"),
        (lambda root: (root / "index.json").write_text("{"), "not readable as JSON"),
        (lambda root: (root / "train-000000.tar").unlink(), "shards are missing"),
        (lambda root: (root / "train-000000.tar").write_bytes(b""), "empty files"),
    ],
)
def test_damaged_shards(damage, part, work, capsys):
    damage(work / "shards")
    code, _, err = run(capsys, "probe", "--model+=tiny:sam", "--data", "shards", "--out", "x")
    assert code == 2 and len(err) == 1 and part in err[0], err


def test_probe_says_which_split_or_field_is_missing(work, capsys):
    shards(work / "alone", splits=("train",), cls=0)
    code, _, err = run(capsys, "probe", "--model+=tiny:sam", "--data", "alone", "--out", "x", "--probes", "knn")
    assert code == 2 and len(err) == 1 and "splits train" in err[0] and "val or test" in err[0], err
    code, _, err = run(capsys, "probe", "--model+=tiny:sam", "--data", "shards", "--out", "x", "--probes", "knn")
    assert code == 2 and "cls" in err[-1], err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--model", "tiny:sam"], ["tiny:sam"]),
        (["--model=tiny:sam", "--model", "tiny:clip"], ["tiny:sam", "tiny:clip"]),
        (["--model+=tiny:sam", "--model", "tiny:clip"], ["tiny:sam", "tiny:clip"]),
        (["--model", "[tiny:sam, tiny:clip]"], ["tiny:sam", "tiny:clip"]),
    ],
)
def test_probe_takes_every_model_that_is_named(words, found, work, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("agglom.probing.probe_models", lambda refs, **options: seen.append(refs) or work)
    run(capsys, "probe", *words, "--data", "shards", "--out", "x")
    assert seen == [found]


def test_info(work, capsys):
    code, out, _ = run(capsys, "info", "shards")
    assert code == 0 and "grey squares, licence CC0" in out and "train: 2 samples in 1 shards, fields image" in out
    code, out, _ = run(capsys, "info", "tiny:clip")
    assert code == 0 and "64 x 64 px" in out and "summary: 128" in out and "192 channels, stride 8, 8 x 8 cells" in out
    code, out, _ = run(capsys, "info", "timm:resnet10t")  # shapes alone: no hub
    assert code == 0 and "summary: 512" in out and "stride 32" in out
    code, out, _ = run(capsys, "info", "--pattern", "dinov2")
    assert code == 0 and "timm:vit_small_patch14_dinov2.lvd142m" in out
    code, out, _ = run(capsys, "info")
    assert code == 0 and "tiny:clip" in out and "agglom info --pattern TEXT" in out


def test_info_on_a_run_and_an_export(work, capsys):
    teachers = {"teachers": {"clip": {"source": "tiny:clip", "licence": "Apache-2.0", "sha256": "ab" * 32}}}
    (work / "run").mkdir()
    (work / "run" / "teachers.json").write_text(json.dumps(teachers))
    code, out, _ = run(capsys, "info", "run")
    assert code == 0 and "not finished" in out and "teacher clip: tiny:clip, licence Apache-2.0, sha256 abab" in out
    about = {
        "agglom": "0",
        "steps": 7,
        "student": {"name": "vit", "summary_tokens": 2, "registers": 0},
        "input": {"size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "stride": 8},
        **teachers,
    }
    (work / "run" / "export").mkdir()
    (work / "run" / "export" / "agglom.json").write_text(json.dumps(about))
    code, out, _ = run(capsys, "info", "run")
    assert code == 0 and "vit, 7 steps" in out and "input: 64 px" in out and "summary tokens: 2" in out
    (work / "run" / "export" / "agglom.json").write_text("{")
    code, _, err = run(capsys, "info", "run")
    assert code == 2 and len(err) == 1 and "not JSON" in err[0]
