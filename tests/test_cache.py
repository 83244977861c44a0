"""Cached teachers: the same views, the same features, the same loss; nothing that is stale or damaged is trained on."""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from agglom.cache import FeatureReader, Miss, read_cache_index
from agglom.cache.check import cache_problems, grid_problems
from agglom.cache.command import cache_teachers
from agglom.checks import check_config
from agglom.cli import main
from agglom.data import ShardDataModule, view_options
from agglom.data.streams import eval_stream
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.heads import TeacherConfig
from agglom.runs import build_teachers
from agglom.teachers import CachedTeacher, TinyTeacher

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPTIONS = {"views": 2, "dtype": "fp32", "pool": 1, "names": None, "batch": 16}


def config(scenes, root="run", **data):
    tiny = {"class_path": "agglom.teachers.TinyTeacher"}
    return {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": VIT},
            },
            "teachers": {name: {"encoder": {**tiny, "init_args": {"name": name}}} for name in ("clip", "sam")},
            "warmup_steps": 1,
        },
        "data": {"data": str(scenes), "batch_size": 8, "size": 64, "num_workers": 0, **data},
        "trainer": {"max_steps": 3, "log_every_n_steps": 1, "default_root_dir": str(root), "accelerator": "cpu"},
    }


@pytest.fixture(scope="module")
def written(scenes, tmp_path_factory):
    """A function: options -> a cache of the shared scenes (96 train, 32 val), written once."""
    made = {}

    def get(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("cache")
            (folder / "c.yaml").write_text(yaml.safe_dump(config(scenes)))
            cache_teachers(folder / "c.yaml", folder / "cache", **{**OPTIONS, **options})
            made[key] = folder / "cache"
        return made[key]

    return get


def first_batch(scenes, cache, **options):
    data = ShardDataModule(data=str(scenes), batch_size=8, size=64, num_workers=0, cache=str(cache), **options)
    data.setup()
    return data, next(iter(data.train_dataloader()))


def distiller(tiny_student, cached=None):
    """The same student and heads over real or cached teachers."""
    encoders = {
        name: TinyTeacher(name) if cached is None else CachedTeacher(cache=str(cached), name=name)
        for name in ("clip", "sam")
    }
    student = tiny_student(kwargs=VIT)
    torch.manual_seed(1)
    return Distiller(student, {name: TeacherConfig(encoder) for name, encoder in encoders.items()}).eval()


def loss(module, batch):
    """Of a batch, before any training, by the teachers' own targets."""
    batch = module.on_after_batch_transfer(dict(batch), 0)
    frames = module.frames(batch["image"])
    for head in module.heads.values():
        for normalizer in head.normalizers.values():
            normalizer.reset() if hasattr(normalizer, "reset") else None
    module.heads.train()
    targets = module.targets(frames, module.names, cached=batch)
    found = module.losses(module.student(frames.student, module.taps), targets)
    return sum(part.mean() for losses in found.values() for part in losses.values())


def test_features_are_those_of_the_very_views_in_the_batch(scenes, written):
    """Random crops and flips, drawn again bit for bit: the real teachers say the same of the batch's own pixels."""
    _, batch = first_batch(scenes, written())
    images = batch["image"].float() / 255
    assert set(batch["features"]) == {"clip", "sam"} and batch["cached"] == [True] * 8
    for name in ("clip", "sam"):
        own = TinyTeacher(name)(images)
        for kind, value in batch["features"][name].items():
            torch.testing.assert_close(value, getattr(own, kind), atol=2e-5, rtol=1e-5)
    assert batch["features"]["sam"].keys() == {"spatial"}


def test_views_with_colours_are_made_again_too(scenes, tmp_path):
    """Jitter, grey and blur of each view are stored with it; their cache is no cache of plain views."""
    colours = {"jitter": 1.0, "grayscale": 0.3, "blur": 0.5}
    value = config(scenes, view={"colours": colours})
    cache_teachers(value, tmp_path / "cache", **OPTIONS)
    data, batch = first_batch(scenes, tmp_path / "cache", view=view_options({"colours": colours}))
    data.train_view.aside = True  # what an accelerator would set if it might
    assert "colours" not in batch
    own = TinyTeacher("clip")(batch["image"].float() / 255)
    torch.testing.assert_close(batch["features"]["clip"]["spatial"], own.spatial, atol=2e-5, rtol=1e-5)
    stored = load_file(tmp_path / "cache" / "train-000000.safetensors")["colours"]
    assert stored.shape == (32, 2, 11) and len(stored.flatten(0, 1).unique(dim=0)) == 64
    value["data"]["cache"] = str(tmp_path / "cache")
    assert list(cache_problems(value, stages=False)) == []
    (line,) = cache_problems(config(scenes, cache=str(tmp_path / "cache")), stages=False)
    assert line.startswith("data.view.colours: None, but the features of data.cache")


def test_views_differ_between_and_within_samples_and_all_are_used(scenes, written):
    reader = FeatureReader(read_cache_index(written()))
    stored = load_file(reader.index.path("train-000000.tar"))
    assert stored["windows"].shape == (32, 2, 5)
    assert len({tuple(window) for window in stored["windows"].flatten(0, 1).tolist()}) > 48
    data, _ = first_batch(scenes, written())
    windows = set()
    original = reader.read

    def spy(raw, view):
        windows.add(view)
        return original(raw, view)

    reader.read = spy
    stream = eval_stream(scenes, "train")
    for raw, _ in stream.pairs():
        reader.drawn("train", recompute=False)(
            raw, torch.Generator().manual_seed(len(windows) + hash(raw["__key__"]) % 97)
        )
    assert windows == {0, 1}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 4e-3), ("fp16", 1e-3), ("int8", 1e-2)])
