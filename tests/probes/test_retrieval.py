"""Retrieval against brute force, with captions that several images share; perfect, constant and shuffled features."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agglom.features import InputSpec
from agglom.probes import RetrievalProbe, Subject
from agglom.probes import retrieval as module
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.retrieval import distinct, ranks
from agglom.probes.statistics import interval

D = 128


class Model:
    input = InputSpec(size=(16, 16), stride=4)


class Tower:
    """Every text has a direction of its own."""

    def encode_text(self, texts):
        rows = [torch.randn(D, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts]
        return F.normalize(torch.stack(rows), dim=1)


def subject(captions, summary, **changes):
    targets = {"test": Targets([str(i) for i in range(len(captions))], captions=captions)}
    options = {"name": "m", "targets": targets, "text": {"m": Tower()}, "show": (0,)} | changes
    return Subject(model=Model(), features={"test": FeatureSet(summary)}, **options)


def own(captions):
    """Each image is the sum of its captions."""
    return torch.stack([Tower().encode_text(c).sum(0) for c in captions]).numpy()


def captions_of(count):
    return [(f"a picture of thing {i * i}", f"{i} seen") for i in range(count)]


def test_perfect_features_find_everything():
    captions = captions_of(20)
    captions[3] = captions[4]  # two images with the same words: either will do
    found = RetrievalProbe().evaluate(subject(captions, own(captions)))
    assert found.metrics == {name: 1.0 for name in found.metrics} and len(found.metrics) == 7
    assert found.show["retrieval"][0][0][0] in captions[0]
    assert found.protocol["gallery"] == {"images": 20, "distinct captions": 38} and found.protocol["captions"] == 40
    assert interval(found.resamples["r1"]) == (1, 1)


def test_constant_features_find_nothing_and_shuffled_ones_by_chance():
    captions = captions_of(40)
    constant = RetrievalProbe().evaluate(subject(captions, np.ones((40, D), np.float32)))
    chance = constant.protocol["chance"]
    assert chance == pytest.approx((2 / 80 + 1 / 40) / 2)
    assert constant.metrics["text_to_image_r10"] == 0 and constant.metrics["r1"] <= chance
    order = np.random.default_rng(0).permutation(40)
    shuffled = RetrievalProbe().evaluate(subject(captions, own(captions)[order])).metrics
    assert shuffled["r1"] < 0.1 and shuffled["text_to_image_r10"] == pytest.approx(0.25, abs=0.15)


def test_ranks_and_recalls_by_brute_force(monkeypatch):
    rng = np.random.default_rng(0)
    pool = [f"text {i * 7}" for i in range(30)]  # fewer than captions, so that many are shared
    captions = [tuple(rng.choice(pool, rng.integers(1, 4))) for _ in range(25)]
    captions[7] = ("",)  # an image without a caption: found by others, asked for nothing
    summary = (own(captions) * 1.5 + rng.normal(size=(25, D))).astype(np.float32)
    monkeypatch.setattr(module, "SCORES", 70)  # chunks of two or three
    result = RetrievalProbe().evaluate(subject(captions, summary))
    images = F.normalize(torch.from_numpy(summary), dim=1)
    texts = sorted({text for some in captions for text in some if text})
    scores = images @ Tower().encode_text(texts).T  # (25, T)
    to_text, to_image, per_image = [], [], []
    for i, some in enumerate(captions):
        if some == ("",):
            continue
        ranked = [texts[j] for j in scores[i].argsort(descending=True).tolist()]
        to_text.append(min(ranked.index(text) for text in some))
        for text in some:
            ranked = scores[:, texts.index(text)].argsort(descending=True).tolist()
            to_image.append(next(r for r, image in enumerate(ranked) if text in captions[image]))
        per_image.append(to_text[-1] == 0)
    for top in (1, 5, 10):
        assert result.metrics[f"image_to_text_r{top}"] == pytest.approx(np.mean(np.array(to_text) < top))
        assert result.metrics[f"text_to_image_r{top}"] == pytest.approx(np.mean(np.array(to_image) < top))
    assert 0.1 < result.metrics["image_to_text_r1"] < 0.9, "a case that could go either way"
    assert result.metrics["r1"] == (result.metrics["image_to_text_r1"] + result.metrics["text_to_image_r1"]) / 2
    assert result.resamples["image_to_text_r1"].mean() == pytest.approx(np.mean(per_image), abs=0.02)
    assert result.resamples["text_to_image_r5"].mean() == pytest.approx(result.metrics["text_to_image_r5"], abs=0.02)


def test_captions_are_told_apart_by_their_words():
    texts, of_image, of_text = distinct([("b", "a", "b"), (" ",), ("a", "c")])
    assert texts == ("b", "a", "c")
    assert [x.tolist() for x in of_image] == [[0, 1, 0], [], [1, 2]]
    assert [x.tolist() for x in of_text] == [[0], [0, 2], [2]]


def test_an_equal_similarity_counts_against():
    queries, gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert ranks(queries, gallery, [np.array([1]), np.array([2])]).tolist() == [1, 0]
    assert ranks(queries[:1], gallery, [np.array([0, 1])]).tolist() == [0], "two right ones are no rivals"


def test_towers_adaptors_and_what_is_missing():
    captions = captions_of(12)
    test = FeatureSet(own(captions))
    through = {"clip": test, "siglip": FeatureSet(-test.summary)}
    s = subject(captions, None, name="s", text={"clip": Tower(), "siglip": Tower()}, through=through)
    metrics = RetrievalProbe().evaluate(s).metrics
    assert metrics["r1"] == 1 and metrics["r1@siglip"] == 0 and "image_to_text_r5@siglip" in metrics
    probe = RetrievalProbe()
    assert "no adaptor with a summary for m" in probe.missing(subject(captions, None))
    assert "no teacher has a text tower" in probe.missing(subject(captions, test.summary, text={}))
    assert "no .txt" in probe.missing(subject(captions, test.summary, targets={"test": Targets(["a", "b"])}))
    assert "different captions" in probe.missing(subject([("a",)] * 12, test.summary))
