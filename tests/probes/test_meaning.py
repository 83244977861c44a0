"""What every probe must say of models whose quality is known: perfect, constant, and with shuffled labels.

Also: hyper-parameters never see test, zero-shot equals the formula, and a probe says what it is missing.
"""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agglom.errors import UserError
from agglom.features import InputSpec
from agglom.probes import KnnProbe, LinearProbe, LinearSgdProbe, Probe, SegmentationProbe, Subject, ZeroShotProbe
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.zeroshot import classifier

K, GRID = 4, 4
SIZES = {"train": 240, "val": 120, "test": 200}
CLASSES = ("bag", "coat", "shirt", "sandal")


class Tower:
    """Class k is e_k, whatever stands around its name."""

    def encode_text(self, texts):
        return torch.stack([torch.eye(K)[next(i for i, c in enumerate(CLASSES) if c in t)] for t in texts])


class Noise:
    def encode_text(self, texts):
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts]
        return F.normalize(torch.stack(rows), dim=1)


class Model:
    input = InputSpec(size=(16, 16), stride=4)


def subject(kind="perfect", shuffle=False, **changes):
    features, targets = {}, {}
    for i, (role, count) in enumerate(SIZES.items()):
        rng = np.random.default_rng(i)
        labels = rng.integers(0, K, count)
        cells = rng.integers(0, K, (count, GRID, GRID))
        masks = cells.astype(np.uint8)  # one pixel a cell, so that perfect features can be perfect
        one_hot = np.eye(K, dtype=np.float32)
        summary, spatial = one_hot[labels], one_hot[cells].transpose(0, 3, 1, 2)
        if kind == "constant":
            summary, spatial = np.ones_like(summary), np.ones_like(spatial)
        if shuffle:
            labels = rng.permutation(labels)
            masks = rng.permutation(masks.reshape(-1)).reshape(masks.shape)
        features[role] = FeatureSet(summary, spatial.mean((2, 3)), spatial.astype(np.float16))
        targets[role] = Targets([f"{role}{j}" for j in range(count)], labels, masks)
    full = Subject(
        "m", Model(), features, targets, text={"m": Tower()}, classes=CLASSES, seg_classes=CLASSES, show=(0, 3)
    )
    return replace(full, **changes)


PROBES = [
    KnnProbe(),
    LinearProbe(),
    LinearSgdProbe(steps=100),
    SegmentationProbe(),
    ZeroShotProbe(templates=["a {}", "one {}"]),
]
each_probe = pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)


@each_probe
def test_contract(probe):
    assert isinstance(probe, Probe) and probe.missing(subject()) is None
    result = probe.evaluate(subject())
    assert probe.metric in result.metrics and result.resamples[probe.metric].shape == (1000,)
    assert {"features", "chance"} <= set(result.protocol)


@each_probe
def test_perfect_features_reach_the_ceiling(probe):
    assert probe.evaluate(subject()).metrics[probe.metric] == pytest.approx(1.0)


@each_probe
def test_constant_features_stay_at_chance(probe):
    result = probe.evaluate(subject("constant"))
    truth = subject().targets["test"]
    least = min(np.bincount(truth.labels)) / len(truth.labels)
    if probe.name == "segmentation":  # one class everywhere: its own frequency over K
        assert result.metrics["miou"] <= result.protocol["chance"] + 1e-9
    else:
        assert least - 1e-9 <= result.metrics["top1"] <= result.protocol["chance"] + 1e-9


@each_probe
def test_shuffled_labels_are_at_chance(probe):
    result = probe.evaluate(subject(shuffle=True))
    if probe.name == "segmentation":
        assert result.metrics["miou"] < 0.25
    else:
        assert abs(result.metrics["top1"] - 1 / K) < 3.5 * (0.25 * 0.75 / SIZES["test"]) ** 0.5


