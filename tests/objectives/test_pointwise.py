"""Token-wise losses: the contract shared by all, hand-computed values, masks, and mixtures against their parts."""

import math

import pytest
import torch

from agglom.objectives import MSE, Cosine, CosineSmoothL1, DampenedMSE, FlattenedCosineSmoothL1, SmoothL1

LOSSES = [
    Cosine(),
    SmoothL1(),
    SmoothL1(beta=2.0),
    MSE(),
    DampenedMSE(),
    CosineSmoothL1(),
    CosineSmoothL1(cosine_weight=0.5, smooth_l1_weight=0.5),
    FlattenedCosineSmoothL1(),
]
SHAPES = [(6, 8), (6, 8, 3, 5)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda m: type(m).__name__)
class TestContract:
    def test_shape_and_permutation(self, loss, shape):
        x, z = torch.randn(shape), torch.randn(shape)
        out = loss(x, z)
        assert out.shape == (6,) and out.dtype == torch.float32 and (out > 0).all()
        order = torch.randperm(6)
        torch.testing.assert_close(loss(x[order], z[order]), out[order])

    def test_zero_with_zero_gradient_when_equal(self, loss, shape):
        z = torch.randn(shape)
        x = z.clone().requires_grad_()
        out = loss(x, z)
        out.sum().backward()
        assert out.abs().max() < 1e-6 and x.grad.abs().max() < 1e-6

    def test_target_gets_no_gradient(self, loss, shape):
        x, z = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        loss(x, z).sum().backward()
        assert z.grad is None and x.grad.abs().sum() > 0

    def test_gradient_is_right(self, loss, shape):
        x, z = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: loss(x, z), x)

    @pytest.mark.parametrize("scale", [1e2, 0.0])
    def test_finite_in_bf16(self, loss, shape, scale):
        x = (torch.randn(shape) * scale).bfloat16().requires_grad_()
        z = (torch.randn(shape) * scale).bfloat16()
        out = loss(x, z)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.isfinite().all() and x.grad.isfinite().all()

    def test_inference_mode_target(self, loss, shape):
        with torch.inference_mode():
            z = torch.randn(shape)
        loss(torch.randn(shape, requires_grad=True), z).sum().backward()

    def test_shapes_must_agree(self, loss, shape):
        with pytest.raises(ValueError, match="differ in shape"):
            loss(torch.randn(shape), torch.randn(shape[0], 1, *shape[2:]))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda m: type(m).__name__)
class TestMask:
    def test_only_valid_tokens_count(self, loss):
        """A mask of whole columns is the same as a narrower map."""
        x, z = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
        mask = torch.zeros(3, 2, 5, dtype=torch.bool)
        mask[..., :3] = True
        torch.testing.assert_close(loss(x, z, mask), loss(x[..., :3], z[..., :3]))

    def test_nothing_valid_is_zero_and_nan_stays_outside(self, loss):
        x = torch.randn(2, 4, 2, 2, requires_grad=True)
        z = torch.randn(2, 4, 2, 2)
        z[0], z[1, :, 0, 0] = float("nan"), float("inf")
        mask = torch.ones(2, 2, 2, dtype=torch.bool)
        mask[0], mask[1, 0, 0] = False, False
        out = loss(x, z, mask)
        out.sum().backward()
        assert out[0] == 0 and out.isfinite().all() and x.grad.isfinite().all()
        assert x.grad[0].abs().max() == 0 and x.grad[1, :, 0, 0].abs().max() == 0

    def test_bad_mask(self, loss):
        x = torch.randn(2, 4, 2, 2)
        for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 2, 2)):
            with pytest.raises(ValueError, match="mask"):
                loss(x, x, mask)


def test_hand_computed():
    x, z = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert Cosine()(x, z).item() == pytest.approx(1 - 24 / 25)
    x, z = torch.tensor([[0.0, 5.0]]), torch.tensor([[0.5, 1.0]])  # differences 0.5 and 4
    assert MSE()(x, z).item() == pytest.approx((0.25 + 16) / 2)
    assert SmoothL1()(x, z).item() == pytest.approx((0.125 + 3.5) / 2)
    assert SmoothL1(beta=2.0)(x, z).item() == pytest.approx((0.0625 + 3.0) / 2)
    assert DampenedMSE()(x, z).item() == pytest.approx((0.125 + 2 * math.sqrt(4) - 1.5) / 2)


def test_dampened_meets_at_one():
    below, above = torch.tensor([[1 - 1e-4]], requires_grad=True), torch.tensor([[1 + 1e-4]], requires_grad=True)
    zero = torch.zeros(1, 1)
    values = [DampenedMSE()(x, zero) for x in (below, above)]
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (below, above), strict=True)]
    assert values[0].item() == pytest.approx(0.5, abs=2e-4) and values[1].item() == pytest.approx(0.5, abs=2e-4)
    assert slopes[0].item() == pytest.approx(1, abs=2e-4) and slopes[1].item() == pytest.approx(1, abs=2e-4)


def test_mixture_is_its_parts_and_scale():
    x, z = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    mixed = CosineSmoothL1(cosine_weight=0.3, smooth_l1_weight=2.0, beta=0.7)(x, z)
    torch.testing.assert_close(mixed, 0.3 * Cosine()(x, z) + 2.0 * SmoothL1(beta=0.7)(x, z))
    torch.testing.assert_close(Cosine()(x * 7, z), Cosine()(x, z))  # no magnitude in the cosine
    assert not torch.allclose(CosineSmoothL1()(x * 7, z), CosineSmoothL1()(x, z))


def test_flattened_differs_from_per_token_only_in_the_cosine():
    """Per token, all tokens weigh the same; flattened, long ones do. With tokens of equal length both agree."""
    x, z = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    per_token, flat = (L(smooth_l1_weight=0.0) for L in (CosineSmoothL1, FlattenedCosineSmoothL1))
    assert not torch.allclose(per_token(x, z), flat(x, z))
    x, z = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(z, dim=1)
    torch.testing.assert_close(per_token(x, z), flat(x, z))


def test_weight_zero_is_not_executed():
    """A term of weight 0 may overflow without harm, because it isn't there."""
    x, z = torch.full((1, 2), 1e38), torch.full((1, 2), -1e38)
    assert CosineSmoothL1(cosine_weight=0.0, smooth_l1_weight=0.0)(x, z).tolist() == [0.0]
