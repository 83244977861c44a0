"""`agglom data verify`: finds exactly what was planted, says nothing of what is only odd, and cleans.

Also what a tar may hold to do harm: nothing of it is ever written anywhere.
"""

import json
import re
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from broken import (
    COUNT,
    FIELDS,
    append,
    bomb,
    change,
    encoded,
    folder,
    key,
    link,
    members,
    path,
    recount,
    spoil_header,
    truncate,
)  # fmt: skip
from PIL import Image

from agglom.cli import main
from agglom.data import eval_stream, read_index
from agglom.data.faults import KINDS
from agglom.data.verify import verify
from agglom.errors import UserError


def run(capsys, *args):
    code = 0
    try:
        main(["data", "verify", *map(str, args)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out.splitlines(), err.splitlines()


def found(root, **options):
    return [(f.kind, f.shard, f.key) for f in verify(root, workers=1, **options).findings]


def name(shard):
    return f"train-{shard:06d}.tar"


# ---------------------------------------------------------------------------------------------------- planted faults

TWELVE = [
    lambda root: (truncate(root, 0), ("truncated tar", name(0), None)),
    lambda root: (spoil_header(root, 1), ("bad tar header", name(1), None)),
    lambda root: (path(root, 2).write_bytes(b""), ("empty shard", name(2), None)),
    lambda root: (path(root, 3).unlink(), ("missing shard", name(3), None)),
    lambda root: (change(root, 4, "jpg", members(path(root, 4))[0][1][:300]), ("bad image", name(4), key(4))),
    lambda root: (change(root, 5, "jpg", bomb()), ("too large", name(5), key(5))),
    lambda root: (change(root, 6, "seg.png", encoded(np.zeros((8, 16), np.uint8))), ("mask size", name(6), key(6))),
    lambda root: (change(root, 7, "boxes.json", b'[{"bbox": [1, 2'), ("bad JSON", name(7), key(7))),
    lambda root: (
        append(root, 8, *[(f"{key(0, 0)}.{m.name.partition('.')[2]}", d) for m, d in members(path(root, 8))[:5]]),
        recount(root, 8, COUNT + 1),
        ("duplicate key", name(8), key(0, 0)),
    ),
    lambda root: (change(root, 9, "jpg", None), ("missing field", name(9), key(9))),
    lambda root: (change(root, 10, "txt", "Größe".encode("latin-1")), ("bad caption", name(10), key(10))),
    lambda root: (append(root, 11, link("../../evil.jpg", "/etc/passwd")), ("unsafe member", name(11), "../../evil")),
]


@pytest.fixture
def twelve(tmp_path):
    """A folder with 12 faults, one a shard, beside a whole one; and what they are."""
    root = folder(tmp_path / "broken", shards=13)
    return root, [plant(root)[-1] for plant in TWELVE]


def test_twelve_planted_faults_are_found_and_nothing_else(twelve, capsys):
    root, planted = twelve
    before = {p: p.read_bytes() for p in root.iterdir()}
    # the truncated shard lost nothing that the duplicate is of: its first sample is still there
    assert found(root) == planted
    code, out, err = run(capsys, root, "--workers", 2)
    assert code == 2 and len(err) == 1 and err[0].startswith("agglom data: 12 faults in ")
    assert [line.split(":")[0] for line in out[:12]] == [shard for _, shard, _ in planted]
    assert all(kind in line for (kind, _, _), line in zip(planted, out[:12], strict=True))
    assert sorted(out[13:]) == sorted(f"{1:7} {kind}" for kind, _, _ in planted)
    assert {p: p.read_bytes() for p in root.iterdir()} == before


def test_an_intact_folder_has_none(tmp_path, capsys):
    root = folder(tmp_path / "whole", shards=3)
    assert found(root) == []
    assert run(capsys, root, "--workers", 1) == (0, [f"no faults in 15 samples in 3 shards of {root}"], [])


def sub(data, **changes):
    return json.dumps([{**json.loads(data)[0], **changes}]).encode()


BOX = b'[{"bbox": [1, 1, 4, 5], "label": 1, "iscrowd": 0}]'


@pytest.mark.parametrize(
    ("extension", "data", "kind"),
    [
        ("cls", b"10", "class value"),
        ("cls", b"-1", "class value"),
        ("cls", b"[1,77]", "class value"),
        ("cls", b"cat", "bad class"),
        ("cls", b"[1", "bad JSON"),
        ("cls", b"9" * 5000, "bad class"),
        ("seg.png", encoded(np.full((16, 16), 3, np.uint8)), "mask value"),
        ("seg.png", encoded(np.zeros((16, 16), np.uint16)), "bad mask"),
        ("seg.png", encoded(np.zeros((16, 16, 3), np.uint8)), "bad mask"),
        ("seg.png", b"", "bad mask"),
        ("seg.png", bomb(), "too large"),
        ("jpg", b"", "bad image"),
        ("jpg", b"<svg/>", "bad image"),
        ("boxes.json", sub(BOX, bbox=[10, 1, 7, 5]), "bad box"),
        ("boxes.json", sub(BOX, bbox=[-1, 1, 7, 5]), "bad box"),
        ("boxes.json", sub(BOX, bbox=[1, 1, 0, 5]), "bad box"),
        ("boxes.json", sub(BOX, bbox=[1, 1, 5]), "bad box"),
        ("boxes.json", sub(BOX, bbox=[1, 1, float("nan"), 5]), "bad box"),
        ("boxes.json", sub(BOX, bbox="abcd"), "bad box"),
        ("boxes.json", sub(BOX, label="cat"), "bad box"),
        ("boxes.json", sub(BOX, label=10), "class value"),
        ("boxes.json", b"{}", "bad box"),
        ("boxes.json", b"[7]", "bad box"),
        ("boxes.json", b"[" * 100_000, "bad JSON"),
        ("boxes.json", b"\xff\xfe[", "bad JSON"),
    ],
)
def test_faults_of_fields(tmp_path, extension, data, kind):
    root = folder(tmp_path, shards=1)
    change(root, 0, extension, data)
    assert found(root) == [(kind, name(0), key(0))]


def test_every_fault_of_a_sample_is_named(tmp_path):
    root = folder(tmp_path, shards=1)
    change(root, 0, "txt", b"\xff")
    change(root, 0, "cls", b"cat")
    change(root, 0, "jpg", b"no picture")
    assert {kind for kind, _, _ in found(root)} == {"bad image", "bad class", "bad caption"}
    assert all(kind in KINDS for kind, _, _ in found(root))


def repeat(root, where):
    """The first shard's third sample again, there or at its own end."""
    extra = [(m.name, d) for m, d in members(path(root, 0))[10:15]]
    append(root, where, *extra)
    recount(root, where, COUNT + 1)


def twice(root):
    body = json.loads((root / "index.json").read_text())
    shards = body["splits"]["train"]["shards"]
    shards.append(shards[0])
    (root / "index.json").write_text(json.dumps(body))


def end_between_files(root):
    with tarfile.open(path(root, 0)) as tar:
        offset = tar.getmembers()[15].offset  # three whole samples
    path(root, 0).write_bytes(path(root, 0).read_bytes()[:offset])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: repeat(root, 0), ("duplicate key", name(0), key(0))),
        (lambda root: repeat(root, 1), ("duplicate key", name(1), key(0))),
        (lambda root: recount(root, 0, 4), ("wrong count", name(0), None)),
        (lambda root: recount(root, 0, 6), ("wrong count", name(0), None)),
        (end_between_files, ("truncated tar", name(0), None)),
        (lambda root: path(root, 0).write_bytes(b"no tar" * 1000), ("bad tar header", name(0), None)),
        (lambda root: path(root, 0).write_bytes(b"no"), ("truncated tar", name(0), None)),
        (twice, ("listed twice", name(0), None)),
        (lambda root: append(root, 0, ("/tmp/evil.jpg", b"x")), ("unsafe member", name(0), "/tmp/evil")),
        (lambda root: append(root, 0, ("a/../../evil.jpg", b"x")), ("unsafe member", name(0), "a/../../evil")),
        (lambda root: append(root, 0, link("evil", "/etc/passwd")), ("unsafe member", name(0), "evil")),
        (
            lambda root: append(root, 0, link("b.jpg", f"{key(0)}.jpg", tarfile.LNKTYPE)),
            ("unsafe member", name(0), "b"),
        ),
        (lambda root: append(root, 0, link("pipe.jpg", "", tarfile.FIFOTYPE)), ("unsafe member", name(0), "pipe")),
    ],
)
def test_faults_of_shards(tmp_path, spoil, expected):
    root = folder(tmp_path, shards=2)
    spoil(root)
    assert found(root) == [expected]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    root = folder(tmp_path, shards=1)
    monkeypatch.setattr("agglom.data.reading.MAX_BYTES", 5000)
    change(root, 0, "txt", b"a" * 6000)
    assert found(root) == [("too large", name(0), key(0))]


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.zeros((16, 16, 3), np.uint8), "JPEG", exif=exif)


