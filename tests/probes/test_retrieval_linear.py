"""Retrieval through words: perfect, constant and shuffled features, scikit-learn's ridge, captions left out."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from agglom.features import InputSpec
from agglom.probes import LinearRetrievalProbe, Subject, solver
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.retrieval import distinct
from agglom.probes.retrieval_linear import Words, _fit
from agglom.probes.solver import Standardise

WORDS = [f"word{i}" for i in range(20)]
COUNTS = {"train": 300, "val": 60, "test": 60}


class Model:
    input = InputSpec(size=(16, 16), stride=4)


def subject(change=lambda x, rng: x, captions=lambda some: some):
    """Images of three of 20 words; their features are which ones."""
    features, targets = {}, {}
    for i, (role, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(i)
        drawn = [sorted(rng.choice(20, 3, replace=False)) for _ in range(count)]
        x = np.zeros((count, 20), np.float32)
        for row, own in zip(x, drawn, strict=True):
            row[own] = 1
        some = [(" ".join(WORDS[k] for k in own),) for own in drawn]
        features[role] = FeatureSet(change(x, rng).astype(np.float32))
        targets[role] = Targets([f"{role}{j}" for j in range(count)], captions=captions(some))
    return Subject("m", Model(), features, targets)


def test_features_that_are_the_words_find_everything():
    found = LinearRetrievalProbe().evaluate(subject())
    assert found.metrics["r1"] == 1 and found.metrics["text_to_image_r5"] == 1
    assert found.protocol["words"] == 20 and found.protocol["chance"] < 0.03
    assert found.resamples["r1"].shape == (1000,)


def test_constant_features_find_nothing_and_shuffled_ones_by_chance():
    constant = LinearRetrievalProbe().evaluate(subject(lambda x, rng: np.ones_like(x)))
    assert constant.metrics["r1"] == 0
    shuffled = LinearRetrievalProbe().evaluate(subject(lambda x, rng: rng.permutation(x)))
    assert shuffled.metrics["r1"] < 0.1 and shuffled.metrics["image_to_text_r10"] < 0.4  # chance: 0.02, 0.17


def test_the_map_is_scikit_learns(monkeypatch):
    one = subject(lambda x, rng: x @ np.diag(np.logspace(-1, 1, 20)) + rng.normal(size=x.shape))
    texts, of_image, _ = distinct(one.targets["train"].captions)
    words, x = Words(texts), one.features["train"].vectors("summary")
    scale = Standardise.of(x)
    monkeypatch.setattr(solver, "ENTRIES", 5000)  # in several chunks
    (weight,) = _fit(scale, x, words, texts, of_image, [0.3])
    tfidf = TfidfVectorizer().fit(texts)
    rows = tfidf.transform(texts).toarray()
    centred = rows - rows.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    z = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    y = np.stack([centred[own].mean(0) for own in of_image])
    expected = Ridge(alpha=0.3 * len(x), fit_intercept=False).fit(z, y).coef_.T
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-5)


def test_unknown_words_are_not_found_and_images_without_captions_only_lack_queries():
    def some(captions):
        captions = list(captions)
        if len(captions) == COUNTS["test"]:
            captions[0], captions[1] = ("never seen",), ("",)
        if len(captions) == COUNTS["train"]:
            captions[5] = ()
        return captions

    one = subject(captions=some)
    found = LinearRetrievalProbe().evaluate(one)
    assert found.metrics["image_to_text_r1"] == pytest.approx(58 / 59)
    texts = {text for own in one.targets["test"].captions for text in own if text}
    assert found.protocol["gallery"] == {"images": 60, "distinct captions": len(texts)}


def test_what_it_lacks_is_named():
    probe = LinearRetrievalProbe()
    assert probe.missing(subject()) is None
    assert probe.missing(subject(captions=lambda some: None)) == "the train split has no .txt"
    assert "two different captions" in probe.missing(subject(captions=lambda some: [("a",)] * len(some)))