@each_probe
def test_poisoned_test_labels_change_no_choice(probe):
    rng = np.random.default_rng(5)
    honest = subject(shuffle=True)
    noisy = {r: replace(f, summary=f.summary + rng.normal(size=f.summary.shape)) for r, f in honest.features.items()}
    honest = replace(honest, features={r: replace(f, summary=f.summary.astype(np.float32)) for r, f in noisy.items()})
    test = honest.targets["test"]
    poisoned = replace(test, labels=(test.labels + 1) % K, masks=(test.masks + 1) % K)
    a = probe.evaluate(honest)
    b = probe.evaluate(replace(honest, targets={**honest.targets, "test": poisoned}))
    for key in ("chosen", "val_top1", "val_miou", "features"):
        assert a.protocol.get(key) == b.protocol.get(key)
    assert a.metrics != b.metrics


def test_knn_and_linear_choose_on_val():
    result = LinearProbe(features=("summary", "mean")).evaluate(subject())
    assert result.protocol["chosen"]["features"] == "summary"  # the mean patch knows nothing of the label
    scores = KnnProbe(ks=(1, 5, 240)).evaluate(subject()).protocol
    assert scores["chosen"]["k"] == 1 and set(scores["val_top1"]) == {"1", "5", "240"}


def test_mean_patch_stands_in_for_a_missing_summary():
    s = subject()
    s = replace(s, features={r: replace(f, summary=None) for r, f in s.features.items()})
    assert KnnProbe().evaluate(s).protocol["features"] == "mean"
    assert LinearProbe().evaluate(s).protocol["features"] == "mean"
    assert "no text tower" in ZeroShotProbe().missing(s)


def test_zeroshot_is_the_formula():
    rng = np.random.default_rng(0)
    tower, templates, names = Noise(), ("a {}", "the {}"), (*CLASSES, "hat", "belt")
    s = subject(text={"m": tower}, classes=names)
    test = FeatureSet(rng.normal(size=(SIZES["test"], 6)).astype(np.float32))
    result = ZeroShotProbe(templates=templates).evaluate(replace(s, features={**s.features, "test": test}))
    weights = []
    for name in names:
        mean = tower.encode_text([t.format(name) for t in templates]).mean(0)
        weights.append(mean / mean.norm())
    logits = torch.from_numpy(test.summary) @ torch.stack(weights).T
    labels = torch.from_numpy(s.targets["test"].labels)
    for top in (1, 5):
        hit = (logits.topk(top).indices == labels[:, None]).any(1).float().mean().item()
        assert result.metrics[f"top{top}"] == pytest.approx(hit)
    torch.testing.assert_close(classifier(tower, names, templates), torch.stack(weights))


def test_zeroshot_goes_through_the_adaptor():
    s = subject("constant", name="student")
    assert "no adaptor" in ZeroShotProbe().missing(s)
    s = replace(s, through={"m": subject().features["test"]})
    result = ZeroShotProbe().evaluate(s)
    assert result.metrics["top1"] == 1.0 and "adaptor" in result.protocol["features"]["m"]


def test_missing_things_are_named():
    s = subject()
    bare = {role: Targets(t.keys) for role, t in s.targets.items()}
    assert ".cls" in KnnProbe().missing(replace(s, targets=bare))
    assert ".cls" in ZeroShotProbe().missing(replace(s, targets=bare))
    assert ".seg.png" in SegmentationProbe().missing(replace(s, targets=bare))
    one = {role: replace(t, labels=np.zeros_like(t.labels)) for role, t in s.targets.items()}
    assert "single class" in LinearProbe().missing(replace(s, targets=one))
    flat = {role: replace(f, spatial=None) for role, f in s.features.items()}
    assert "feature map" in SegmentationProbe().missing(replace(s, features=flat))
    assert "names no classes" in ZeroShotProbe().missing(replace(s, classes=None))


def test_bad_templates_and_masks():
    for templates in ([], ["a photo"], ["{} {}"]):
        with pytest.raises(UserError, match="templates"):
            ZeroShotProbe(templates=templates)
    with pytest.raises(UserError, match=r"train0: mask value 3; valid: 0 to 1 and 255"):
        SegmentationProbe().evaluate(subject(seg_classes=("a", "b")))


