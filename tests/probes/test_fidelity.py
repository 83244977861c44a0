"""Fidelity: perfect, mean, scaled and shuffled features; CKA against Gram matrices; maps on another grid; the curve
over resolutions of a student that follows its teacher and of one that becomes another model at a larger size.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agglom.data import write_index, write_shard
from agglom.features import Features, InputSpec
from agglom.probes import FidelityProbe, Subject, run_probes
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.similarity import linear_cka
from agglom.probes.source import Source
from agglom.probes.statistics import interval

N, C, GRID = 120, 6, 4


class Model:
    input = InputSpec(size=(16, 16), stride=4)


def features(seed=0, offset=0.0, grid=GRID):
    rng = np.random.default_rng(seed)
    spatial = (rng.normal(size=(N, C, grid, grid)) + offset).astype(np.float16)
    summary = (rng.normal(size=(N, C)) + offset).astype(np.float32)
    return FeatureSet(summary, spatial.astype(np.float32).mean((2, 3)), spatial)


def change(x, function):
    """Another set, by a function of an array whose first axis are images."""
    spatial = function(x.spatial.astype(np.float32))
    return FeatureSet(function(x.summary), spatial.mean((2, 3)), spatial.astype(np.float16))


def evaluate(ours, theirs):
    targets = {"test": Targets([str(i) for i in range(N)])}
    peers = {"clip": {"test": theirs}, "student > clip": {"test": ours}}
    subject = Subject("student > clip", Model(), {"test": ours}, targets, adaptor="clip", peers=peers)
    probe = FidelityProbe(cells=600)
    assert probe.missing(subject) is None
    return probe.evaluate(subject)


@pytest.mark.parametrize("kind", ["summary", "map"])
def test_perfect_mean_scaled_and_shuffled_features(kind):
    teacher = features(offset=0.5)

    def metrics(function):
        found = evaluate(change(teacher, function), teacher).metrics
        return [found[f"{kind}_{name}"] for name in ("cosine", "mse", "cka")]

    assert metrics(lambda x: x) == pytest.approx([1, 0, 1], abs=1e-6)
    cosine, mse, cka = metrics(lambda x: np.ones_like(x) * x.mean((0, *range(2, x.ndim)), keepdims=True))
    assert mse == pytest.approx(1, abs=1e-5) and cka == 0 and 0 < cosine < 1
    # twice the features: the error is |t|^2 over its variance
    t = teacher.summary if kind == "summary" else teacher.spatial.astype(np.float32)
    axes = (0, *range(2, t.ndim))
    expected = (t**2).mean(axes).sum() / t.var(axes).sum()
    assert metrics(lambda x: 2 * x) == pytest.approx([1, expected, 1], rel=1e-4)
    order = np.random.default_rng(1).permutation(N)
    centred = features()
    found = evaluate(change(centred, lambda x: x[order]), centred)
    assert abs(found.metrics[f"{kind}_cosine"]) < 0.15 and found.metrics[f"{kind}_mse"] == pytest.approx(2, abs=0.2)
    assert found.metrics[f"{kind}_cka"] < 0.15
    said = found.protocol["references"]
    assert said[f"{kind}_cka"] == pytest.approx(found.metrics[f"{kind}_cka"], abs=0.1)
    assert abs(said[f"{kind}_cosine"]) < 0.15


def test_intervals_hold_the_value_and_perfection_has_none():
    teacher = features()
    noise = np.random.default_rng(3)
    found = evaluate(change(teacher, lambda x: x + noise.normal(size=x.shape)), teacher)
    for name in ("summary_cosine", "summary_mse", "map_cosine", "map_mse"):
        low, high = interval(found.resamples[name])
        assert low < found.metrics[name] < high and high - low < 0.6
    assert set(found.resamples) == {"summary_cosine", "summary_mse", "map_cosine", "map_mse"}
    low, high = interval(evaluate(teacher, teacher).resamples["map_mse"])
    assert low == high == 0


def test_a_map_on_another_grid_meets_the_teachers():
    teacher, ours = features(grid=4), features(seed=1, grid=6)
    found = evaluate(ours, teacher)
    t = torch.from_numpy(teacher.spatial).float()
    p = F.interpolate(torch.from_numpy(ours.spatial).float(), (4, 4), mode="bilinear", antialias=True)
    assert found.metrics["map_cosine"] == pytest.approx(F.cosine_similarity(p, t, dim=1).mean().item(), abs=1e-5)
    error = (p - t).square().sum() / (t - t.mean((0, 2, 3), keepdim=True)).square().sum()
    assert found.metrics["map_mse"] == pytest.approx(error.item(), rel=1e-4)
    assert found.protocol["grids"] == {"adaptor": [6, 6], "teacher": [4, 4]}


def test_cka_reads_both_maps_at_the_same_cells():
    """A rotation of the channels and a scale change nothing, wherever cells are drawn."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(C, C)))[0].astype(np.float32)
    teacher = features()
    found = evaluate(change(teacher, lambda x: 3 * np.einsum("nc...,cd->nd...", x, turn)), teacher)
    assert found.metrics["map_cka"] == pytest.approx(1, abs=1e-4)
    assert found.protocol["cka_cells"] == 600 and found.metrics["map_cosine"] < 0.9


