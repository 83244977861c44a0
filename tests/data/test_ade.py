"""ADE20K's SceneParsing layout: which number a class has in the shards, names, scenes, masks that do not fit."""

import logging

import numpy as np
import pytest
from PIL import Image

from agglom.data import eval_stream, read_index
from agglom.data.ade import without_other, write_ade
from agglom.data.writing import Writing
from agglom.errors import UserError

ONE = Writing(workers=1)
VALUES = [0, 1, 2, 150, 255]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "ade"
    for name, numbers in (("training", (1, 2, 3)), ("validation", (1,))):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for number in numbers:
            stem = f"ADE_{name[:-3].replace('ida', '')}_{number:08d}"
            Image.new("RGB", (5, 4), (number * 10,) * 3).save(root / "images" / name / f"{stem}.jpg")
            mask = np.tile(np.array(VALUES, np.uint8), (4, 1))
            Image.fromarray(mask).save(root / "annotations" / name / f"{stem}.png")
    return root


def info(root, number=150):
    rows = [f"{n}\t0.1\t10\t1\t1\tthing {n}, word" for n in range(1, number + 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")


def test_classes_start_at_0_and_other_is_ignored(folder, tmp_path):
    write_ade(tmp_path / "out", source=folder, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 3, "val": 1} and index.fields["train"] == ("image", "seg")
    assert index.classes is None and index.seg_classes is None
    for sample in eval_stream(index, "train", fields=["image", "seg"]):
        assert sample["seg"].tolist() == [[255, 0, 1, 149, 255]] * 4 and sample["image"].shape == (3, 4, 5)


def test_names_and_scenes(folder, tmp_path):
    info(folder)
    stems = sorted(path.stem for path in folder.glob("images/*/*.jpg"))
    scenes = dict(zip(stems, ("street", "attic", "street", "lake"), strict=True))
    (folder / "sceneCategories.txt").write_text("".join(f"{stem} {scene}\n" for stem, scene in scenes.items()))
    write_ade(tmp_path / "out", source=folder, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.seg_classes == tuple(f"thing {n}" for n in range(1, 151))
    assert index.classes == ("attic", "lake", "street")
    for split in ("train", "val"):
        files = dict(line.split("\t") for line in (tmp_path / "out" / f"{split}-files.tsv").read_text().splitlines())
        for sample in eval_stream(index, split, fields=["cls"]):
            stem = files[sample["key"]].rpartition("/")[2].removesuffix(".jpg")
            assert index.classes[sample["cls"]] == scenes[stem]


def test_masks_that_do_not_fit_are_skipped(folder, tmp_path, caplog):
    first, second, third = sorted(folder.glob("annotations/training/*.png"))
    Image.new("L", (4, 5)).save(first)
    Image.new("RGB", (5, 4)).save(second)
    third.unlink()
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_ade(tmp_path / "out", source=folder, writing=ONE)
    assert "skipped 3 unreadable of 4" in caplog.text and "4 x 5 pixels, the picture 5 x 4" in caplog.text
    assert read_index(tmp_path / "out").counts == {"train": 0, "val": 1}


def test_other_values_are_no_classes():
    with pytest.raises(ValueError, match="mask value 151"):
        without_other(np.array([[3, 151]], np.uint8))


def empty(root):
    for path in root.glob("images/validation/*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "images").rename(root / "pictures"), "neither images/training nor images/validation"),
        (lambda root: (root / "annotations").rename(root / "masks"), "without annotations/training"),
        (empty, "has no pictures"),
        (lambda root: info(root, 149), "149 names; valid: one for each of 1 to 150"),
        (lambda root: (root / "sceneCategories.txt").write_text("a b c\n"), "line 1: 'a b c'"),
        (lambda root: (root / "sceneCategories.txt").write_text("a b\n"), "lacks 3 of 3 pictures of training"),
    ],
)
def test_bad_folders_are_one_line(folder, tmp_path, damage, words):
    damage(folder)
    with pytest.raises(UserError) as err:
        write_ade(tmp_path / "out", source=folder, writing=ONE)
    assert words in str(err.value) and "\n" not in str(err.value)
    assert not (tmp_path / "out").exists()
