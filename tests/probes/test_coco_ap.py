"""COCO's twelve numbers: pycocotools says the same, a case by hand, and AP of resamples is that of repeated images."""

import numpy as np
import pytest

from agglom.probes.coco_ap import METRICS, Found, Truth, coco_metrics, match, resampled_ap


def some(count, seed=0, classes=4):
    """Images with up to four objects, some of them crowds; detections around them, of which a fifth lacks."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(count):
        n = rng.integers(0, 5)
        boxes = np.concatenate([rng.uniform(0, 100, (n, 2)), rng.uniform(5, 150, (n, 2))], 1)
        labels = rng.integers(0, classes, n)
        truth.append(Truth(boxes, labels, rng.random(n) < 0.15))
        of = np.repeat(np.arange(n), rng.integers(0, 40 if n else 1, n))  # with four, often more than 100
        near = boxes[of] + rng.normal(0, 4, (len(of), 4))
        near[:, 2:] = near[:, 2:].clip(1)
        guess = np.where(rng.random(len(of)) < 0.8, labels[of], rng.integers(0, classes + 1, len(of)))
        keep = rng.random() < 0.8
        found.append(Found(near[: keep * len(of)], guess[: keep * len(of)], rng.random(keep * len(of)).round(2)))
    return truth, found


def pycocotools_metrics(truth, found):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    gt = COCO()
    objects = [(i, *x) for i, image in enumerate(truth, 1) for x in zip(*image, strict=True)]
    gt.dataset = {
        "images": [{"id": i} for i in range(1, len(truth) + 1)],
        "categories": [{"id": int(c)} for c in np.unique(np.concatenate([t.labels for t in (*truth, *found)]))],
        "annotations": [
            dict(id=n, image_id=i, bbox=list(b), category_id=int(c), iscrowd=int(k), area=b[2] * b[3])
            for n, (i, b, c, k) in enumerate(objects, 1)
        ],
    }
    gt.createIndex()
    dt = gt.loadRes(
        [
            dict(image_id=i, bbox=list(b), category_id=int(c), score=float(s))
            for i, image in enumerate(found, 1)
            for b, c, s in zip(*image, strict=True)
        ]
    )
    evaluation = COCOeval(gt, dt, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [np.nan if x < 0 else x for x in evaluation.stats]


@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_says_the_same(seed):
    """With crowds, ties, images without objects, images without detections and a class that nobody has."""
    pytest.importorskip("pycocotools")
    truth, found = some(60, seed)
    assert any(t.crowd.any() for t in truth) and not all(len(t.boxes) for t in truth)
    assert any(len(f.boxes) == 0 < len(t.boxes) for t, f in zip(truth, found, strict=True))
    mine = coco_metrics(truth, found)
    assert tuple(mine) == METRICS
    np.testing.assert_allclose(list(mine.values()), pycocotools_metrics(truth, found), atol=1e-6)


def test_by_hand():
    """Two objects of one class. The best detection has IoU 0.6 with the first: true at 0.5, 0.55 and 0.6. The second
    is a duplicate, always false; the third covers the second object exactly.

    At 0.5 to 0.6: precision 1 up to recall 1/2 (51 of 101 points), then 2/3. Beyond: the first true one comes third,
    precision 1/3 up to recall 1/2.
    """
    truth = [Truth(np.array([[0, 0, 10, 10], [50, 50, 10, 10.0]]), np.array([0, 0]), np.zeros(2, bool))]
    boxes = np.array([[0, 0, 10, 6], [0, 0, 10, 5.9], [50, 50, 10, 10.0]])
    found = [Found(boxes, np.zeros(3, int), np.array([0.9, 0.8, 0.7]))]
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    scores = coco_metrics(truth, found)
    assert scores["ap50"] == pytest.approx(low) and scores["ap75"] == pytest.approx(high)
    assert scores["ap"] == pytest.approx(0.3 * low + 0.7 * high)
    assert scores["ar1"] == pytest.approx(0.3 * 0.5) and scores["ar100"] == pytest.approx(0.3 * 1 + 0.7 * 0.5)
    assert np.isnan(scores["ap_large"]) and scores["ap_small"] == scores["ap"]


def test_nothing_found_and_nothing_there():
    truth, found = some(5)
    none = [Found(f.boxes[:0], f.labels[:0], f.scores[:0]) for f in found]
    assert set(coco_metrics(truth, none).values()) == {0.0}
    crowds = [Truth(t.boxes, t.labels, np.ones(len(t.boxes), bool)) for t in truth]
    assert np.isnan(list(coco_metrics(crowds, found).values())).all()
    assert np.isnan(resampled_ap(crowds, found, np.ones((1, 5)))).all()


@pytest.mark.parametrize("classes", [1, 4])
def test_resamples_are_repeated_images(classes):
    """With one class, some images have more detections than the 100 that count."""
    truth, found = some(40, seed=7, classes=classes)
    assert any((f.labels == 0).sum() > 100 for f in found) == (classes == 1)
    rng = np.random.default_rng(0)
    found = [f._replace(scores=rng.random(len(f.scores))) for f in found]  # where scores tie, their order would count
    draws = rng.integers(40, size=(3, 40))
    counts = np.stack([np.ones(40), *(np.bincount(d, minlength=40) for d in draws)])
    mine = resampled_ap(truth, found, counts)
    for row, images in zip(mine, [np.arange(40), *draws], strict=True):
        scores = coco_metrics([truth[i] for i in sorted(images)], [found[i] for i in sorted(images)])
        np.testing.assert_allclose(row, [scores["ap"], scores["ap50"]], atol=1e-9)


def test_crowds_explain_any_number_of_detections_but_objects_come_first():
    objects, crowd = np.array([[0, 0, 10, 10], [0, 0, 40, 40.0]]), np.array([False, True])
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 10, 10], [90, 90, 9, 9.0]])
    assert match(boxes, objects, crowd).T.tolist() == [[1] * 10, [-1] * 10, [-1] * 10, [0] * 10]
