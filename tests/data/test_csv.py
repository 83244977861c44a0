"""A table into shards: names and numbers, lists of labels, captions, masks, splits; bad cells."""

import logging

import numpy as np
import pytest
from PIL import Image

from agglom.data import eval_stream, read_index
from agglom.data.csv_table import write_csv
from agglom.data.writing import Writing
from agglom.errors import UserError

ONE = Writing(workers=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in (10, 20, 30):
        Image.new("RGB", (4, 3), (number,) * 3).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(np.full((3, 4), number, np.uint8)).save(tmp_path / "photos" / f"{number}-mask.png")
    return tmp_path


def write(folder, text, name="table.csv", encoding="utf-8", **options):
    (folder / name).write_text(text, encoding=encoding)
    write_csv(folder / "out", source=folder / name, writing=Writing(workers=1, overwrite=True), **options)
    return read_index(folder / "out")


def by_number(index, split, fields):
    return {int(s["image"].float().mean()): s for s in eval_stream(index, split, fields=["image", *fields])}


def test_every_column(folder):
    text = (
        "caption,split,image,note,mask,label\n"
        '"a red shoe, left\n\n two  words ",train,photos/10.png,x,photos/10-mask.png,shoe\n'
        ",val,photos/20.png,y,photos/20-mask.png,coat\n"
        "ein Hut – 帽子,train,photos/30.png,z,photos/30-mask.png,shoe\n"
    )
    (folder / "values.txt").write_text("".join(f"v{n}\n" for n in range(40)))
    index = write(folder, text, language="en", seg_classes=folder / "values.txt", encoding="utf-8-sig")
    assert index.counts == {"train": 2, "val": 1} and index.classes == ("coat", "shoe") and index.language == "en"
    assert index.seg_classes[39] == "v39" and index.extra["csv"]["images_without_caption"] == 1
    train, val = (by_number(index, split, ["cls", "txt", "seg"]) for split in ("train", "val"))
    assert [train[10]["cls"], val[20]["cls"], train[30]["cls"]] == [1, 0, 1]
    assert train[10]["txt"].splitlines() == ["a red shoe, left", "two words"] and val[20]["txt"] == ""
    assert train[30]["txt"] == "ein Hut – 帽子" and (train[30]["seg"] == 30).all()


def test_lists_of_labels_and_tabs(folder):
    text = "image\tlabel\n10.png\tshoe; coat\n20.png\t\n30.png\tshoe\n"
    index = write(folder, text, name="table.tsv", root=folder / "photos")
    found = by_number(index, "train", ["cls"])
    assert [found[n]["cls"] for n in (10, 20, 30)] == [[0, 1], [], [1]]


def test_numbers(folder):
    text = "image,label\nphotos/10.png,3\nphotos/20.png,0\n"
    index = write(folder, text)
    assert index.classes is None and {n: s["cls"] for n, s in by_number(index, "train", ["cls"]).items()} == {
        10: 3,
        20: 0,
    }
    (folder / "names.txt").write_text("a\nb\nc\nd\n")
    index = write(folder, text, classes=folder / "names.txt")
    assert index.classes == ("a", "b", "c", "d") and by_number(index, "train", ["cls"])[10]["cls"] == 3
    (folder / "names.txt").write_text("9\n3\n0\n")  # names that look like numbers are names
    assert by_number(write(folder, text, classes=folder / "names.txt"), "train", ["cls"])[10]["cls"] == 1


def test_given_names_fix_the_order(folder):
    (folder / "names.txt").write_text("shoe\nhat\ncoat\n")
    index = write(folder, "image,label\nphotos/10.png,coat\nphotos/20.png,shoe\n", classes=folder / "names.txt")
    found = by_number(index, "train", ["cls"])
    assert index.classes == ("shoe", "hat", "coat") and (found[10]["cls"], found[20]["cls"]) == (2, 0)


def test_fractions_are_those_of_a_folder(folder):
    for number in range(100):
        Image.new("RGB", (4, 3)).save(folder / "photos" / f"p{number}.png")
    rows = "".join(f"photos/p{n}.png\n" for n in range(100))
    index = write(folder, "image\n" + rows, val_fraction=0.3)
    assert sum(index.counts.values()) == 100 and 12 <= index.counts["val"] <= 48
    assert index.fields["train"] == ("image",)


def test_columns_left_out_are_named_and_files_that_do_not_fit_skipped(folder, caplog):
    Image.new("L", (3, 4)).save(folder / "photos" / "10-mask.png")
    rows = "".join(f"photos/{n}.png,photos/{n}-mask.png,1\n" for n in (10, 20, 30, 40))
    with caplog.at_level(logging.WARNING, "agglom.data"):
        index = write(folder, "image,mask,labels\n" + rows)
    assert "columns left out: labels" in caplog.text and "skipped 2 unreadable of 4" in caplog.text
    assert set(by_number(index, "train", ["seg"])) == {20, 30}


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (None, {}, "can't be read"),
        ("", {}, "no column image"),
        ("picture\na.png\n", {}, "no column image in its first line (picture)"),
        ("image,image\na,b\n", {}, "column image twice"),
        ("image\n", {}, "has no rows"),
        ("image,label\na.png\n", {}, "line 2: not 2 cells"),
        ("image,caption\na.png,one, two\n", {}, "line 2: not 2 cells"),
        ("image,label\na.png,x\n,y\n", {}, "line 3: no image"),
        ("image,label\na.png,x\nb.png,\n", {}, "line 3: no label"),
        ("image,mask\na.png,\n", {}, "line 2: no mask"),
        ("image,split\na.png,validation\n", {}, "line 2: split 'validation'; valid: test, train, val"),
        ("image,split\na.png,val\n", {"test_fraction": 0.1}, "has a column split"),
        ("image,label\na.png,x\na.png,y\n", {}, "line 3: a.png is on line 2 too"),
        ('image\n"a.png\n', {}, "no table in UTF-8"),
        (
            "image,label\na.png,x\n",
            {"classes": "names.txt"},
            "line 2: label 'x' is not among the classes; valid: cat",
        ),
        (
            "image,label\na.png,2\n",
            {"classes": "names.txt"},
            "line 2: label '2' is not among the classes; valid: 0 to 1",
        ),
        ("image,label\na.png,x\n", {"classes": "none.txt"}, "classes: none.txt: can't be read"),
        ("image,label\na.png,x\n", {"classes": "twice.txt"}, "twice.txt: line 3: 'a' is no new name"),
        ("image\na.png\n", {"classes": "names.txt"}, "has no column label"),
        ("image\na.png\n", {"val_fraction": 1.0}, "val_fraction 1.0"),
        ("image\na.png\n", {}, "none of its 1 pictures can be read, first a.png"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, monkeypatch, text, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    if text is not None:
        (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError) as err:
        write_csv(tmp_path / "out", source=tmp_path / "table.csv", writing=ONE, **options)
    assert words in str(err.value) and "\n" not in str(err.value)
    assert not (tmp_path / "out" / "index.json").exists()