def test_linear_cka_is_that_of_centred_gram_matrices():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 9, generator=rng) + 3, torch.randn(50, 5, generator=rng)
    y[:, 0] += 2 * x[:, 0]
    centre = torch.eye(50, dtype=torch.float64) - 1 / 50
    a, b = (centre @ (m.double() @ m.double().T) @ centre for m in (x, y))
    expected = (a * b).sum() / (a.norm() * b.norm())
    assert 0.1 < expected < 0.9
    assert linear_cka(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert linear_cka(x, y, chunk=7) == pytest.approx(expected.item(), rel=1e-9)
    assert linear_cka(x, torch.full((50, 4), 0.1)) == 0


def test_what_it_lacks_is_named():
    teacher = features()
    subject = Subject("student > clip", Model(), {"test": teacher}, {}, adaptor="clip", peers={})
    assert "clip is not among the models" in FidelityProbe().missing(subject)
    bare = FeatureSet(spatial=teacher.spatial, mean=teacher.mean)
    subject = Subject(
        "s", Model(), {"test": FeatureSet(teacher.summary)}, {}, adaptor="sam", peers={"sam": {"test": bare}}
    )
    assert "in common with sam" in FidelityProbe().missing(subject)
    found = evaluate(teacher, bare)
    assert set(found.metrics) == {"map_cosine", "map_mse", "map_cka"}
    assert found.protocol["mode_switching"] == "no curve: the model takes 16 x 16 pixels only"


class Means:
    """Means of cells of 4 pixels, and of all."""

    input = InputSpec(size=(16, 16), stride=4)

    def __call__(self, images):
        maps = F.avg_pool2d(images, 4)
        return Features(maps.mean((2, 3)), maps)


class Free(Means):
    """The same at any size, through an adaptor that may become another model above 16 pixels."""

    input = InputSpec(size=None, stride=4)

    def __init__(self, switches):
        def adaptor(images):
            found = Means()(images)
            return Features(-found.summary, 1 - found.spatial) if switches and images.shape[-1] > 16 else found

        self.adaptors = {"clip": adaptor}


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """Shards of smooth images, 32 pixels, so that all sizes show the same."""
    root, rng = tmp_path_factory.mktemp("waves"), np.random.default_rng(0)
    rows, columns = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32), indexing="ij")
    splits = {}
    for split, count in {"train": 12, "val": 12, "test": 40}.items():
        samples = []
        for i in range(count):
            a, b, c = rng.uniform(-2, 2, (3, 3))
            image = 127 + 100 * np.sin(a * rows[..., None] + b * columns[..., None] + c)
            samples.append({"key": f"{split}{i:03d}", "image": image.astype(np.uint8), "cls": i % 2})
        splits[split] = [write_shard(root / f"{split}-000000.tar", samples)]
    write_index(root, splits, classes=("a", "b"))
    return root


@pytest.mark.parametrize("size", [16, None])
def test_the_curve_over_resolutions(waves, tmp_path, size):
    probe = FidelityProbe(scales=(2, 0.5, 1, 1.01, 1.5), images=10)
    models = {"steady": Free(False), "switching": Free(True), "clip": Means()}
    report = run_probes(models, waves, [probe], tmp_path, student="steady", teachers=["clip"], size=size, show=1)
    side = size or 32
    steady, switching = (report["series"][f"{name} > clip"]["fidelity"] for name in ("steady", "switching"))
    assert [x for x, _ in steady["mode_switching"]] == [side // 2, side, side * 1.5, side * 2]  # 1.01 is 1 again
    assert max(y for _, y in steady["mode_switching"][1:]) < 0.02
    assert max(y for _, y in steady["mode_switching_summary"]) < 1e-3
    assert steady["mode_switching"][0][1] > 2 * steady["mode_switching"][-1][1], "what a grid half as fine can't say"
    for name in ("mode_switching", "mode_switching_summary"):
        assert switching[name][0] == steady[name][0]
        assert switching[name][-1][1] > 1
    said = report["protocol"]["fidelity"]["models"]["steady > clip"]["mode_switching"]
    assert said["images"] == 10 and said["sizes"][0] == [side // 2, side // 2]
    assert "series" in report and "clip" not in report["series"]


def test_the_curve_shows_what_is_stored_and_not_what_was_resized(waves, tmp_path):
    seen = []

    class Watching(Free):
        def __init__(self):
            self.adaptors = {"clip": lambda images: seen.append(images) or Means()(images)}

    models = {"s": Watching(), "clip": Means()}
    probe = FidelityProbe(scales=(2,), images=3)
    run_probes(models, waves, [probe], tmp_path, student="s", teachers=["clip"], size=16, show=1)
    stored = [s["image"] for s in Source.open(waves).samples("test", fields=())]
    shown = torch.stack([torch.as_tensor(stored[i]) for i in (0, 20, 39)])  # evenly spaced
    (larger,) = [images for images in seen if images.shape[-1] == 32]
    torch.testing.assert_close(larger, shown / 255)


def test_the_curve_at_the_probes_own_size_is_the_probes_error(waves, tmp_path):
    probe = FidelityProbe(scales=(1,), images=1000)
    found = run_probes(
        {"s": Free(True), "clip": Means()}, waves, [probe], tmp_path, student="s", teachers=["clip"], size=24, show=1
    )
    ((pixels, error),) = found["series"]["s > clip"]["fidelity"]["mode_switching"]
    metrics = found["models"]["s > clip"]["fidelity"]
    assert pixels == 24 and error == pytest.approx(metrics["map_mse"], rel=1e-3) and error > 0.1
    ((_, lost),) = found["series"]["s > clip"]["fidelity"]["mode_switching_summary"]
    assert lost == pytest.approx(1 - metrics["summary_cosine"], abs=1e-5) and math.isfinite(lost)