def test_the_loss_is_that_of_the_online_teachers(scenes, written, tiny_student, dtype, tolerance):
    cache = written(dtype=dtype)
    _, batch = first_batch(scenes, cache)
    online = loss(distiller(tiny_student), {k: v for k, v in batch.items() if k not in ("features", "cached")})
    assert loss(distiller(tiny_student, cache), batch).item() == pytest.approx(online.item(), rel=tolerance)


def test_pooling_averages_cells(scenes, written):
    _, whole = first_batch(scenes, written())
    _, small = first_batch(scenes, written(pool=2))
    assert whole["key"] == small["key"]
    pooled = torch.nn.functional.avg_pool2d(whole["features"]["sam"]["spatial"], 2)
    torch.testing.assert_close(small["features"]["sam"]["spatial"], pooled, atol=2e-5, rtol=1e-5)


def test_validation_has_the_centred_view(scenes, written):
    data, _ = first_batch(scenes, written())
    batch = next(iter(data.val_dataloader()))
    own = TinyTeacher("clip")(batch["image"].float() / 255)
    torch.testing.assert_close(batch["features"]["clip"]["summary"], own.summary, atol=2e-5, rtol=1e-5)


def damaged(cache, tmp_path, how):
    """A copy with one file changed."""
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    path = copy / "train-000000.safetensors"
    how(path)
    return copy


def flip(path):
    data = bytearray(path.read_bytes())
    where = len(data) // 2
    data[where] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_image(path):
    tensors, meta = load_file(path), metadata(path)
    tensors["image_crc"] += 1
    save_file(tensors, path, metadata=meta)


def other_keys(path):
    tensors, meta = load_file(path), metadata(path)
    save_file(tensors, path, metadata={**meta, "keys": json.dumps([f"x{n}" for n in range(32)])})


def other_teacher(path):
    tensors, meta = load_file(path), metadata(path)
    save_file(tensors, path, metadata={**meta, "sha256 clip": "0" * 64})


def other_views(path):
    """As if it were of another seed, grid, or way to cut views."""
    tensors, meta = load_file(path), metadata(path)
    save_file(tensors, path, metadata={**meta, "recipe": "0" * 64})


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        return dict(stored.metadata())


