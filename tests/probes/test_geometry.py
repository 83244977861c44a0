"""Geometry: RankMe and spread by hand, positions told outright or not at all, ridge against scikit-learn, shifts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from agglom.features import Features, InputSpec
from agglom.probes import GeometryProbe, Subject
from agglom.probes.cells import draw_cells, positions, read_cells
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.geometry import rank_me
from agglom.probes.position import RIDGES, PositionFit, position_errors, r2
from agglom.probes.statistics import interval

GRID, STRIDE = 6, 8
COUNTS = {"train": 40, "val": 4, "test": 30}


def model(function, size=None):
    class Model:
        input = InputSpec(size=size, stride=STRIDE)

        def __call__(self, images):
            maps = function(images)
            return Features(maps.mean((2, 3)), maps)

    return Model()


def evaluate(function, side=GRID * STRIDE, size=None, **options):
    """The probe on random images, with features as the pipeline would have extracted them."""
    rng = torch.Generator().manual_seed(0)
    shown = {r: torch.randint(256, (n, 3, side, side), generator=rng, dtype=torch.uint8) for r, n in COUNTS.items()}
    backbone, features = model(function, size), {}
    for role, images in shown.items():
        found = backbone(images / 255)
        features[role] = FeatureSet(found.summary.numpy(), found.summary.numpy(), found.spatial.half().numpy())
    subject = Subject(
        "m",
        backbone,
        features,
        {role: Targets([str(i) for i in range(n)]) for role, n in COUNTS.items()},
        source=SimpleNamespace(size=None, samples=lambda split, **_: ({"image": image} for image in shown[split])),
        plan={role: {"split": role, "rows": "all"} for role in COUNTS},
    )
    probe = GeometryProbe(**{"cells": 500, "images": 20, **options})
    assert probe.missing(subject) is None
    return probe.evaluate(subject)


def place(images, channels=5):
    """Where each cell is, turned into other channels."""
    axis = (2 * torch.arange(GRID) + 1) / GRID - 1
    both = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    turn = torch.randn(channels, 2, generator=torch.Generator().manual_seed(1))
    return torch.einsum("cd,dhw->chw", turn, both).expand(len(images), -1, -1, -1) + 2


def test_rankme_and_spread_by_hand():
    # singular values 2, 1, 1: shares 1/2, 1/4, 1/4 of entropy 1.5 ln 2
    assert rank_me(torch.diag(torch.tensor([2.0, 1.0, -1.0])), chunk=2) == pytest.approx(2**1.5, rel=1e-4)
    found = evaluate(lambda x: torch.ones(len(x), 4, GRID, GRID)).metrics
    assert [found[f"{kind}_{name}"] for kind in ("summary", "map") for name in ("rankme", "std")] == pytest.approx(
        [1, 0, 1, 0], abs=1e-4
    )
    noise = torch.Generator().manual_seed(0)
    even = evaluate(lambda x: torch.randn(len(x), 8, GRID, GRID, generator=noise), cells=2000).metrics
    assert even["map_std"] == pytest.approx(1, abs=0.02) and even["map_rankme"] == pytest.approx(8, abs=0.1)
    line = evaluate(lambda x: torch.randn(len(x), 1, GRID, GRID, generator=noise) * torch.ones(8, 1, 1)).metrics
    assert line["map_rankme"] == pytest.approx(1, abs=0.01), "scale is not a direction"


def test_what_the_references_are():
    said = evaluate(lambda x: F.avg_pool2d(x, STRIDE)).protocol["references"]
    assert said["summary_rankme"] == {"floor": 1, "ceiling": 3} and said["map_std"]["even"] == 1
    assert said["position_r2"] == {"chance": 0, "ceiling": 1}


def test_position_told_outright_and_not_at_all():
    outright = evaluate(place)
    assert outright.metrics["position_r2"] == pytest.approx(1, abs=1e-4)
    low, high = interval(outright.resamples["position_r2"])
    assert 0.999 < low <= high <= 1
    constant = evaluate(lambda x: torch.ones(len(x), 4, GRID, GRID))
    assert constant.metrics["position_r2"] == pytest.approx(0, abs=0.01)
    content = evaluate(lambda x: F.avg_pool2d(x, STRIDE))
    assert content.metrics["position_r2"] == pytest.approx(0, abs=0.03)
    half = evaluate(lambda x: place(x)[:, :1])  # one mixture of two coordinates: half of what is to be known
    assert half.metrics["position_r2"] == pytest.approx(0.5, abs=0.05)


def test_a_channel_that_spoke_once_does_not_decide():
    """One in 6,000 train cells has 1e-3 there, a test cell 1: the others' place is still told."""
    torch.manual_seed(0)
    where = torch.rand(100, 60, 2) * 2 - 1
    x = torch.cat([where, torch.zeros(100, 60, 1)], -1)
    x[7, 3, 2] = 1e-3
    fit, seen = PositionFit.of(x, where), x.clone()
    seen[0, 0, 2] = 1.0
    assert r2(position_errors(fit, seen, where).mean(0)) > 0.99


