"""The probes' arithmetic against independent formulations.

kNN against scikit-learn with the same weights, logistic regression against scikit-learn's optimum, average precision
against scikit-learn's, mIoU against brute force (with ignore and absent classes), pixel features against full
upsampling, bootstrap against the binomial.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from agglom.probes import solver
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.knn import GROUP, largest, neighbours, votes
from agglom.probes.ranking import average_precision, map_resamples, mean_average_precision
from agglom.probes.segmentation import count_areas, draw_pixels, predict, scores
from agglom.probes.solver import Head, Standardise, fit_logistic
from agglom.probes.statistics import accuracy_resamples, bootstrap, draws, interval


def blobs(count, dim, classes, seed=0, spread=1.5):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=rng)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[y] + spread * torch.randn(count, dim, generator=rng), y


@pytest.mark.parametrize("k", [1, 10, 20])
def test_knn_is_sklearns_with_the_same_weights(k):
    x, y = blobs(300, 16, 5)
    q, _ = blobs(80, 16, 5, seed=1)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    model.fit(x.double().numpy(), y.numpy())
    similarity, index = neighbours(q, x, 20, query_chunk=7, bank_chunk=33)
    mine = votes(similarity, y[index], [k], 5, 0.07)[0]
    mine = mine / mine.sum(1, keepdim=True)
    np.testing.assert_allclose(mine.numpy(), model.predict_proba(q.double().numpy()), atol=1e-4)


def test_chunks_do_not_change_neighbours():
    x, _ = blobs(257, 8, 3)
    q, _ = blobs(50, 8, 3, seed=2)
    whole, chunked = neighbours(q, x, 100), neighbours(q, x, 100, query_chunk=11, bank_chunk=40)
    torch.testing.assert_close(whole[0], chunked[0])
    assert (whole[1] == chunked[1]).float().mean() > 0.999


def test_knn_of_several_classes_is_sklearns():
    x, y = blobs(200, 8, 4)
    q, _ = blobs(40, 8, 4, seed=1)
    several = torch.stack([y == 0, y % 2 == 0, y >= 2], 1)
    model = KNeighborsClassifier(15, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = model.fit(x.double().numpy(), several.numpy()).predict_proba(q.double().numpy())
    similarity, index = neighbours(q, x, 20)
    mine = votes(similarity, several[index], [3, 15], 3, 0.07)[1]
    np.testing.assert_allclose(mine.numpy(), np.stack([p[:, 1] for p in expected], 1), atol=1e-4)


@pytest.mark.parametrize("length", [8 * GROUP, 8 * GROUP + 5, 50 * GROUP, 50 * GROUP + GROUP - 1])
def test_the_largest_are_topks(length):
    block = torch.randn(9, length, generator=torch.Generator().manual_seed(length))
    block[3] = 1.0  # all the same
    block[4, -3:] = 9.0  # beyond the last whole group
    block[5, :] = torch.arange(length)
    for k in (1, 4, 20):
        values, columns = largest(block, k)
        expected = block.topk(k, dim=1).values
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(block.gather(1, columns), expected)
        assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("l2", [1.0, 0.03, 0.001])
def test_softmax_regression_reaches_sklearns_optimum(l2):
    x, y = blobs(400, 12, 4)
    x = x * torch.logspace(-1, 1, 12)  # badly scaled on purpose
    head = fit_logistic(x, y, classes=4, l2=[l2])[0]
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=20_000).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(head(x).softmax(1).numpy(), theirs.predict_proba(x.double().numpy()), atol=1e-3)
    coef = torch.from_numpy(theirs.coef_).float()
    np.testing.assert_allclose(head.weight.numpy(), coef.numpy(), atol=1e-3 * (1 + coef.abs().max().item()))


def test_warm_starts_give_the_same_heads_in_the_order_asked():
    x, y = blobs(200, 6, 3)
    path = fit_logistic(x, y, classes=3, l2=[0.01, 1.0, 0.1])
    for strength, head in zip([0.01, 1.0, 0.1], path, strict=True):
        alone = fit_logistic(x, y, classes=3, l2=[strength])[0]
        torch.testing.assert_close(head(x).softmax(1), alone(x).softmax(1), atol=1e-3, rtol=0)


def test_sigmoid_regression_is_sklearns_class_by_class():
    x, y = blobs(300, 10, 5)
    several = torch.stack([y == 0, y % 2 == 0, y >= 2], 1)
    head = fit_logistic(x, several, classes=3, l2=[0.02])[0]
    for k in range(3):
        model = LogisticRegression(C=1 / (0.02 * len(x)), tol=1e-10, max_iter=20_000)
        theirs = model.fit(x.double().numpy(), several[:, k].numpy())
        np.testing.assert_allclose(head.weight[k], theirs.coef_[0], atol=2e-3)
        np.testing.assert_allclose(head(x).sigmoid()[:, k], theirs.predict_proba(x.double().numpy())[:, 1], atol=1e-3)


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, y = blobs(150, 6, 3)
    whole, scale = fit_logistic(x, y, classes=3, l2=[0.05])[0], Standardise.of(x)
    monkeypatch.setattr(solver, "ENTRIES", 100)
    assert len(list(solver.chunks(150, 6))) > 5
    torch.testing.assert_close(fit_logistic(x, y, classes=3, l2=[0.05])[0].weight, whole.weight, atol=1e-4, rtol=1e-4)
    kept = x.clone()
    overwritten = fit_logistic(kept, y, classes=3, l2=[0.05], overwrite=True)[0]
    torch.testing.assert_close(overwritten.weight, whole.weight, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(kept, x)
    chunked = Standardise.of(x.view(150, 2, 3))
    torch.testing.assert_close(chunked.mean, scale.mean)
    torch.testing.assert_close(chunked.std, scale.std)
    torch.testing.assert_close(scale.mean, x.mean(0))
    torch.testing.assert_close(scale.std, x.std(0, correction=0))
    torch.testing.assert_close(scale.into(x.clone()), scale(x))


def test_standardise_of_a_large_offset():
    x = 1e4 + torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Standardise.of(x).std, x.double().std(0, correction=0).float(), rtol=1e-4, atol=0)


def ranked(images=120, seed=0):
    """Scores with ties, and truth with a class that no image has."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, 4)) < [0.3, 0.05, 0.7, 0.0]
    return np.round(rng.normal(size=truth.shape) + truth, 1).astype(np.float32), truth


