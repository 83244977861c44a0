"""RKD, ARKD and Gram against loops over pairs; their invariances; degenerate batches."""

import pytest
import torch
import torch.nn.functional as F

from agglom.errors import UserError
from agglom.objectives import ARKD, RKD, Gram
from agglom.objectives.relation import pair_distances


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def naive(x, z, *, asymmetric, scale):
    """The definition, pair by pair."""
    b = len(x)
    pairs = [(i, j) for i in range(b) for j in range(b) if i != j]
    student = {p: (x[p[0]] - x[p[1]]).norm() for p in pairs}
    teacher = {p: (z[p[0]] - z[p[1]]).norm() for p in pairs}
    unit_t = sum(teacher.values()) / len(pairs)
    unit_s = sum(student.values()) / len(pairs) if scale == "own" else unit_t
    median = torch.stack(list(teacher.values())).median()
    out = torch.zeros(b)
    for p in pairs:
        d = student[p] / unit_s - teacher[p] / unit_t
        if asymmetric:
            d = (-d if teacher[p] >= median else d).clamp(min=0)
        out[p[0]] += F.smooth_l1_loss(d, torch.zeros(())) / (b - 1)
    return out


@pytest.mark.parametrize("scale", ["own", "teacher"])
@pytest.mark.parametrize("cls", [RKD, ARKD])
def test_against_loops(cls, scale):
    x, z = torch.randn(7, 5), torch.randn(7, 9)
    torch.testing.assert_close(cls(scale=scale)(x, z), naive(x, z, asymmetric=cls is ARKD, scale=scale))


def test_hand_computed():
    """Three points on a line at 0, 1, 3; the student says 0, 2, 3. Distances 1, 3, 2 and 2, 3, 1, both of mean 2."""
    z, x = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.0], [2], [3]])
    # differences / 2: pair 01 +0.5, 02 0, 12 -0.5; smooth-L1 of 0.5 is 0.125
    assert RKD()(x, z).tolist() == pytest.approx([0.0625, 0.125, 0.0625])
    # teacher's median is 2: pair 01 is close and too far apart, 12 is far and too close: both are harmful
    assert ARKD()(x, z).tolist() == pytest.approx([0.0625, 0.125, 0.0625])
    # close pairs closer and far pairs farther do no harm
    assert ARKD()(torch.tensor([[0.0], [0.5], [9]]), z).tolist() == [0, 0, 0]
    assert (RKD()(torch.tensor([[0.0], [0.5], [9]]), z) > 0).all()


def test_pair_distances_leave_out_the_diagonal():
    x = torch.randn(5, 3)
    full = torch.cdist(x, x)
    off = full[~torch.eye(5, dtype=torch.bool)].view(5, 4)
    torch.testing.assert_close(pair_distances(x), off)


@pytest.mark.parametrize("loss", [RKD(), ARKD(), RKD(scale="teacher")], ids=["rkd", "arkd", "rkd_teacher"])
class TestRelational:
    def test_zero_when_equal_up_to_a_motion(self, loss):
        """Rotating and shifting all summaries changes no distance; RKD with its own scale also forgives a factor."""
        z = torch.randn(8, 6)
        x = (z @ torch.linalg.qr(torch.randn(6, 6))[0] + 4).requires_grad_()
        out = loss(x, z)
        out.sum().backward()
        assert out.abs().max() < 1e-9 and x.grad.abs().max() < 1e-4
        scaled = loss(3 * z, z)
        assert scaled.abs().max() < 1e-9 if loss.scale == "own" else scaled.abs().max() > 0.1

    def test_permutation(self, loss):
        x, z, order = torch.randn(8, 6), torch.randn(8, 6), torch.randperm(8)
        torch.testing.assert_close(loss(x[order], z[order]), loss(x, z)[order])

    def test_one_image_and_equal_images(self, loss):
        x = torch.randn(1, 6, requires_grad=True)
        out = loss(x, torch.randn(1, 4))
        out.sum().backward()
        assert out.tolist() == [0] and x.grad.abs().max() == 0
        same = torch.ones(5, 6, requires_grad=True)
        for z in (torch.ones(5, 4), torch.randn(5, 4)):
            out = loss(same, z)
            out.sum().backward()
            assert out.isfinite().all() and same.grad.isfinite().all()

    def test_bf16_gradient_and_target(self, loss):
        x, z = (100 * torch.randn(6, 8)).bfloat16().requires_grad_(), (100 * torch.randn(6, 8)).bfloat16()
        z.requires_grad_()
        out = loss(x, z)
        out.sum().backward()
        assert out.dtype == torch.float32 and x.grad.isfinite().all() and z.grad is None
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(x, z), out)
        x, z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: loss(x, z), x)

    def test_bad_input(self, loss):
        with pytest.raises(ValueError, match="summaries"):
            loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
        with pytest.raises(ValueError, match="mask"):
            loss(torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, dtype=torch.bool))
        with pytest.raises(UserError, match="'own', 'teacher'"):
            type(loss)(scale="none")


@pytest.mark.parametrize("clip", [False, True])
class TestGram:
    def test_against_loops(self, clip):
        x, z = torch.randn(2, 5, 2, 3), torch.randn(2, 7, 2, 3)
        want = torch.zeros(2)
        for b in range(2):
            s, t = x[b].flatten(1).T, z[b].flatten(1).T
            for i in range(6):
                for j in range(6):
                    pair = [F.cosine_similarity(f[i], f[j], dim=0) for f in (s, t)]
                    pair = [c.clamp(min=0) for c in pair] if clip else pair
                    want[b] += (pair[0] - pair[1]) ** 2 / 36
        torch.testing.assert_close(Gram(clip_negative=clip)(x, z), want)

    def test_rotating_channels_and_scaling_tokens_do_not_matter(self, clip):
        x, z = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
        turned = torch.einsum("dc,bchw->bdhw", torch.linalg.qr(torch.randn(5, 5))[0], x) * torch.rand(2, 1, 3, 3).add(1)
        loss = Gram(clip_negative=clip)
        torch.testing.assert_close(loss(turned, z), loss(x, z))
        assert loss(turned, x).abs().max() < 1e-9

    def test_mask_and_degenerate(self, clip):
        x, z = torch.randn(3, 5, 2, 4, requires_grad=True), torch.randn(3, 5, 2, 4)
        mask = torch.ones(3, 2, 4, dtype=torch.bool)
        mask[..., 2:] = False
        mask[0] = False
        dirty = z.masked_fill(~mask[:, None], float("nan"))
        out = Gram(clip_negative=clip)(x, dirty, mask)
        out.sum().backward()
        assert out[0] == 0 and x.grad.isfinite().all()
        torch.testing.assert_close(out[1:], Gram(clip_negative=clip)(x[1:, ..., :2], z[1:, ..., :2]))
        zero = torch.zeros(1, 5, 2, 2, requires_grad=True)
        Gram(clip_negative=clip)(zero, torch.zeros(1, 5, 2, 2)).sum().backward()
        assert zero.grad.isfinite().all()

    def test_bf16_gradient_and_target(self, clip):
        loss = Gram(clip_negative=clip)
        x, z = (100 * torch.randn(2, 8, 3, 3)).bfloat16().requires_grad_(), torch.randn(2, 8, 3, 3, requires_grad=True)
        out = loss(x, z)
        out.sum().backward()
        assert out.dtype == torch.float32 and x.grad.isfinite().all() and z.grad is None
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(x, z), out)

    def test_bad_input(self, clip):
        with pytest.raises(ValueError, match="one grid"):
            Gram(clip_negative=clip)(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5))