FROM_LABELS = [KnnProbe(ks=(1, 10)), LinearProbe(), LinearSgdProbe(steps=100)]
each_of_labels = pytest.mark.parametrize("probe", FROM_LABELS, ids=lambda p: p.name)


@each_of_labels
def test_a_class_absent_from_train_is_named_and_its_images_count_as_wrong(probe):
    s = subject()
    keep = np.flatnonzero(s.targets["train"].labels != 3)
    s = replace(
        s,
        targets={**s.targets, "train": s.targets["train"].take(keep)},
        features={**s.features, "train": s.features["train"].take(keep)},
    )
    test = s.targets["test"].labels
    result = probe.evaluate(s)
    assert result.metrics["top1"] == pytest.approx(float((test != 3).mean()), abs=1e-6)
    first = f"sandal (first in test sample test{int((test == 3).argmax())})"
    assert result.protocol["warning"] == f"no train image of {first}; such test images count as wrong"
    assert "warning" not in probe.evaluate(subject()).protocol


def several(kind="perfect", shuffle=False):
    """As `subject`, each image with any number of classes; the features are these classes, and a constant for none."""
    s, features, targets = subject(), {}, {}
    for i, (role, count) in enumerate(SIZES.items()):
        rng = np.random.default_rng(i)
        labels = rng.random((count, K)) < [0.5, 0.3, 0.2, 0.4]
        summary = np.concatenate([labels, np.ones((count, 1))], 1).astype(np.float32)
        summary = np.ones_like(summary) if kind == "constant" else summary
        labels = rng.permutation(labels) if shuffle else labels
        features[role] = FeatureSet(summary, summary)
        targets[role] = replace(s.targets[role], labels=labels)
    return replace(s, features=features, targets=targets)


@each_of_labels
def test_several_classes_an_image(probe):
    assert probe.missing(several()) is None
    perfect, constant, shuffled = (probe.evaluate(s) for s in (several(), several("constant"), several(shuffle=True)))
    prevalence = several().targets["test"].labels.mean()
    # not every combination of classes that is in test is in train, which neighbours can't make up
    assert perfect.metrics["map"] > (0.98 if probe.name == "knn" else 1 - 1e-6)
    assert set(perfect.metrics) == {"map"} and perfect.resamples["map"].shape == (1000,)
    assert constant.metrics["map"] == pytest.approx(prevalence) == constant.protocol["chance"]
    low, high = np.quantile(shuffled.resamples["map"], [0.005, 0.995])
    assert low - 0.02 < prevalence < high and shuffled.metrics["map"] < prevalence + 0.08


@each_of_labels
def test_splits_that_write_labels_in_two_ways(probe):
    """Numbers in one split and lists in another, of which none has the last class."""
    s, single = several(), subject()
    with_constant = np.pad(single.features["test"].summary, ((0, 0), (0, 1)), constant_values=1)
    mixed = replace(
        s,
        features={**s.features, "test": FeatureSet(with_constant, with_constant)},
        targets={
            **s.targets,
            "val": replace(s.targets["val"], labels=s.targets["val"].labels[:, :3]),
            "test": single.targets["test"],
        },
    )
    assert probe.missing(mixed) is None and probe.evaluate(mixed).metrics["map"] > 0.9


@each_of_labels
def test_labels_that_can_not_be_learned_from(probe):
    s, many = subject(), several()

    def change(s, role, labels):
        return replace(s, targets={**s.targets, role: replace(s.targets[role], labels=labels)})

    def problem(s, role, labels):
        return probe.missing(change(s, role, labels))

    train = s.targets["train"].labels
    assert problem(s, "val", None) == "the val split has no .cls"
    assert problem(s, "train", np.full_like(train, 2)) == "the train split has a single class (shirt)"
    assert problem(many, "train", np.zeros((len(train), K), bool)) == "no train image has a class"
    assert problem(many, "test", np.zeros((SIZES["test"], K), bool)) == "no test image has a class"
    some = many.targets["train"].labels.copy()
    some[:, 1] = False
    result = probe.evaluate(change(many, "train", some))
    assert result.protocol["warning"].startswith("no train image of coat (first in test sample test")