FAULTS = {
    "flipped bit": (flip, "damaged|can't be read"),
    "truncated": (truncate, "can't be read"),
    "removed": (Path.unlink, "missing"),
    "stale": (another_image, "its image has changed since"),
    "key": (other_keys, "no features"),
    "foreign": (other_teacher, "of another cache"),
    "other views": (other_views, "of another cache"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_named_with_their_key_and_never_trained_on(scenes, written, tiny_student, tmp_path, fault):
    how, words = FAULTS[fault]
    cache = damaged(written(), tmp_path, how)
    reader = FeatureReader(read_cache_index(cache))
    misses = 0
    for raw, _ in eval_stream(scenes, "train").pairs():
        for view in range(2):
            try:
                reader.read(raw, view)
            except Miss as err:
                misses += 1
                assert "train-000000.safetensors" in str(err) and raw["__key__"] in str(err) and "\n" not in str(err)
                if fault != "flipped bit":
                    assert words.split("|")[0] in str(err) or words in str(err)
    assert misses == (1 if fault == "flipped bit" else 64)  # one damaged view, or all of the shard
    with pytest.raises(UserError, match="train-000000.safetensors"):
        _, batch = first_batch(scenes, cache, shuffle=0)
        data, _ = first_batch(scenes, cache)
        loader = iter(data.train_dataloader())
        for _ in range(40):
            next(loader)


def test_recomputing_is_counted_and_exact(scenes, written, tiny_student, tmp_path):
    cache = damaged(written(), tmp_path, other_keys)
    data, batch = first_batch(scenes, cache, cache_missing="recompute")
    lacking = [not there for there in batch["cached"]]
    assert any(lacking) and not all(lacking)
    module = distiller(tiny_student, cache)
    online = loss(distiller(tiny_student), {k: v for k, v in batch.items() if k not in ("features", "cached")})
    assert loss(module, batch).item() == pytest.approx(online.item(), rel=1e-6)
    assert module.encoders["clip"].recomputed == sum(lacking)
    assert data.uncached_samples >= sum(lacking)


@pytest.mark.slow
def test_killed_and_shared_out_it_is_the_same_cache(scenes, written, tmp_path, one_thread):
    """kill -9 after the first file, then two ranks finish it; every file is as one process would have written it."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(scenes)))
    options = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "cache"), "--views", "2"]
    command = [sys.executable, "-m", "agglom.cli", "cache", *options, "--dtype", "fp32", "--batch", "16"]
    process = subprocess.Popen(command, env=one_thread)
    while process.poll() is None and not (tmp_path / "cache" / "train-000000.safetensors").exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    ranks = [subprocess.Popen(command, env={**one_thread, "RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    files = {path.name for path in written().iterdir()}
    assert there < files and files == {path.name for path in (tmp_path / "cache").iterdir()}
    for path in written().glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(tmp_path / "cache" / path.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    with pytest.raises(UserError, match="another cache: views was 2, is 3"):
        cache_teachers(tmp_path / "c.yaml", tmp_path / "cache", **{**OPTIONS, "views": 3})


@pytest.mark.slow
def test_fit_from_a_cache(scenes, written, tmp_path, monkeypatch):
    """No teacher is built in training; the run knows its originals for probes, and an online run may go on cached."""
    cache = written()
    value = config(scenes, tmp_path / "run")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
    with monkeypatch.context() as patched:
        patched.setattr("agglom.teachers.tiny.teacher._load", lambda *args: pytest.fail("a teacher was built"))
        main(["fit", "--config", str(tmp_path / "c.yaml"), "--data.cache", str(cache)])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["teachers"]["clip"]["encoder"]["class_path"] == "agglom.teachers.CachedTeacher"
    assert isinstance(build_teachers(saved)["clip"], TinyTeacher)
    online = tmp_path / "online"
    main(["fit", "--config", str(tmp_path / "c.yaml"), f"--trainer.default_root_dir={online}"])
    args = ["--trainer.max_steps=5", "--ckpt_path=last", f"--trainer.default_root_dir={online}"]
    main(["fit", "--config", str(tmp_path / "c.yaml"), "--data.cache", str(cache), *args])
    manifests = [json.loads((tmp_path / run / "teachers.json").read_text()) for run in ("run", "online")]
    assert manifests[0]["teachers"]["clip"]["sha256"] == manifests[1]["teachers"]["clip"]["sha256"]


def test_who_is_cached_need_not_be_remembered(written, tiny_student):
    cached = TeacherConfig(CachedTeacher(cache=str(written()), name="clip"))
    module = Distiller(tiny_student(kwargs=VIT), {"clip": cached, "sam": TeacherConfig(TinyTeacher("sam"))})
    assert not module.memories
    module = Distiller(
        module.student, {"clip": cached, "sam": TeacherConfig(TinyTeacher("sam"))}, remember_teachers=True
    )
    assert set(module.memories) == {"sam"}


@pytest.mark.slow
def test_some_teachers_cached_by_name_and_some_online(scenes, tmp_path):
    """`encoder: cached` needs no word of what the teacher is; a run that goes on with it has the same losses."""
    value = config(scenes, tmp_path / "online")
    value["data"]["view"] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0}
    cache_teachers(value, tmp_path / "cache", **{**OPTIONS, "views": 1, "names": ["clip"]})
    mixed = copy.deepcopy(value)
    mixed["data"]["cache"] = str(tmp_path / "cache")
    mixed["model"]["teachers"]["clip"] = {"encoder": "cached"}
    (tmp_path / "online.yaml").write_text(yaml.safe_dump(value))
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    main(["fit", "--config", str(tmp_path / "online.yaml")])
    shutil.copytree(tmp_path / "online", tmp_path / "mixed")
    losses = {}
    for name in ("online", "mixed"):
        more = ["--ckpt_path=last", "--trainer.max_steps=5", f"--trainer.default_root_dir={tmp_path / name}"]
        main(["fit", "--config", str(tmp_path / f"{name}.yaml"), *more])
        with (tmp_path / name / "metrics.csv").open() as stream:
            losses[name] = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses["online"]) == 5 and losses["mixed"] == pytest.approx(losses["online"], rel=1e-5)
    saved = yaml.safe_load((tmp_path / "mixed" / "config.yaml").read_text())["model"]["teachers"]
    classes = [saved[name]["encoder"]["class_path"].rpartition(".")[2] for name in ("clip", "sam")]
    assert classes == ["CachedTeacher", "TinyTeacher"]
    cache_teachers(mixed, tmp_path / "again", **{**OPTIONS, "views": 1, "names": ["clip"]})
    indices = [read_cache_index(tmp_path / name).teachers for name in ("cache", "again")]
    assert indices[0] == indices[1], "a cache of a cached run is of the teachers themselves"


def test_what_is_called_cached_and_is_not_is_one_line(scenes, written):
    value = config(scenes)
    value["model"]["teachers"]["clip"]["encoder"] = "cached"
    (line,) = check_config(value)
    assert line.startswith("model.teachers.clip.encoder: cached, but data.cache is not set; valid: ")
    value["data"]["cache"] = str(written())
    assert check_config(value) == []
    value["model"]["teachers"]["dino"] = {"encoder": "cached"}
    (line,) = check_config(value)
    assert line.startswith("model.teachers.dino.encoder: cached, but data.cache ") and "has no such teacher" in line
    value["model"]["teachers"]["dino"] = {"encoder": "cashed"}
    (line,) = check_config(value)
    assert line.startswith("model.teachers.dino.encoder.class_path: cashed: unknown class")
    with pytest.raises(UserError, match="encoder: cached; valid: a Teacher"):
        _ = TeacherConfig("cached").teacher


CHANGES = {
    "data.size": ({"data": {"size": 32}}, "64"),
    "data.view.flip": ({"data": {"view": {"flip": 0.1}}}, "0.5"),
    "data.margin": ({"data": {"margin": 32}}, "0"),
    "model.shift": ({"model": {"shift": {"std": 0.5}}}, "null"),
    "model.teachers.clip.mosaic": ({"model": {"teachers": {"clip": {"mosaic": True}}}}, "false"),
    "model.teachers.clip.encoder": (
        {"model": {"teachers": {"clip": {"encoder": {"init_args": {"pretrained": False}}}}}},
        "the same",
    ),
}


def merge(old, new):
    return {**old, **{k: merge(old.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}}


@pytest.mark.parametrize("key", list(CHANGES))
def test_what_does_not_fit_the_cache_is_one_line(scenes, written, key):
    change, valid = CHANGES[key]
    good = config(scenes, cache=str(written()))
    assert list(cache_problems(good, stages=False)) == []
    lines = list(cache_problems(merge(good, change), stages=False))
    assert len(lines) == 1 and lines[0].startswith(f"{key}: ") and f"valid: {valid}" in lines[0]


def test_another_grid_is_one_line(scenes, written, tmp_path):
    """Teachers of any size are shown images of as many cells as the student's map has."""
    good = config(scenes, cache=str(written()))
    assert list(grid_problems(good, (4, 4))) == list(grid_problems(good, (8, 8))) == [], "of one size"
    good["data"]["cache"] = str(shutil.copytree(written(), tmp_path / "free"))
    index = tmp_path / "free" / "cache.json"
    body = json.loads(index.read_text())
    body["teachers"]["clip"]["input"]["size"] = None
    index.write_text(json.dumps(body))
    assert list(grid_problems(good, (4, 4))) == []
    (line,) = grid_problems(good, (8, 8))
    assert line.startswith("model.student: a map of 8 x 8 cells, but") and "for one of 4 x 4" in line
    finer = merge(good, {"model": {"student": {"init_args": {"kwargs": {**VIT, "patch_size": 8}}}}})
    assert [line.split(":")[0] for line in check_config(finer)] == ["model.student"]


def test_missing_caches_and_shards_are_one_line(scenes, written, tmp_path):
    assert check_config(config(scenes, cache=str(written()))) == []
    (line,) = check_config(config(scenes, cache=str(tmp_path)))
    assert line.startswith("data.cache: ") and "no feature cache" in line
    cache = damaged(written(), tmp_path, Path.unlink)
    (line,) = check_config(config(scenes, cache=str(cache)))
    assert "1 shards without features, first train-000000.tar" in line


def test_a_dry_run_writes_nothing_and_counts_right(scenes, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(scenes)))
    words = cache_teachers(tmp_path / "c.yaml", tmp_path / "out", dry=True, **{**OPTIONS, "dtype": "bf16"})
    each = 2 * 2 * (128 + 2 * 192 * 64)  # two views, two bytes: clip's summary, two maps of 192 x 8 x 8
    assert words.startswith(f"{each} bytes an image") and not (tmp_path / "out").exists()
