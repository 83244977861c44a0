"""KoLeo against a loop and by hand; its invariances; duplicates, a batch of one, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from agglom.objectives.koleo import koleo


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_hand_computed():
    """Angles 0, 60 and 180 degrees: the nearest neighbours are at 1, 1 and sqrt 3. Lengths don't matter."""
    x = torch.tensor([[1.0, 0], [0.5, math.sqrt(3) / 2], [-1, 0]]) * torch.tensor([[3.0], [0.1], [1]])
    assert koleo(x).tolist() == pytest.approx([0, 0, -math.log(3) / 2], abs=1e-5)
    assert koleo(torch.tensor([[1.0, 0], [-1, 0]])).tolist() == pytest.approx([-math.log(2)] * 2, abs=1e-5)


def test_against_a_loop():
    x = torch.randn(9, 5)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    want = [-math.log(min((unit[i] - unit[j]).norm() for j in range(9) if j != i)) for i in range(9)]
    assert koleo(x).tolist() == pytest.approx(want, abs=1e-4)


def test_permuting_permutes_and_rotating_changes_nothing():
    x, order = torch.randn(8, 6), torch.randperm(8)
    torch.testing.assert_close(koleo(x[order]), koleo(x)[order])
    torch.testing.assert_close(koleo(x @ torch.linalg.qr(torch.randn(6, 6))[0]), koleo(x), rtol=1e-4, atol=1e-5)


def test_a_step_down_the_gradient_spreads_the_batch():
    x = torch.randn(8, 3, requires_grad=True)
    before = koleo(x).mean()
    before.backward()
    assert koleo(x.detach() - 0.01 * x.grad).mean() < before


def test_duplicates_and_zeros_are_finite():
    for x in (torch.randn(4, 6).repeat(2, 1), torch.ones(5, 6), torch.zeros(5, 6), 1 + 1e-7 * torch.randn(5, 6)):
        x.requires_grad_()
        out = koleo(x)
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
    assert koleo(torch.ones(5, 6)).tolist() == pytest.approx([-math.log(1e-6)] * 5)


def test_one_image():
    x = torch.randn(1, 6, requires_grad=True)
    out = koleo(x)
    out.sum().backward()
    assert out.tolist() == [0] and x.grad.abs().max() == 0


def test_bf16_autocast_and_gradient():
    x = (100 * torch.randn(6, 8)).bfloat16().requires_grad_()
    out = koleo(x)
    out.sum().backward()
    assert out.dtype == torch.float32 and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(x), out)
    assert torch.autograd.gradcheck(koleo, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))
    # the sphere's normal is no direction of descent
    x = torch.randn(6, 8, requires_grad=True)
    koleo(x).sum().backward()
    assert F.cosine_similarity(x, x.grad, dim=1).abs().max() < 1e-4


def test_bad_input():
    with pytest.raises(ValueError, match="summaries"):
        koleo(torch.randn(2, 3, 4, 4))
