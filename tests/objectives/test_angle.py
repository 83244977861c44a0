"""AngleBalanced: the angle itself, equal footing of narrow and wide teachers, running dispersion, gradients, state."""

import math

import pytest
import torch

from agglom.objectives import AngleBalanced
from agglom.objectives.angle import angle, squared_angle


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cone(width, n=4000, d=16):
    """Targets around one direction; `width` is the noise beside it."""
    return torch.eye(d)[0] * 3 + width * torch.randn(n, d)


def fitted(target, **options):
    loss = AngleBalanced(**options)
    loss.update(target)
    return loss


def test_hand_computed_angles():
    x = torch.tensor([[1.0, 0], [1, 0], [2, 0], [0, 1e-3], [1, 0]])
    z = torch.tensor([[5.0, 0], [0, 3], [1, 1], [0, -1], [math.cos(1e-4), math.sin(1e-4)]])
    want = torch.tensor([0, math.pi / 2, math.pi / 4, math.pi, 1e-4])
    torch.testing.assert_close(angle(x, z), want, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(squared_angle(x, z), want**2, rtol=2e-3, atol=1e-7)


def test_agrees_with_arccos_where_that_is_exact():
    x, z = torch.randn(50, 8).double(), torch.randn(50, 8).double()
    torch.testing.assert_close(angle(x, z), torch.arccos(torch.nn.functional.cosine_similarity(x, z)))


@pytest.mark.parametrize("width", [0.1, 1.0, 5.0])
def test_the_mean_direction_scores_one(width):
    """Whatever the width of a teacher's cone; plain cosine would weigh these teachers very differently."""
    target = cone(width)
    loss = fitted(target)
    mean = target.mean(0).expand_as(target)
    assert loss(mean, target).mean().item() == pytest.approx(1, rel=1e-4)
    assert loss.dispersion.item() == pytest.approx(squared_angle(mean, target).mean().item(), rel=1e-4)


def test_streaming_comes_near_the_batch():
    """Early batches are measured about an early mean, so equality holds in the limit."""
    target = cone(1.0)
    streamed = AngleBalanced()
    for part in target.split(100):
        streamed.update(part)
    assert streamed.count == 4000
    torch.testing.assert_close(streamed.total, target.double().sum(0), rtol=1e-5, atol=1e-3)
    assert streamed.dispersion.item() == pytest.approx(fitted(target).dispersion.item(), rel=0.01)


def test_before_any_update_the_dispersion_is_one():
    x, z = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(AngleBalanced()(x, z), squared_angle(x, z))


def test_updates_in_training_only_and_until_frozen():
    loss = AngleBalanced(freeze_after=150)
    loss.eval().update(cone(1.0, 100))
    assert loss.count == 0
    loss.train()
    for _ in range(2):
        loss.update(cone(1.0, 100))
    frozen = loss.dispersion.clone()
    loss.update(cone(5.0, 100))
    assert loss.count == 200 and torch.equal(loss.dispersion, frozen)


def test_forward_is_pure():
    loss = fitted(cone(1.0))
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss(torch.randn(4, 16), torch.randn(4, 16))
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_state_dict_into_a_new_one():
    loss, new = fitted(cone(1.0)), AngleBalanced()
    new.load_state_dict(loss.state_dict())
    more = cone(2.0)
    loss.update(more)
    new.update(more)
    assert torch.equal(loss.dispersion, new.dispersion) and new.taken == 2
    assert loss.bfloat16().total.dtype == torch.float64


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3, 2)])
class TestContract:
    def test_zero_with_zero_gradient_when_equal(self, shape):
        z = torch.randn(shape)
        x = z.clone().requires_grad_()
        out = fitted(z)(x, z)
        out.sum().backward()
        assert out.shape == (5,) and out.abs().max() == 0 and x.grad.abs().max() == 0

    @pytest.mark.parametrize("sign", [-1, 0])
    def test_finite_at_the_antipode_and_at_zero(self, shape, sign):
        z = torch.randn(shape)
        x = (sign * z).requires_grad_()
        out = AngleBalanced()(x, z)
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()

    def test_finite_in_bf16(self, shape):
        for scale in (1e2, 0.0):
            x = (torch.randn(shape) * scale).bfloat16().requires_grad_()
            z = (torch.randn(shape) * scale).bfloat16()
            out = fitted(z)(x, z)
            out.sum().backward()
            assert out.dtype == torch.float32 and out.isfinite().all() and x.grad.isfinite().all()

    def test_gradient_is_right_and_survives_near_equality(self, shape):
        x, z = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: fitted(z)(x, z), x)
        # one part in 10^4 off: arccos clamped at 1 - 1e-6 has no gradient here
        near = (z * (1 + 1e-4 * torch.randn_like(z))).float().requires_grad_()
        AngleBalanced()(near, z.float()).sum().backward()
        assert near.grad.abs().sum() > 0

    def test_magnitude_does_not_matter_and_target_gets_no_gradient(self, shape):
        x, z = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        torch.testing.assert_close(squared_angle(7 * x, 0.1 * z), squared_angle(x, z))
        squared_angle(x, z).sum().backward()
        assert z.grad is None


def test_masked_tokens_are_left_out():
    z = torch.randn(4, 8, 3, 3)
    mask = torch.rand(4, 3, 3) > 0.4
    mask[0] = False
    dirty = z.masked_fill(~mask[:, None], float("nan"))
    masked, plain = AngleBalanced(), fitted(z.movedim(1, -1)[mask])
    masked.update(dirty, mask)
    torch.testing.assert_close(masked.dispersion, plain.dispersion)
    out = masked(torch.randn(4, 8, 3, 3), dirty, mask)
    assert out[0] == 0 and out.isfinite().all()


def test_update_under_inference_mode_then_outside():
    loss = AngleBalanced()
    with torch.inference_mode():
        loss.update(cone(1.0))
    loss.update(cone(1.0))
    loss(torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)).sum().backward()
