"""Checkpoints, exports, caches and weights that lie or run something: one line that names the file, in time.

A pickle that would run a command leaves no mark wherever a command takes a file.
"""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from malice import SAFETENSORS, Evil, plain_pickle, torch_pickle
from PIL import EpsImagePlugin, Image
from small_run import config, write

from agglom.cache.command import cache_teachers
from agglom.cache.layout import read_cache_index
from agglom.callbacks.checkpoint_files import checkpoint_path
from agglom.cli import main
from agglom.data import read_index
from agglom.data.faults import BadSample
from agglom.data.samples import decode_sample

PICKLES = {"a bare pickle": plain_pickle, "torch's zip": torch_pickle}


def test_the_payload_works(tmp_path):
    """What the other tests look for is what would happen."""
    pickle.loads(plain_pickle(tmp_path / "p", tmp_path / "a").read_bytes())
    torch.load(torch_pickle(tmp_path / "p", tmp_path / "b"), weights_only=False)
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------------ checkpoints


def spoil_checkpoint(content):
    return lambda path, mark: torch.save(content(torch.load(path, weights_only=True)), path)


CHECKPOINTS = {
    **{name: make for name, make in PICKLES.items()},
    "empty": lambda path, mark: path.write_bytes(b""),
    "cut": lambda path, mark: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path, mark: path.write_text("hello"),
    "random bytes": lambda path, mark: path.write_bytes(bytes(range(256)) * 100),
    "another program's": spoil_checkpoint(lambda state: state["state_dict"]),
    "a list": spoil_checkpoint(lambda state: [state]),
    "a tensor": spoil_checkpoint(lambda state: torch.zeros(3)),
    "safetensors": lambda path, mark: path.write_bytes(SAFETENSORS["a header of 2^60 bytes"](b"\0" * 64)),
    "a folder": lambda path, mark: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(here, run, refused, name):
    last = checkpoint_path(run)
    for other in last.parent.glob("step-*"):
        other.unlink()
    CHECKPOINTS[name](last, here / "marked")
    assert "last.ckpt" in refused("fit", "--config", run / "config.yaml", "--ckpt_path", last)
    refused("fit", "--config", run / "config.yaml", "--ckpt_path", "last", "--trainer.default_root_dir", run)
    if last.is_file():
        assert "last.ckpt" in refused("export", "--ckpt", last, "--out", here / "out")
    assert "last.ckpt" in refused("export", "--ckpt", run, "--out", here / "out")
    assert not (here / "out").exists()


def test_a_checkpoint_of_another_model_is_not_exported(here, run, refused):
    last = checkpoint_path(run)
    state = torch.load(last, weights_only=True)
    state["state_dict"] = {"evil": torch.zeros(1)}
    torch.save(state, last)
    assert "of another model" in refused("export", "--ckpt", last, "--out", here / "out")


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize(
    "ref", ["{}", "timm:{}", "torch:{}", "open_clip:{}", "tiny:{}", "timm:local-dir:{}", "open_clip:local-dir:{}"]
)
def test_a_pickle_as_a_model(here, scenes, refused, name, ref):
    PICKLES[name](here / "evil.pt", here / "marked")
    refused("probe", "--model", ref.format(here / "evil.pt"), "--data", scenes, "--out", here / "out")
    refused("info", ref.format(here / "evil.pt"))


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_pickle_in_a_local_folder(here, scenes, refused, run, name, file):
    """Where timm and open_clip look for weights by themselves."""
    folder = Path(shutil.copytree(run / "export", here / "folder"))
    (folder / "model.safetensors").unlink()
    PICKLES[name](folder / file, here / "marked")
    refused("probe", "--model", folder, "--data", scenes, "--out", here / "out")
    refused("probe", "--model", f"timm:local-dir:{folder}", "--data", scenes, "--out", here / "out")


WEIGHTS = {
    "TimmTeacher": {"name": "resnet10t"},
    "OpenClipTeacher": {"name": "ViT-B-32"},
    "SamTeacher": {"name": "samvit_base_patch16"},
    "TorchTeacher": {},
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pickle_as_a_teachers_weights(here, scenes, run, refused, name, kind):
    PICKLES[kind](here / "evil.pt", here / "marked")
    spoilt = config(scenes, here / "new")
    file = {"module": "evil.pt"} if name == "TorchTeacher" else {"checkpoint": "evil.pt"}
    encoder = {"class_path": f"agglom.teachers.{name}", "init_args": {**WEIGHTS[name], **file}}
    spoilt["model"]["teachers"]["sam"]["encoder"] = encoder
    write(here / "c.yaml", spoilt)
    assert "evil.pt" in refused("fit", "--config", "c.yaml")
    assert "evil.pt" in refused("cache", "--config", "c.yaml", "--out", here / "cache")
    write(run / "config.yaml", spoilt)
    assert "evil.pt" in refused("probe", "--run", run, "--data", scenes, "--probes", "knn")


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_as_the_students_weights(here, scenes, refused, kind):
    PICKLES[kind](here / "evil.pt", here / "marked")
    spoilt = config(scenes, here / "new")
    spoilt["model"]["student"]["init_args"]["checkpoint"] = "evil.pt"
    write(here / "c.yaml", spoilt)
    assert "evil.pt" in refused("fit", "--config", "c.yaml")


def test_a_pickle_as_an_array_of_pictures(here, run, scenes, refused):
    """`agglom report` reads arrays of pictures beside the report."""
    import numpy as np

    out = here / "probes"
    main(["probe", "--run", str(run), "--data", str(scenes), "--probes", "knn", "--out", str(out), "--size", "32"])
    np.savez(out / "pictures.npz", images=np.array([Evil(here / "marked")], dtype=object))
    refused("report", out)


# ------------------------------------------------------------------------------------------------ pictures


def test_a_picture_that_is_a_program(here, scenes, monkeypatch):
    """PIL hands EPS to Ghostscript, whatever the file is called; here `gs` is a script that leaves a mark."""
    script = here / "gs"
    script.write_text(f"#!/bin/sh\ntouch {here / 'called'}\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(script))
    evil = here / "pictures" / "evil.jpg"
    evil.parent.mkdir()
    Image.new("RGB", (16, 16)).save(evil, "EPS")
    with pytest.raises(subprocess.CalledProcessError), Image.open(evil) as image:
        image.load()
    (here / "called").unlink()  # so that is what would happen
    sample = {"__key__": "a", "__url__": "a.tar", "jpg": evil.read_bytes(), "seg.png": evil.read_bytes()}
    for field, kind in (("image", "bad image"), ("seg", "bad mask")):
        with pytest.raises(BadSample, match="valid: JPEG, PNG") as err:
            decode_sample(sample, [field])
        assert err.value.fault.kind == kind
    Image.new("RGB", (16, 16)).save(evil.with_name("good.jpg"))
    main(["data", "imagefolder", "--source", str(evil.parent), "--out", str(here / "shards")])
    assert read_index(here / "shards").counts == {"train": 1} and not (here / "called").exists()


# ------------------------------------------------------------------------------------------------ safetensors


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("file", ["model.safetensors", "adaptors.safetensors"])
def test_tensors_of_an_export(here, run, scenes, refused, name, file):
    path = run / "export" / file
    path.write_bytes(SAFETENSORS[name](path.read_bytes()))
    line = refused("probe", "--model", run / "export", "--data", scenes, "--out", here / "out")
    assert str(run / "export") in line


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("teacher", ["TimmTeacher", "OpenClipTeacher"])
def test_tensors_of_a_teacher(here, scenes, refused, name, teacher):
    (here / "evil.safetensors").write_bytes(SAFETENSORS[name](b"\0" * 1000))
    spoilt = config(scenes, here / "new")
    options = {**WEIGHTS[teacher], "checkpoint": "evil.safetensors"}
    if teacher == "OpenClipTeacher":
        options["name"] = "RN50"
    encoder = {"class_path": f"agglom.teachers.{teacher}", "init_args": options}
    spoilt["model"]["teachers"]["sam"]["encoder"] = encoder
    write(here / "c.yaml", spoilt)
    assert "evil.safetensors" in refused("fit", "--config", "c.yaml")


@pytest.fixture(scope="module")
def cached(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    whole = config(scenes, folder / "run")
    options = {"views": 1, "dtype": "bf16", "pool": 1, "names": None, "batch": 64}
    cache_teachers(whole, folder / "cache", **options)
    return folder / "cache"


def train_from(cache, scenes, here):
    whole = config(scenes, here / "new")
    whole["data"]["cache"] = str(cache)
    return write(here / "c.yaml", whole)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_tensors_of_a_cache(here, scenes, cached, refused, name):
    cache = Path(shutil.copytree(cached, here / "cache"))
    for path in cache.glob("*.safetensors"):
        path.write_bytes(SAFETENSORS[name](path.read_bytes()))
    assert ".safetensors" in refused("fit", "--config", train_from(cache, scenes, here))


# ------------------------------------------------------------------------------------------------ JSON


def values(change):
    def spoil(path):
        body = json.loads(path.read_text())
        path.write_text(json.dumps(change(body)))

    return spoil


def put(**new):
    return values(lambda body: {**body, **new})


JSONS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "nested deep": lambda path: path.write_text("[" * 100_000),
    "an empty object": lambda path: path.write_text("{}"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
EXPORTS = {
    **{("agglom.json", name): spoil for name, spoil in JSONS.items()},
    **{("config.json", name): spoil for name, spoil in JSONS.items()},
    **{("adaptors.json", name): spoil for name, spoil in JSONS.items() if name != "an empty object"},
    ("agglom.json", "format"): put(format=[1]),
    ("agglom.json", "no student"): values(lambda body: {k: v for k, v in body.items() if k != "student"}),
    ("agglom.json", "student of words"): put(student="resnet"),
    ("agglom.json", "tokens of words"): put(student={"name": "x", "summary_tokens": "two", "registers": None}),
    ("config.json", "another architecture"): put(architecture="resnet10t"),
    ("config.json", "no such architecture"): put(architecture="os.system"),
    ("config.json", "a hub's architecture"): put(architecture="hf-hub:evil/model"),
    ("config.json", "arguments"): put(model_args={"evil": 1}),
    ("config.json", "a picture too large"): put(model_args={"img_size": 1 << 40}),
    ("adaptors.json", "class"): put(sam={"class": "os.system"}),
    ("adaptors.json", "no adaptor's class"): put(sam={"class": "Popen", "options": {"args": "touch marked"}}),
    ("adaptors.json", "words"): put(sam="MLPAdaptor"),
    ("adaptors.json", "of a width that isn't"): values(
        lambda body: {k: {**v, "teacher": {**v["teacher"], "spatial": 3}} for k, v in body.items()}
    ),
    ("adaptors.json", "options"): values(lambda body: {k: {**v, "options": {"evil": 1}} for k, v in body.items()}),
}  # fmt: skip


@pytest.mark.parametrize(("file", "name"), EXPORTS, ids=" ".join)
def test_words_of_an_export(here, run, scenes, refused, file, name):
    EXPORTS[file, name](run / "export" / file)
    line = refused("probe", "--model", run / "export", "--data", scenes, "--out", here / "out")
    assert str(run / "export") in line or file in line


CACHES = {
    **JSONS,
    "version": put(version=[1]),
    "splits of words": put(splits="train"),
    "shards of numbers": put(splits={"train": [1]}),
    "a shard outside": put(splits={"train": ["../../etc/passwd.tar"]}),
    "no teachers": put(teachers={}),
    "teachers of words": put(teachers="sam"),
    "a teacher of words": put(teachers={"sam": "x"}),
    "dtype": put(dtype="evil"),
    "size": put(size="large"),
    "view": put(view=3),
    "a key more": put(evil=1),
}


@pytest.mark.parametrize("name", CACHES)
def test_words_of_a_cache(here, scenes, cached, refused, name):
    cache = Path(shutil.copytree(cached, here / "cache"))
    CACHES[name](cache / "cache.json")
    assert "cache" in refused("fit", "--config", train_from(cache, scenes, here))


def test_a_cache_stays_in_its_folder(here, scenes, cached):
    index = read_cache_index(cached)
    for name in ("../x.tar", "/x.tar", "https://host/../x.tar", "a/b/x.tar"):
        assert index.path(name) == cached / "x.safetensors"


@pytest.mark.parametrize("name", JSONS)
def test_a_report(here, refused, name):
    (here / "probes").mkdir()
    path = here / "probes" / "report.json"
    path.write_text(json.dumps({"schema_version": 1, "models": {}, "protocol": {}}))
    JSONS[name](path)
    assert "report.json" in refused("report", here / "probes")