def test_average_precision_is_sklearns_with_ties():
    scores_, truth = ranked()
    expected = [average_precision_score(truth[:, k], scores_[:, k]) for k in range(3)]
    found = average_precision(scores_, truth)
    np.testing.assert_allclose(found[:3], expected, rtol=1e-12)
    assert np.isnan(found[3]) and mean_average_precision(scores_, truth) == pytest.approx(np.mean(expected))
    assert np.isnan(mean_average_precision(scores_, np.zeros_like(truth)))
    by_hand = average_precision(np.array([[3.0], [2], [1]]), np.array([[True], [False], [True]]))
    assert by_hand[0] == pytest.approx((1 + 2 / 3) / 2)


def test_resampled_average_precision_is_that_of_repeated_images():
    scores_, truth = ranked()
    found = map_resamples(scores_, truth, seed=3)
    counts = draws(len(truth), 1000, 3, 0)
    for i in (0, 17, 999):
        rows = np.repeat(np.arange(len(truth)), counts[i].astype(int))
        expected = [average_precision_score(truth[rows, k], scores_[rows, k]) for k in range(3) if truth[rows, k].any()]
        assert found[i] == pytest.approx(np.mean(expected), rel=1e-9)
    low, high = interval(found)
    assert low < mean_average_precision(scores_, truth) < high


def test_standardise_silences_constants_and_folds():
    x = torch.cat([torch.randn(50, 3) * 5 + 2, torch.full((50, 1), 7.0)], 1)
    scale = Standardise.of(x)
    assert (scale(x)[:, 3] == 0).all()
    head = Head(torch.randn(2, 4), torch.randn(2))
    torch.testing.assert_close(scale.fold(head)(x), head(scale(x)), atol=1e-4, rtol=1e-4)


def test_miou_by_brute_force_with_ignore_and_absent_classes():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 255], size=(5, 9, 7)).astype(np.uint8)  # 3 is in predictions only, 4 nowhere
    predicted = rng.choice([0, 1, 2, 3], size=truth.shape)
    ious, recalls = [], []
    valid = truth != 255
    for c in range(5):
        t, p = (truth == c) & valid, (predicted == c) & valid
        if (t | p).any():
            ious.append((t & p).sum() / (t | p).sum())
        if t.any():
            recalls.append((t & p).sum() / t.sum())
    assert len(ious) == 4
    found = scores(count_areas(predicted, truth, 5).sum(0))
    assert found["miou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert found["macc"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert found["aacc"] == pytest.approx((predicted == truth)[valid].mean(), abs=1e-12)


def test_miou_by_hand_and_of_nothing():
    truth = np.array([[[0, 0, 1, 255]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 0]]])  # class 0: 1/2, class 1: 1/2
    assert scores(count_areas(predicted, truth, 2).sum(0)) == {"miou": 0.5, "aacc": pytest.approx(2 / 3), "macc": 0.75}
    assert np.isnan(scores(np.zeros((3, 2), np.int64))["miou"])


def test_a_head_on_drawn_pixels_is_the_head_on_upsampled_logits():
    maps = torch.randn(3, 5, 4, 4).half()
    masks = np.random.default_rng(0).integers(0, 3, (3, 12, 12)).astype(np.uint8)
    masks[0, :3] = 255
    features, targets = FeatureSet(spatial=maps.numpy()), Targets(list("abc"), masks=masks)
    x, y, each = draw_pixels(features, targets, 10**6, 0)  # every pixel, in some order
    head = Head(torch.randn(3, 5), torch.randn(3))
    logits = F.interpolate(
        F.conv2d(maps.float(), head.weight[..., None, None], head.bias), (12, 12), mode="bilinear", align_corners=False
    )
    flat, truth = logits.permute(0, 2, 3, 1).reshape(-1, 3), torch.from_numpy(masks).reshape(-1).long()
    assert each == 144 and len(y) == 3 * 144 - 36
    mine = F.cross_entropy(head(x), y)
    torch.testing.assert_close(mine, F.cross_entropy(flat, truth, ignore_index=255), atol=1e-5, rtol=1e-5)
    assert (predict(head, maps.float(), (12, 12)) == logits.argmax(1)).float().mean() > 0.999


def test_intervals_are_the_binomials_and_paired():
    correct = np.arange(400) < 300
    low, high = interval(accuracy_resamples(correct))
    sigma = (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - 1.96 * sigma, abs=0.006) and high == pytest.approx(
        0.75 + 1.96 * sigma, abs=0.006
    )
    values = np.random.default_rng(0).normal(size=(400, 1))
    first, twice = (bootstrap(v, lambda m: m[:, 0], seed=3) for v in (values, 2 * values))
    np.testing.assert_allclose(twice, 2 * first)
    assert not np.allclose(first, bootstrap(values, lambda m: m[:, 0], seed=4))
    assert interval(np.array([np.nan, np.inf])) is None
