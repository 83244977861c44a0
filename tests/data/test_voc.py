"""PASCAL VOC's layout: where a box lies in pixels from 0, what difficult means, masks with their border."""

import logging

import numpy as np
import pytest
from PIL import Image

from agglom.data import eval_stream, read_index
from agglom.data.voc import CLASSES, write_voc
from agglom.data.writing import Writing
from agglom.errors import UserError

ONE = Writing(workers=1)
WIDTH, HEIGHT = 10, 8


def thing(name, xmin, ymin, xmax, ymax, difficult=0):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>{part}</object>"


@pytest.fixture
def folder(tmp_path):
    """Pictures 10, 20 (train), 30 (val) with masks, and 40 in Main's train only."""
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for number in (10, 20, 30, 40):
        Image.new("RGB", (WIDTH, HEIGHT), (number,) * 3).save(root / "JPEGImages" / f"{number}.jpg")
        whole = thing("person", 1, 1, WIDTH, HEIGHT)
        more = thing("cat", 3, 2, 5, 2, difficult=1) + thing("sofa", 40, 40, 50, 50) if number == 10 else ""
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{whole}{more}</annotation>")
        if number != 40:
            mask = Image.fromarray(np.tile(np.array([0, 15, 255, 20, 8] * 2, np.uint8), (HEIGHT, 1)))
            mask = mask.convert("P")
            mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
            mask.save(root / "SegmentationClass" / f"{number}.png")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("10\n20\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("30\n")
    (root / "ImageSets" / "Segmentation" / "trainval.txt").write_text("10\n20\n30\n")
    (root / "ImageSets" / "Main" / "train.txt").write_text("10\n40\n")
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("10  1\n40 -1\n")
    return root


def by_number(root, split, fields):
    return {int(s["image"].float().mean().round()): s for s in eval_stream(root, split, fields=fields)}


def test_masks_boxes_and_classes(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_voc(tmp_path / "out", source=folder, writing=ONE)
    assert "boxes without area: 1" in caplog.text
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 2, "val": 1} and index.extra["voc"]["boxes_without_area"] == 1
    assert index.classes == CLASSES and index.seg_classes == ("background", *CLASSES) and len(CLASSES) == 20
    train = by_number(index, "train", ["image", "seg", "boxes", "cls"])
    person, cat = CLASSES.index("person"), CLASSES.index("cat")
    assert train[10]["boxes"] == [
        {"bbox": [0, 0, WIDTH, HEIGHT], "label": person, "iscrowd": 0},
        {"bbox": [2, 1, 3, 1], "label": cat, "iscrowd": 1},
    ]
    assert train[10]["cls"] == [cat, person] and train[20]["cls"] == [person]
    assert train[20]["seg"].tolist() == [[0, 15, 255, 20, 8] * 2] * HEIGHT
    assert index.seg_classes[15] == "person" and index.seg_classes[20] == "tvmonitor" and index.seg_classes[8] == "cat"


def test_the_main_set_has_boxes_alone(folder, tmp_path):
    write_voc(tmp_path / "out", source=folder, image_set="Main", writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.fields == {"train": ("boxes", "cls", "image")} and index.seg_classes is None
    assert set(by_number(index, "train", ["image"])) == {10, 40}


def test_without_annotations_there_are_masks_alone(folder, tmp_path):
    (folder / "Annotations").rename(folder / "elsewhere")
    write_voc(tmp_path / "out", source=folder, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.fields["train"] == ("image", "seg") and index.classes is None


def test_pictures_that_do_not_fit_are_skipped(folder, tmp_path, caplog):
    Image.new("L", (WIDTH, HEIGHT), 21).save(folder / "SegmentationClass" / "10.png")
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(folder / "JPEGImages" / "20.jpg")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_voc(tmp_path / "out", source=folder, writing=ONE)
    assert "skipped 2 unreadable of 3" in caplog.text and read_index(tmp_path / "out").counts == {"train": 0, "val": 1}


def rewrite(name, before, after):
    return lambda root: (root / name).write_text((root / name).read_text().replace(before, after))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (rewrite("Annotations/10.xml", "sofa", "sofaa"), "10.xml: class 'sofaa'; valid: "),
        (rewrite("Annotations/20.xml", "</annotation>", ""), "20.xml: broken annotation"),
        (rewrite("Annotations/20.xml", "xmax>", "xm>"), "20.xml: broken annotation (no bndbox/xmax)"),
        (rewrite("Annotations/20.xml", f"<width>{WIDTH}", "<width>wide"), "20.xml: broken annotation"),
        (lambda root: (root / "Annotations" / "30.xml").unlink(), "30.xml: can't be read"),
        (rewrite("ImageSets/Segmentation/train.txt", "20", "10"), "train.txt: 10 twice"),
        (lambda root: [p.write_text("") for p in root.glob("ImageSets/Segmentation/*")], "no names in train.txt"),
        (lambda root: (root / "JPEGImages").rename(root / "images"), "no folder JPEGImages"),
        (lambda root: (root / "SegmentationClass").rename(root / "masks"), "no folder SegmentationClass"),
    ],
)
def test_bad_folders_are_one_line(folder, tmp_path, damage, words):
    damage(folder)
    with pytest.raises(UserError) as err:
        write_voc(tmp_path / "out", source=folder, writing=ONE)
    assert words in str(err.value) and "\n" not in str(err.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_image_set(folder, tmp_path):
    with pytest.raises(UserError, match="image_set: 'main'; valid: Main, Segmentation .did you mean Main"):
        write_voc(tmp_path / "out", source=folder, image_set="main", writing=ONE)