ODD = {
    "cmyk": encoded(Image.new("CMYK", (16, 16)), "JPEG"),
    "16-bit": encoded(np.zeros((16, 16), np.uint16)),
    "palette": encoded(Image.new("P", (16, 16))),
    "exif": oriented(),
    "1-bit": encoded(Image.new("1", (16, 16))),
    "transparent": encoded(Image.new("RGBA", (16, 16))),
    "progressive": encoded(np.zeros((16, 16, 3), np.uint8), "JPEG", progressive=True),
    "webp": encoded(np.zeros((16, 16, 3), np.uint8), "WEBP"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_pictures_are_no_faults(tmp_path, data):
    root = folder(tmp_path, shards=1)
    change(root, 0, "jpg", data)
    assert found(root) == []


def test_a_picture_of_one_pixel_is_no_fault(tmp_path):
    root = folder(tmp_path, shards=1)
    change(root, 0, "jpg", encoded(np.zeros((1, 1, 3), np.uint8)))
    change(root, 0, "seg.png", encoded(np.zeros((1, 1), np.uint8)))
    change(root, 0, "boxes.json", b"[]")
    assert found(root) == []


def test_folders_and_unknown_files_are_no_faults(tmp_path):
    root = folder(tmp_path, shards=1)
    extra = tarfile.TarInfo("./")
    extra.type = tarfile.DIRTYPE
    append(root, 0, (extra, b""), ("README", b"hello"), ("._000000001.jpg", b"finder"), ("__meta__", b"x"))
    assert found(root) == []


# ---------------------------------------------------------------------------------------------------- cleaning


def test_a_cleaned_folder_has_no_faults_and_loses_nothing_good(twelve, tmp_path, capsys):
    root, planted = twelve
    out = tmp_path / "clean"
    code, lines, err = run(capsys, root, "--clean", out, "--workers", 1)
    assert code == 2 and lines[-1] == str(out / "index.json") and len(err) == 1
    assert found(out) == []
    index = read_index(out)
    stream = eval_stream(out, "train", fields=FIELDS, max_bad_fraction=0)
    kept = {sample["key"]: sample for sample in stream}
    bad = {at for _, _, at in planted if at} - {key(0, 0)}  # that one was a second one
    lost = {key(2, i) for i in range(COUNT)} | {key(3, i) for i in range(COUNT)}
    lost |= {key(1, i) for i in (2, 3, 4)}  # after the damaged header
    lost |= {key(0, i) for i in range(COUNT)} - set(kept)  # after the cut
    assert set(kept) == {f"{n:09d}" for n in range(13 * COUNT)} - bad - lost
    assert {key(0, 0), key(0, 1)} <= set(kept)
    for at, sample in kept.items():  # still everybody's own
        assert sample["cls"] == int(at) % 10 and sample["txt"] == f"number {int(at)}"
        assert int(sample["image"].float().mean().round()) == int(at) and int(sample["seg"][0, 0]) == int(at) % 3
    files = [shard.file for shard in index.shards("train")]
    assert files[-1] == name(12) and (out / name(12)).samefile(root / name(12))  # a whole one has a second name
    assert files[0] == name(0) and (out / name(0)).is_file()
    assert index.extra["verify"] == {"of": str(root), "removed": 13 * COUNT + 1 - len(kept)}
    assert (index.classes, index.fields) == (
        read_index(root, check_files=False).classes,
        {"train": tuple(sorted(FIELDS))},
    )


def test_cleaning_corrects_a_count(tmp_path):
    root = folder(tmp_path / "data", shards=2)
    recount(root, 0, 7)
    verify(root, workers=1, clean=tmp_path / "clean")
    assert read_index(tmp_path / "clean").counts == {"train": 10}
    assert all((tmp_path / "clean" / name(i)).samefile(path(root, i)) for i in range(2))


def test_cleaning_writes_nowhere_else(tmp_path):
    root = folder(tmp_path / "a" / "data", shards=1)
    append(root, 0, ("../../evil.jpg", b"x"), (f"{tmp_path}/evil.jpg", b"x"), link("evil.jpg", "/etc/passwd"))
    before = {str(p) for p in tmp_path.rglob("*")}
    verify(root, workers=1, clean=tmp_path / "a" / "clean")
    added = {str(Path(p).relative_to(tmp_path)) for p in {str(p) for p in tmp_path.rglob("*")} - before}
    assert added == {"a/clean", "a/clean/index.json", f"a/clean/{name(0)}"}
    assert {m.name.partition(".")[0] for m, _ in members(tmp_path / "a" / "clean" / name(0))} == {
        key(0, i) for i in range(COUNT)
    }


def test_a_writer_that_replaces_a_cleaned_folder_leaves_the_shards_elsewhere(tmp_path):
    root = folder(tmp_path / "data", shards=2)
    verify(root, workers=1, clean=tmp_path / "clean")
    from agglom.data.writing import _make_room

    _make_room(tmp_path / "clean", overwrite=True)
    assert path(root, 0).is_file() and not (tmp_path / "clean" / "index.json").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such shard folder"),
        (["data", "--clean", "data"], "holds shards already; choose a new folder"),
        (["data", "--workers", "0"], "workers: 0; valid: 1 or more"),
        ([], "data"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", shards=1)
    code, _, err = run(capsys, *args)
    assert code == 2 and len(err) == 1 and words in err[0]


def test_nothing_good_left(tmp_path):
    root = folder(tmp_path / "data", shards=1)
    path(root, 0).write_bytes(b"")
    with pytest.raises(UserError, match="nothing good is left"):
        verify(root, workers=1, clean=tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_the_documentation_lists_every_kind():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize("root", ["pipe:cat {}/{{}}", "file://{}", "memory://verified"])
def test_other_addresses(tmp_path, other_addresses, root):
    folder(tmp_path / "data", shards=2)
    change(tmp_path / "data", 0, "txt", b"\xff")
    if root.startswith("memory"):
        fsspec.filesystem("memory").put(str(tmp_path / "data") + "/", "/verified", recursive=True)
    root = root.format(tmp_path / "data")
    assert found(root, clean=tmp_path / "clean") == [("bad caption", name(0), key(0))]
    assert found(tmp_path / "clean") == [] and read_index(tmp_path / "clean").counts == {"train": 9}


def test_names_from_files_cannot_play_with_the_terminal(tmp_path, capsys):
    root = folder(tmp_path, shards=1)
    append(root, 0, ("\x1b[2Jevil\n\udcff.jpg", b"x"))
    code, out, _ = run(capsys, root, "--workers", 1)
    assert code == 2 and "\x1b" not in "".join(out) and "\\x1b[2Jevil" in out[0]
