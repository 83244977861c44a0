"""The image folder writer: bytes untouched, classes and splits, unreadable pictures, a line for every wrong folder."""

import hashlib
import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agglom.data import eval_stream, read_index, write_imagefolder
from agglom.errors import UserError


def picture(path, number=0, image_format=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), number, np.uint8)).convert(mode).save(path, image_format)
    return path


@pytest.fixture
def classes(tmp_path):
    """Two classes of 15 pictures, of three formats, nested and in capitals."""
    source = tmp_path / "photos"
    for number in range(30):
        name, suffix = ("cat", "dog")[number % 2], (".jpg", ".PNG", ".webp")[number % 3]
        picture(source / name / f"part{number % 4}" / f"{number}{suffix}", number)
    (source / "cat" / "notes.txt").write_text("not a picture")
    (source / ".git").mkdir()
    return source


def stored(out):
    """key -> bytes, per split."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                found[path.name.split("-")[0], member.name] = tar.extractfile(member).read()
    return found


def test_bytes_classes_and_names(classes, tmp_path):
    out = tmp_path / "out"
    assert write_imagefolder(out, source=classes, shard_size=8, workers=1, licence="CC0") == out / "index.json"
    index = read_index(out)
    assert index.counts == {"train": 30} and [s.count for s in index.shards("train")] == [8, 8, 8, 6]
    assert index.classes == ("cat", "dog") and index.licence == "CC0" and index.fields["train"] == ("cls", "image")
    files = dict(line.split("\t") for line in (out / "train-files.tsv").read_text().splitlines())
    assert len(files) == 30
    found = stored(out)
    for key, file in files.items():
        suffix = Path(file).suffix.lower()
        assert found["train", key + suffix] == (classes / file).read_bytes()
        assert found["train", key + ".cls"] == str(index.classes.index(file.split("/")[0])).encode()


def test_classes_are_mixed_and_the_order_follows_from_the_seed(classes, tmp_path):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_imagefolder(tmp_path / name, source=classes, seed=seed, workers=1)
        orders.append([sample["cls"] for sample in eval_stream(tmp_path / name, "train", fields=["cls"])])
    assert orders[0] == orders[1] != orders[2]
    assert 5 < np.abs(np.diff(orders[0])).sum() < 25  # sorted by class it would be 1


def test_workers_do_not_change_the_bytes(classes, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write_imagefolder(tmp_path / name, source=classes, shard_size=10, workers=workers, val_fraction=0.3)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_flat_folder_has_no_classes(tmp_path):
    for number in range(4):
        picture(tmp_path / "flat" / f"{number}.png", number)
    (tmp_path / "flat" / "annotations").mkdir()
    (tmp_path / "flat" / "annotations" / "a.json").write_text("{}")
    write_imagefolder(tmp_path / "out", source=tmp_path / "flat", workers=1)
    index = read_index(tmp_path / "out")
    assert index.classes is None and index.fields["train"] == ("image",) and index.counts == {"train": 4}


def test_fractions_follow_from_the_path(tmp_path):
    source = tmp_path / "flat"
    data = picture(source / "0.png").read_bytes()
    for number in range(400):
        (source / f"{number}.png").write_bytes(data)

    def split_of():
        out = tmp_path / f"out{len(list(source.iterdir()))}"
        write_imagefolder(out, source=source, val_fraction=0.2, test_fraction=0.1, workers=1)
        return {
            line.split("\t")[1]: path.name.split("-")[0]
            for path in out.glob("*.tsv")
            for line in path.read_text().splitlines()
        }

    before = split_of()
    counts = {split: sum(s == split for s in before.values()) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 400
    assert abs(counts["val"] - 80) < 32 and abs(counts["test"] - 40) < 24  # four standard deviations
    for number in range(0, 400, 3):
        (source / f"{number}.png").unlink()
    assert split_of().items() < before.items()


def test_a_source_with_splits_of_its_own(tmp_path):
    for split, number in (("train", 5), ("val", 2)):
        for n in range(number):
            picture(tmp_path / "in" / split / ("a", "b")[n % 2] / f"{n}.png")
    write_imagefolder(tmp_path / "out", source=tmp_path / "in", workers=1)
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 5, "val": 2} and index.classes == ("a", "b")
    with pytest.raises(UserError, match="leave the fractions at 0"):
        write_imagefolder(tmp_path / "out2", source=tmp_path / "in", val_fraction=0.1)
    picture(tmp_path / "in" / "val" / "c" / "0.png")
    with pytest.raises(UserError, match="other classes than.*'c'"):
        write_imagefolder(tmp_path / "out2", source=tmp_path / "in")


def test_unreadable_pictures_are_skipped_and_counted(classes, tmp_path, caplog):
    (classes / "cat" / "broken.jpg").write_bytes(b"no picture")
    whole = picture(tmp_path / "whole.png", 9).read_bytes()
    (classes / "dog" / "half.png").write_bytes(whole[: len(whole) // 2])
    (classes / "dog" / "empty.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_imagefolder(tmp_path / "out", source=classes, workers=1)
    assert len(caplog.messages) == 1 and "skipped 3 unreadable of 33" in caplog.messages[0]
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 30} and index.extra["imagefolder"]["skipped"] == 3
    assert len(list(eval_stream(index, "train"))) == 30


def test_other_formats_become_png_and_wrong_suffixes_are_seen_through(tmp_path):
    picture(tmp_path / "in" / "a.bmp", 50)
    picture(tmp_path / "in" / "b.tiff", 60, mode="L")
    picture(tmp_path / "in" / "c.png", 70, image_format="JPEG")
    write_imagefolder(tmp_path / "out", source=tmp_path / "in", workers=1)
    assert sorted(name.split(".")[1] for _, name in stored(tmp_path / "out")) == ["jpg", "png", "png"]
    values = [int(sample["image"].float().mean()) for sample in eval_stream(tmp_path / "out", "train")]
    assert sorted(values) == [50, 60, 70]


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda root: None, {}, "no such folder"),
        (lambda root: (root / "in").mkdir(), {}, "no pictures"),
        (lambda root: (root / "in" / "cat").mkdir(parents=True), {}, "no pictures"),
        (lambda root: (root / "in").write_text(""), {}, "no such folder"),
        (
            lambda root: (picture(root / "in" / "cat" / "a.png"), (root / "in" / "dog").mkdir()),
            {},
            "dog has no pictures",
        ),
        (lambda root: (picture(root / "in" / "cat" / "a.png"), picture(root / "in" / "b.png")), {}, "beside class"),
        (lambda root: picture(root / "in" / "a.png"), {"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction 0.6"),
        (lambda root: picture(root / "in" / "a.png"), {"val_fraction": -0.1}, "val_fraction -0.1"),
        (lambda root: picture(root / "in" / "a.png"), {"shard_size": 0}, "shard_size: 0"),
        (lambda root: picture(root / "in" / "a.png").write_bytes(b"x"), {}, "none of its 1 pictures can be read"),
    ],
)
def test_wrong_folders_and_options(tmp_path, prepare, options, words):
    prepare(tmp_path)
    with pytest.raises(UserError) as err:
        write_imagefolder(tmp_path / "out", source=tmp_path / "in", workers=1, **options)
    assert words in str(err.value) and "\n" not in str(err.value)
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_output_that_cannot_be_written(classes, tmp_path, workers):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError) as err:
        write_imagefolder(tmp_path / "file", source=classes, shard_size=10, workers=workers)
    assert "can't be written" in str(err.value) and "\n" not in str(err.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_that_holds_shards_is_left_alone_unless_told(classes, tmp_path):
    out = tmp_path / "out"
    write_imagefolder(out, source=classes, shard_size=5, workers=1)
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in out.iterdir()}
    with pytest.raises(UserError, match="holds shards already.*overwrite"):
        write_imagefolder(out, source=classes, workers=1)
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in out.iterdir()} == before
    write_imagefolder(out, source=classes, shard_size=20, workers=1, overwrite=True)
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert len(list(eval_stream(out, "train"))) == 30


def test_pixels_arrive(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "in" / "a.png").write_bytes(buffer.getvalue())
    write_imagefolder(tmp_path / "out", source=tmp_path / "in", workers=1)
    (sample,) = eval_stream(tmp_path / "out", "train")
    assert torch.equal(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
