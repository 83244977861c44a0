"""Segmentation by steps: what known models must score, windows as mmsegmentation's, schedule, bad input."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agglom.data import write_index, write_shard
from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes import Subject
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.gather import splits_of
from agglom.probes.segmentation_sgd import SegmentationSgdProbe, _loss, _Task, polynomial
from agglom.probes.segmenters import merge, windows
from agglom.probes.source import Source
from agglom.runs import resolve

K, CELL = 3, 8
COUNTS = {"train": 24, "val": 8, "test": 8}
QUICK = {"steps": 60, "batch": 8, "lr": (0.03,), "crop": 32}


class Colours:
    """Looks at means of cells of 4 pixels; of any size, or of 32 x 32 pixels alone."""

    def __init__(self, size=None, blind=False):
        self.input = InputSpec(size=size, stride=4, interpolation="bilinear")
        self.blind, self.seen = blind, set()

    def __call__(self, images):
        self.seen.add(tuple(images.shape[2:]))
        if self.input.size is not None and tuple(images.shape[2:]) != self.input.size:
            images = F.interpolate(images, self.input.size, mode="bilinear", antialias=True)
        maps = F.avg_pool2d(images, 4)
        return Features(maps.mean((2, 3)), torch.ones_like(maps) if self.blind else maps)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of 40 x 64 pixels made of cells of 8; a cell's class is its colour channel; some pixels ignored."""
    root = tmp_path_factory.mktemp("cells")
    splits = {}
    for number, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(number)
        samples = []
        for i in range(count):
            seg = rng.integers(0, K, (5, 8)).astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
            image = (np.eye(3, dtype=np.uint8)[seg] * 200 + rng.integers(0, 50, (40, 64, 3))).astype(np.uint8)
            seg[rng.random(seg.shape) < 0.1] = 255
            samples.append({"key": f"{split}{i}", "image": image, "seg": seg})
        splits[split] = [write_shard(root / f"{split}.tar", samples)]
    write_index(root, splits, seg_classes=["r", "g", "b"])
    return root


def subject(root, model):
    source = Source.open(root, fields=("seg",))
    targets, features = {}, {}
    for role in COUNTS:
        found = list(source.samples(role, fields=("seg",)))
        masks = np.stack([sample["seg"].numpy() for sample in found])
        targets[role] = Targets([sample["key"] for sample in found], masks=masks)
        features[role] = FeatureSet(mean=np.zeros((len(found), 3), np.float32))
    plan = splits_of(source.index)
    return Subject("m", model, features, targets, source=source, plan=plan, seg_classes=source.index.seg_classes)


@pytest.mark.parametrize("inference", ["slide", "whole"])
@pytest.mark.parametrize("size", [None, (32, 32)])
def test_features_that_know_and_features_that_do_not(shards, inference, size):
    model = Colours(size)
    found = SegmentationSgdProbe(**QUICK, inference=inference).evaluate(subject(shards, model))
    # a window's cells lie on the picture's; 40 x 64 pixels as a whole are resampled: to 32 x 51, or into 32 x 32
    assert found.metrics["miou"] > (0.8 if inference == "slide" else 0.55)
    assert found.resamples["miou"].std() > 0 and abs(found.resamples["miou"].mean() - found.metrics["miou"]) < 0.05
    assert found.protocol["crop"] == 32 and found.protocol["chosen"] == {"lr": 0.03}
    assert found.series["loss"][-1][1] < 0.5 * found.series["loss"][0][1]
    whole = (32, 52) if size is None else (32, 51)  # padded to the stride where the model doesn't resize
    assert model.seen == ({(32, 32)} if inference == "slide" else {(32, 32), whole})
    blind = SegmentationSgdProbe(**QUICK, inference=inference).evaluate(subject(shards, Colours(size, blind=True)))
    assert blind.metrics["miou"] < 0.25 and blind.metrics["macc"] == pytest.approx(1 / K, abs=0.02)


def test_the_rate_is_chosen_on_val_and_heads_do_not_meet(shards):
    """Training beside other heads changes nothing; a rate that learns nothing is not chosen."""
    alone = SegmentationSgdProbe(**QUICK).evaluate(subject(shards, Colours()))
    both = SegmentationSgdProbe(**{**QUICK, "lr": (0.03, 1e-8)}).evaluate(subject(shards, Colours()))
    assert both.protocol["chosen"] == {"lr": 0.03} and both.protocol["at_edge"]
    assert both.metrics == alone.metrics and both.series == alone.series
    assert both.protocol["val_miou"]["0.03"] > both.protocol["val_miou"]["1e-08"] + 0.2


