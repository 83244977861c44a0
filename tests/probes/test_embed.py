"""`agglom embed`: the file holds what the model says of each image, in order, whatever the model and the form."""

import io
import json
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import agglom
from agglom.callbacks import export_module
from agglom.cli import main
from agglom.data import write_index, write_shard
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes import extract as room
from agglom.probes import write_embeddings
from agglom.teachers import TinyTeacher, manifest


def stored(scenes, split):
    """keys, images in [0, 1] and labels, read from the tars by hand."""
    keys, images, labels = [], [], []
    for path in sorted(scenes.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                content = tar.extractfile(member).read()
                if kind == "cls":
                    labels.append(int(content))
                elif kind in ("jpg", "png", "webp"):
                    keys.append(key)
                    images.append(torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))))
    return keys, torch.stack(images).permute(0, 3, 1, 2) / 255, labels


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_reference_in_both_forms(scenes, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    keys, images, labels = stored(scenes, "test")
    expected = TinyTeacher("clip")(images)
    for name in ("new/x.npz", "x.parquet"):
        out = tmp_path / name
        main(["embed", "--model", "tiny:clip", "--data", str(scenes), "--out", str(out), "--split", "test"])
        assert capsys.readouterr().out == f"{out}: 32 images; key, summary (128), mean (192), label\n"
        assert [path.name for path in out.parent.glob("*x.*")] == [out.name], "no parts are left"
    table = parquet.read_table(tmp_path / "x.parquet")
    with np.load(tmp_path / "new" / "x.npz") as found:
        assert found["key"].tolist() == table["key"].to_pylist() == keys
        assert found["label"].tolist() == table["label"].to_pylist() == labels and len(set(labels)) > 3
        close(found["summary"], expected.summary)
        close(found["mean"], expected.spatial.mean((2, 3)))
        for column in ("summary", "mean"):
            rows = np.array(table[column].to_pylist(), np.float32)
            assert rows.dtype == found[column].dtype and np.array_equal(rows, found[column])
        about = json.loads(found["about"].item())
    assert about == json.loads(table.schema.metadata[b"agglom"])
    assert (about["model"], about["split"], about["agglom"]) == ("tiny:clip", "test", agglom.__version__)


@torch.no_grad()
def test_an_export_and_a_teachers_space(scenes, tiny_student, tiny_teachers, tmp_path):
    """The first rows alone, resized; through SAM's adaptor there is no summary."""
    module = Distiller(tiny_student(kwargs={"dynamic_img_size": True}), tiny_teachers("clip", "sam")).eval()
    run = tmp_path / "run"
    export_module(module, run / "export", manifest(dict(module.encoders.items())), 32, 7)
    student, images = agglom.load(run), stored(scenes, "train")[1][:5]
    small = torch.nn.functional.interpolate(images * 255, (32, 32), mode="bilinear", antialias=True).round() / 255
    shared = ["embed", "--model", str(run), "--data", str(scenes), "--size", "32", "--limit", "5"]
    for more, call in (([], student), *((["--adaptor", n], student.adaptors[n]) for n in ("clip", "sam"))):
        main([*shared, "--out", str(tmp_path / "x.npz"), *more])
        with np.load(tmp_path / "x.npz") as found:
            expected = call(small)
            close(found["mean"], expected.spatial.mean((2, 3)))
            assert len(found["key"]) == 5 and ("summary" in found) == (expected.summary is not None)
            if expected.summary is not None:
                close(found["summary"], expected.summary)


class Counting:
    """A model of two numbers, which counts the images that it saw."""

    input = InputSpec(size=(8, 8), stride=8)

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return Features(images.mean((2, 3))[:, :2], None)


def write(root, labels):
    pixels = [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(len(labels))]
    samples = [{"key": str(i), "image": x, **label} for i, (x, label) in enumerate(zip(pixels, labels, strict=True))]
    write_index(root, {"train": [write_shard(root / "train-000000.tar", samples)]})
    return root


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([{"cls": [0, 2]}, {"cls": []}, {"cls": 1}], [[True, False, True], [False] * 3, [False, True, False]]),
        ([{}, {}, {}], None),
    ],
)
def test_several_classes_and_none(labels, expected, tmp_path):
    write_embeddings(Counting(), write(tmp_path / "data", labels), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as found:
        assert ("label" in found) == (expected is not None) and "mean" not in found
        if expected is not None:
            assert found["label"].tolist() == expected


def test_what_was_computed_before_it_stopped_is_kept(tmp_path, monkeypatch):
    """The disk is full when the file is written: no half of a file, the old one stays, and no image is seen again."""
    data, out = write(tmp_path / "data", [{"cls": 0}] * 7), tmp_path / "x.npz"
    out.write_bytes(b"old")
    monkeypatch.setattr(room, "PART", 3)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    model = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(UserError, match=r"out: .*x\.npz: No space left on device; make room") as err:
            write_embeddings(model, data, out)
    assert "\n" not in str(err.value) and out.read_bytes() == b"old" and model.seen == 7 + 1  # one for its fingerprint
    write_embeddings(model, data, out)
    assert model.seen == 8 + 1 and len(np.load(out)["key"]) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x.npz"]


def test_several_processes_share_the_images(tmp_path, monkeypatch):
    """Threads in their place; the second waits for the first, which writes the file."""
    data, out = write(tmp_path / "data", [{"cls": 0}] * 8), tmp_path / "x.npz"
    monkeypatch.setattr(room, "PART", 2)
    models = [Counting(), Counting()]
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(write_embeddings, models[1], data, out, rank=1, world_size=2)
        while models[1].seen < 5:  # its parts and the fingerprint, before the first one begins
            assert not second.done()
        said = write_embeddings(models[0], data, out, rank=0, world_size=2)
        assert second.result() == "" and said.startswith(f"{out}: 8 images")
    assert models[1].seen == 1 + 4 <= models[0].seen < 1 + 8
    assert np.load(out)["summary"][:, 0].tolist() == pytest.approx([20 * i / 255 for i in range(8)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": "x.csv"}, "out: x.csv; valid: a file called .npz or .parquet"),
        ({"out": "x.parquet"}, "out: x.parquet needs pyarrow, which can't be imported (import of pyarrow halted"),
        ({"out": "file/x.npz"}, "out: file/x.npz: File exists; valid: a file in a folder that can be written"),
        ({"out": "/proc/agglom/x.npz"}, "out: /proc/agglom/x.npz: No such file or directory"),
        ({"split": "tran"}, "split: 'tran'; valid: test, train, val (did you mean train?)"),
        ({"size": "0"}, "size: 0; valid: 1 or more"),
        ({"limit": "-1"}, "limit: -1; valid: 1 or more"),
        ({"adaptor": "clip"}, "adaptor: 'clip'; valid: none"),
        ({"model": "tiny:clop"}, "tiny"),
        ({"model": "nothing"}, "model 'nothing': no such folder; valid: timm:NAME"),
        ({"data": "nothing"}, "nothing: no such shard folder"),
    ],
)
def test_bad_input_is_one_line(change, said, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # its import fails
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    options = {"model": "tiny:clip", "data": str(scenes), "out": "x.npz", **change}
    with pytest.raises(SystemExit) as err:
        main(["embed", *(word for key, value in options.items() for word in (f"--{key}", value))])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert err.value.code == 2 and line.startswith("agglom embed: ") and said in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