def test_ridge_and_its_choice_are_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(23, 3, 40)) * np.logspace(-1, 1, 40)
    where = rng.uniform(-1, 1, (23, 3, 2))
    x[..., -2:] += 3 * where  # weak, among much noise, few cells: the strength matters
    fit = PositionFit.of(torch.from_numpy(x).float(), torch.from_numpy(where).float())
    flat, y = x.reshape(-1, 40), where.reshape(-1, 2)
    z, fold = (flat - flat.mean(0)) / np.sqrt(flat.var(0).mean()), np.repeat(np.arange(23) % 5, 3)
    centred = y - y.mean(0)

    def solve(rows, ridge):
        return Ridge(alpha=ridge * rows.sum(), fit_intercept=False).fit(z[rows], centred[rows])

    errors = [
        sum(((solve(fold != k, r).predict(z[fold == k]) - centred[fold == k]) ** 2).sum() for k in range(5))
        for r in RIDGES
    ]
    assert fit.ridge == RIDGES[int(np.argmin(errors))] and 0 < int(np.argmin(errors)) + 1 < len(RIDGES)
    expected = solve(fold >= 0, fit.ridge).predict(z) + y.mean(0)
    np.testing.assert_allclose(fit(torch.from_numpy(flat).float()).numpy(), expected, atol=1e-4)


def test_shifts_of_what_moves_along_and_of_what_is_bound_to_its_place():
    means = evaluate(lambda x: F.avg_pool2d(x, STRIDE))
    assert means.metrics["shift_error"] < 1e-5 < 0.3 < means.metrics["shift_error_half"]
    assert means.protocol["shift_images"] == 20 and len(means.resamples["shift_error"]) == 1000
    assert evaluate(place).metrics["shift_error"] > 0.2
    same = evaluate(lambda x: torch.ones(len(x), 2, GRID, GRID))
    assert "shift_error" not in same.metrics and same.protocol["shift_images"] == 0


def test_a_shift_is_of_whole_cells_of_a_model_that_resizes():
    """40 pixels become 48, and 8 of these a cell."""

    def function(x):
        return F.avg_pool2d(F.interpolate(x, (48, 48), mode="bicubic", antialias=True).clamp(0, 1), STRIDE)

    assert evaluate(function, side=40, size=(48, 48)).metrics["shift_error"] < 1e-5


def test_a_map_too_small_to_shift_is_said():
    found = evaluate(lambda x: F.avg_pool2d(x, STRIDE), side=2 * STRIDE)
    assert found.protocol["shift"] == "none: a map of 2 x 2 cells of 8 pixels" and "shift_error" not in found.metrics


def test_cells_are_drawn_alike_and_read_where_they_are():
    maps = np.arange(7 * 2 * 3 * 4, dtype=np.float32).reshape(7, 2, 3, 4)
    draw = draw_cells(7, (3, 4), 35, seed=1)
    assert draw.cells.shape == (7, 5) and all(len(set(row)) == 5 for row in draw.cells.tolist())
    found = read_cells(maps, draw)
    for i, row in enumerate(draw.cells):
        for j, cell in enumerate(row):
            np.testing.assert_array_equal(found[i, j].numpy(), maps[i, :, cell // 4, cell % 4])
    np.testing.assert_allclose(positions(np.array([[0, 11]]), (3, 4))[0], [[-2 / 3, -0.75], [2 / 3, 0.75]], rtol=1e-6)
    few = draw_cells(1000, (3, 4), 10, seed=1)
    assert few.cells.shape == (10, 1) and few.rows[0] == 0 and few.rows[-1] == 999