def test_an_image_is_answered_without_regard_to_its_batch(shards):
    task = _Task(SegmentationSgdProbe(**{**QUICK, "steps": 3}), subject(shards, Colours()))
    heads, _ = task.train()
    images = torch.stack([scene.image for scene in task.read("test")])
    (together,) = task.predict(heads, images)
    alone = np.concatenate([next(task.predict(heads, image[None])) for image in images])
    assert together.shape == (8, 40, 64) and (together == alone).mean() > 0.999


def test_fpn_on_a_real_model(scenes):
    probe = SegmentationSgdProbe(head="fpn", steps=4, batch=4, lr=(0.003,))
    model = resolve("tiny:dino")
    source = Source.open(scenes, fields=("seg",), limits={"train": 8, "val": 4, "test": 4})
    masks = {r: np.stack([s["seg"].numpy() for s in source.samples(r)]) for r in COUNTS}
    targets = {role: Targets([str(i) for i in range(len(found))], masks=found) for role, found in masks.items()}
    features = {role: FeatureSet(mean=np.zeros((len(found), 1), np.float32)) for role, found in masks.items()}
    one = Subject("m", model, features, targets, source=source, plan=splits_of(source.index), seg_classes=("x",) * 11)
    before = {name: tensor.clone() for name, tensor in model.tensors()}
    found = probe.evaluate(one)
    assert 0 < found.metrics["miou"] < 1 and found.protocol["crop"] == 64 and found.protocol["classes"] == 11
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors())


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 71), (107, 150)])
def test_windows_are_those_of_mmsegmentation(size):
    pytest.importorskip("agglom.mmseg", reason="needs the extra agglom[mmseg]", exc_type=ImportError)
    from mmseg.models import EncoderDecoder

    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))

    def answer(crop, metas=None):  # depends on where in the window a pixel is
        return crop * torch.linspace(0, 1, 64) + crop.mean((2, 3), keepdim=True)

    config = SimpleNamespace(stride=(43, 43), crop_size=(64, 64))
    theirs = EncoderDecoder.slide_inference(
        SimpleNamespace(test_cfg=config, out_channels=3, encode_decode=answer), images, [{}]
    )
    corners = windows(size, 64, 43)
    ours = merge(((c, answer(images[..., c[0] : c[0] + 64, c[1] : c[1] + 64])) for c in corners), size)
    torch.testing.assert_close(ours, theirs)


def test_schedule_by_hand():
    rates = [polynomial(step, 100, 10) for step in range(100)]
    assert rates[:2] == [pytest.approx(1 / 11), pytest.approx(2 / 11)] and rates[10] == max(rates) == 1
    assert rates[55] == pytest.approx(0.5**0.9) and rates[99] == pytest.approx((1 / 90) ** 0.9)


def test_loss_leaves_ignored_pixels_out():
    logits = torch.randn(2, K, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, K, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    truth[0] = 255
    assert _loss(logits, truth).item() == pytest.approx(F.cross_entropy(logits[1:], truth[1:]).item())
    truth[:] = 255
    assert _loss(logits, truth).item() == 0


def test_bad_input_is_one_line(shards, tmp_path):
    for options, message in (
        ({"head": "fpm"}, "head: 'fpm'; valid: fpn, linear"),
        ({"inference": "whale"}, "inference: 'whale'; valid: slide, whole"),
        ({"lr": ()}, "valid: positive, one rate or more"),
        ({"crop": 0}, "crop 0"),
    ):
        with pytest.raises(UserError, match=message):
            SegmentationSgdProbe(**options)
    image, seg = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    good = subject(shards, Colours())
    for mask, message in (
        (seg[:8], r"sample b: mask size \(image of \(16, 16\) pixels, mask of \(8, 16\)"),
        (seg + 7, "mask value 7"),
    ):
        shard = write_shard(tmp_path / "train.tar", [{"key": "b", "image": image, "seg": mask}])
        write_index(tmp_path, {role: [shard] for role in COUNTS}, seg_classes=["r", "g", "b"])
        broken = Subject(
            "m",
            Colours(),
            good.features,
            good.targets,
            source=Source.open(tmp_path),
            plan=good.plan,
            seg_classes=("r",) * 3,
        )
        with pytest.raises(UserError, match=message):
            SegmentationSgdProbe(**QUICK).evaluate(broken)
    assert SegmentationSgdProbe().missing(good) is None
