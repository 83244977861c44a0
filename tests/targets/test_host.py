"""No training step makes the host wait for the device, save the measuring of a covariance normaliser.

A tensor on the meta device has no value, so anything that would ask the device for one raises.
"""

import pytest
import torch

from agglom.objectives import (
    ARKD,
    MSE,
    RKD,
    AngleBalanced,
    Cosine,
    CosineSmoothL1,
    DampenedMSE,
    FlattenedCosineSmoothL1,
    Gram,
    SmoothL1,
)
from agglom.targets import PHIS, Identity, Standardize, Whiten

NORMALIZERS = [
    Identity(8),
    Standardize(8),
    Standardize(8, schedule="frozen", warmup_steps=3),
    Standardize(8, schedule="running"),
    PHIS(8, update_every=100),
    Whiten(8, update_every=100),
]


@pytest.mark.parametrize("norm", NORMALIZERS, ids=lambda n: type(n).__name__)
def test_normalizers(norm):
    if norm.full:
        for _ in range(64):  # past the early measurements; the next one is due at 100
            norm.update(torch.randn(20, 8))
        norm.refresh()
    norm.to("meta")
    x, mask = torch.empty(4, 3, 3, 8, device="meta"), torch.empty(4, 3, 3, dtype=torch.bool, device="meta")
    for _ in range(4):
        assert norm.normalize(x, mask).shape == x.shape
        norm.update(x, mask)
        norm.update(x)
    assert norm.denormalize(x).shape == x.shape


@pytest.mark.parametrize(
    "loss",
    [Cosine(), SmoothL1(), MSE(), DampenedMSE(), CosineSmoothL1(), FlattenedCosineSmoothL1(), AngleBalanced(), Gram()],
    ids=lambda m: type(m).__name__,
)
def test_losses_on_maps(loss):
    loss.to("meta")
    x, mask = torch.empty(4, 8, 3, 3, device="meta"), torch.empty(4, 3, 3, dtype=torch.bool, device="meta")
    loss.update(x, mask)
    assert loss(x, x, mask).shape == loss(x, x).shape == (4,)


@pytest.mark.parametrize("loss", [Cosine(), AngleBalanced(), RKD(), ARKD()], ids=lambda m: type(m).__name__)
def test_losses_on_summaries(loss):
    x = torch.empty(4, 8, device="meta")
    loss.to("meta").update(x)
    assert loss(x, x).shape == (4,)
