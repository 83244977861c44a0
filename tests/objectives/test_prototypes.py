"""EMA self-distillation: head, Sinkhorn, centre, the losses over views and masked patches, the collapse monitors.

Sinkhorn and the losses are compared with their definitions, written out as loops. What sums over ranks is compared
between one process and two with unequal parts; for that this file runs itself as the two processes.
"""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from agglom.errors import UserError
from agglom.objectives import Center, PrototypeHead
from agglom.objectives.prototypes import (
    cross_entropy,
    cross_view,
    entropy_of_mean,
    masked,
    mean_entropy,
    sinkhorn,
)

ROWS, K = 24, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def probabilities(*shape):
    return torch.randn(shape).mul(2).softmax(-1)


def small(**options):
    return PrototypeHead(8, **{"prototypes": 10, "hidden": 16, "bottleneck": 4} | options)


def naive_sinkhorn(logits, temperature, iterations):
    """In exponentials and float64, with every mass written out."""
    q = ((logits.double() - logits.double().max()) / temperature).exp()
    m, k = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for j in range(k):
            q[:, j] = q[:, j] / q[:, j].sum() / k
        for i in range(m):
            q[i] = q[i] / q[i].sum() / m
    return q * m


class TestHead:
    def test_shapes_and_cosines(self):
        head = small()
        x = torch.randn(2, 3, 8)
        out = head(x)
        z = head.mlp(x)
        want = torch.stack([torch.cosine_similarity(z, row, dim=-1) for row in head.directions], -1)
        assert out.shape == (2, 3, 10) and out.dtype == torch.float32
        torch.testing.assert_close(out, want)
        assert sum(isinstance(m, torch.nn.Linear) for m in head.mlp) == 3
        with torch.device("meta"):
            full = PrototypeHead(384)
        assert full.mlp[2].weight.shape == (2048, 2048) and full.weight.shape == (65536, 256)

    def test_rows_keep_norm_one_under_an_optimizer(self):
        head = small()
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        before = head.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(head(torch.randn(5, 8)), probabilities(5, 10), temperature=0.1).sum().backward()
            optimizer.step()
            torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(10))
        assert (head.weight - before).abs().max() > 1e-2 and (head.directions.norm(dim=1) - 1).abs().min() > 1e-3

    def test_the_length_of_the_bottleneck_does_not_matter(self):
        head, x = small(), torch.randn(5, 8)
        before = head(x)
        with torch.no_grad():
            head.mlp[-1].weight.mul_(7)
            head.mlp[-1].bias.mul_(7)
            head.directions.mul_(0.2)
        torch.testing.assert_close(head(x), before)

    def test_copies_are_independent_and_can_be_averaged(self):
        head, x = small(), torch.randn(5, 8)
        head(x).sum().backward()  # after a backward pass too: nothing of the graph hangs on the module
        teacher = copy.deepcopy(head)
        kept = teacher(x)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(torch.randn_like(p))
        assert torch.equal(teacher(x), kept) and not torch.equal(head(x), kept)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), head.parameters(), strict=True):
                mine.lerp_(theirs, 1.0)
        assert torch.equal(teacher(x), head(x))
        assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}

    def test_start(self):
        head = PrototypeHead(64, prototypes=500, hidden=64, bottleneck=64)
        for weight in (head.mlp[0].weight, head.mlp[2].weight, head.mlp[4].weight, head.directions):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert all(head.mlp[i].bias.abs().max() == 0 for i in (0, 2, 4))

    def test_last_layer_is_fp32_under_autocast_and_in_bf16(self):
        head, x = small(), torch.randn(5, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out, z = head(x), head.mlp(x)
        assert out.dtype == torch.float32
        want = torch.nn.functional.normalize(z.float(), dim=-1) @ head.weight.T
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        assert head.bfloat16()(x.bfloat16()).dtype == torch.float32

    def test_bad_size(self):
        with pytest.raises(UserError, match="prototypes 0, hidden -1"):
            small(prototypes=0, hidden=-1)


class TestSinkhorn:
    @pytest.mark.parametrize("iterations", [1, 2, 3, 10])
    @pytest.mark.parametrize("temperature", [0.04, 0.5])
    def test_against_the_definition(self, iterations, temperature):
        logits = torch.rand(ROWS, K)
        got = sinkhorn(logits, temperature=temperature, iterations=iterations)
        want = naive_sinkhorn(logits, temperature, iterations)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6)
        wide = sinkhorn(logits.double(), temperature=temperature, iterations=iterations)
        torch.testing.assert_close(wide, want, rtol=1e-11, atol=1e-15)

    @pytest.mark.parametrize("size", [1, 1e2, 1e4])
    @pytest.mark.parametrize("iterations", [1, 3])
    def test_samples_sum_to_one(self, size, iterations):
        q = sinkhorn(size * torch.randn(50, 7), temperature=0.04, iterations=iterations)
        assert q.dtype == torch.float32 and (q >= 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones(50), rtol=0, atol=3e-7)

    def test_prototypes_get_equal_shares(self):
        # all samples prefer prototype 0 at first
        logits = torch.randn(64, 16) * 0.1 + torch.eye(16)[0]
        assert (logits / 0.1).softmax(1).sum(0)[0] > 60
        torch.testing.assert_close(sinkhorn(logits, temperature=0.1).sum(0), torch.full((16,), 4.0), rtol=0.05, atol=0)
        limit = sinkhorn(logits, temperature=0.1, iterations=50)
        torch.testing.assert_close(limit.sum(0), torch.full((16,), 4.0), rtol=1e-5, atol=0)

    def test_logits_beyond_the_range_of_exp(self):
        """Two samples with equal differences share all prototypes, though 10^4 / 0.04 lies between them."""
        logits = torch.tensor([[1e4, 0], [0, -1e4]])
        assert naive_sinkhorn(logits, 0.04, 3).isnan().any()
        assert torch.equal(sinkhorn(logits, temperature=0.04), torch.full((2, 2), 0.5))
        # sample 0 leads at both prototypes; sample 1, left with the second, crowds it out there: 1/2, 1/4, 1/6
        logits = torch.tensor([[1e4, 0], [-1e4, -1e4]])
        for n, share in enumerate((1 / 2, 1 / 4, 1 / 6), 1):
            got = sinkhorn(logits, temperature=0.04, iterations=n)
            torch.testing.assert_close(got, torch.tensor([[1 - share, share], [0, 1]]))

    def test_a_prototypes_offset_does_not_matter(self):
        logits = torch.randint(-64, 64, (ROWS, K)) / 64
        moved = logits + torch.tensor([0, 1024, -4096, 8192, 3, -1])  # exact in float32
        torch.testing.assert_close(sinkhorn(moved, temperature=0.125), sinkhorn(logits, temperature=0.125))

    def test_equal_logits_and_bf16(self):
        for value in (0.0, 100.0):
            q = sinkhorn(torch.full((8, 4), value).bfloat16(), temperature=0.04)
            assert q.dtype == torch.float32 and torch.equal(q, torch.full((8, 4), 0.25))

    def test_the_mask_leaves_rows_out(self):
        logits, mask = torch.randn(ROWS, K), torch.rand(ROWS) > 0.4
        for filling in (float("nan"), 1e4, float("inf")):
            q = sinkhorn(logits.masked_fill(~mask[:, None], filling), temperature=0.1, mask=mask)
            torch.testing.assert_close(q[mask], sinkhorn(logits[mask], temperature=0.1))
            assert (q[~mask] == 0).all()
        assert not torch.allclose(q[mask], sinkhorn(logits, temperature=0.1)[mask], atol=1e-3)
        assert (sinkhorn(logits, temperature=0.1, mask=torch.zeros(ROWS).bool()) == 0).all()
        assert sinkhorn(logits[:0], temperature=0.1).shape == (0, K)

    def test_arguments_are_left_alone_and_get_no_gradient(self):
        logits, mask = torch.randn(ROWS, K, requires_grad=True), torch.rand(ROWS) > 0.4
        kept = logits.detach().clone(), mask.clone()
        for given in (None, mask):
            assert not sinkhorn(logits, temperature=0.1, mask=given).requires_grad
        assert torch.equal(logits, kept[0]) and torch.equal(mask, kept[1])

    def test_bad_input(self):
        for options, match in (
            ({"temperature": 0}, "temperature 0"),
            ({"iterations": 0}, "iterations"),
            ({"mask": torch.ones(3)}, "bool"),
            ({"mask": torch.ones(3).bool()}, "does not fit"),
        ):
            with pytest.raises(ValueError, match=match):
                sinkhorn(torch.randn(4, 5), **{"temperature": 0.1} | options)
        with pytest.raises(ValueError, match=r"\(M, K\)"):
            sinkhorn(torch.randn(2, 4, 5), temperature=0.1)


class TestCenter:
    def test_rate(self):
        center, constant = Center(K), torch.randn(K)
        for n in range(1, 30):
            center.update(constant.expand(2, 3, K))
            torch.testing.assert_close(constant - center.center, 0.9**n * constant.double(), rtol=1e-5, atol=1e-12)
        assert center.taken == 29

    def test_centre_from_before_the_step_then_uniform(self):
        center, logits = Center(K, momentum=0), torch.randn(3, K)
        torch.testing.assert_close(center.assign(logits, 0.1), (logits / 0.1).softmax(-1))
        center.update(logits)
        torch.testing.assert_close(center.assign(logits, 0.1), ((logits - logits.mean(0)) / 0.1).softmax(-1))
        # a teacher that always says the same says nothing once the centre is there
        center.update(logits[:1])
        torch.testing.assert_close(center.assign(logits[:1], 0.04), torch.full((1, K), 1 / K), rtol=1e-4, atol=0)

    def test_masked_rows_are_left_out(self):
        x, mask = torch.randn(4, 5, K), torch.rand(4, 5) > 0.5
        one, other = Center(K), Center(K)
        one.update(x.masked_fill(~mask[..., None], float("nan")), mask)
        other.update(x[mask])
        torch.testing.assert_close(one.center, other.center)
        before = one.center.clone()
        one.update(x, torch.zeros(4, 5).bool())
        assert torch.equal(one.center, before) and one.taken == 2
        with pytest.raises(ValueError, match="does not fit"):
            one.update(x, mask[:2])

    def test_no_gradient(self):
        center, logits = Center(K), torch.randn(3, K, requires_grad=True)
        center.update(logits)
        assert not center.assign(logits, 0.1).requires_grad and not center.center.requires_grad
        assert not list(center.parameters())

    def test_checkpoint_precision_and_reset(self):
        center, new = Center(K), Center(K)
        center.update(torch.randn(3, K).bfloat16())
        assert set(center.state_dict()) == {"center", "steps"}
        new.load_state_dict(center.state_dict())
        more = torch.randn(3, K)
        center.update(more)
        new.update(more)
        assert torch.equal(center.center, new.center) and new.taken == 2
        assert center.bfloat16().center.dtype == torch.float64
        center.reset()
        assert center.taken == 0 and center.center.abs().max() == 0

    def test_finite_for_large_logits(self):
        center = Center(K)
        for x in (1e2 * torch.randn(4, K), 1e4 * torch.randn(4, K), torch.zeros(4, K)):
            p = center.assign(x.bfloat16(), 0.04)
            center.update(x.bfloat16())
            assert p.dtype == torch.float32
            torch.testing.assert_close(p.sum(-1), torch.ones(4))

    def test_bad_input(self):
        with pytest.raises(UserError, match="momentum 1.5"):
            Center(K, momentum=1.5)
        with pytest.raises(ValueError, match="temperature -1"):
            Center(K).assign(torch.randn(2, K), -1)


class TestCrossEntropy:
    def test_hand_computed(self):
        # softmax of (log 1, log 3) is (1/4, 3/4)
        logits = torch.tensor([[0.0, math.log(3) * 0.1]])
        got = cross_entropy(logits, torch.tensor([[0.5, 0.5]]), temperature=0.1)
        assert got.tolist() == pytest.approx([-0.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4)])

    def test_entropy_with_zero_gradient_where_student_equals_teacher(self):
        z = torch.randn(4, 5, K, requires_grad=True)
        p = (z.detach() / 0.1).softmax(-1)
        out = cross_entropy(z, p, temperature=0.1)
        out.sum().backward()
        torch.testing.assert_close(out, -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-6)
        assert out.shape == (4, 5) and z.grad.abs().max() < 1e-4

    def test_uniform_teacher_costs_log_k_at_least(self):
        uniform = torch.full((50, K), 1 / K)
        assert (cross_entropy(torch.randn(50, K), uniform, temperature=0.1) > math.log(K)).all()
        at = cross_entropy(torch.full((50, K), 3.0), uniform, temperature=0.1)
        torch.testing.assert_close(at, torch.full((50,), math.log(K)))

    @pytest.mark.parametrize("scale", [1e2, 0.0])
    def test_finite_in_bf16(self, scale):
        z = (scale * torch.randn(5, K)).bfloat16().requires_grad_()
        p = sinkhorn((scale * torch.randn(5, K)).bfloat16(), temperature=0.04)
        with torch.autocast("cpu", torch.bfloat16):
            out = cross_entropy(z, p, temperature=0.1)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.isfinite().all() and z.grad.isfinite().all()
        assert cross_entropy(z, p.bfloat16(), temperature=0.1).isfinite().all()

    def test_gradient(self):
        p = probabilities(3, K).double().requires_grad_()
        z = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: cross_entropy(z, p, temperature=0.5), z)
        cross_entropy(z, p, temperature=0.5).sum().backward()
        assert p.grad is None

    def test_bad_input(self):
        with pytest.raises(ValueError, match="differ"):
            cross_entropy(torch.randn(3, K), torch.randn(3, 1), temperature=0.1)
        with pytest.raises(ValueError, match="temperature"):
            cross_entropy(torch.randn(3, K), torch.randn(3, K), temperature=0)


class TestCrossView:
    @pytest.mark.parametrize("views, shared", [(2, 2), (10, 2), (3, 1), (4, 3)])
    def test_against_loops_over_pairs(self, views, shared):
        student, teacher = torch.randn(views, 4, K), probabilities(shared, 4, K)
        terms = [
            cross_entropy(student[v], teacher[g], temperature=0.1)
            for g in range(shared)
            for v in range(views)
            if v != g
        ]
        assert len(terms) == shared * (views - 1)
        torch.testing.assert_close(cross_view(student, teacher, temperature=0.1), torch.stack(terms).mean(0))

    def test_a_view_is_not_compared_with_itself(self):
        """Two globals that agree with themselves alone: a loss that paired equal views would be near 0."""
        student = 100 * torch.eye(2)[:, None]
        teacher = torch.eye(2)[:, None]
        assert cross_view(student, teacher, temperature=1).item() == pytest.approx(100)
        assert cross_view(student, teacher.flip(0), temperature=1).item() == pytest.approx(0)

    def test_permutation(self):
        student, teacher, order = torch.randn(5, 7, K), probabilities(2, 7, K), torch.randperm(7)
        torch.testing.assert_close(
            cross_view(student[:, order], teacher[:, order], temperature=0.1),
            cross_view(student, teacher, temperature=0.1)[order],
        )

    @pytest.mark.parametrize("scale", [1e2, 0.0])
    def test_finite_in_bf16_and_no_gradient_into_the_teacher(self, scale):
        student = (scale * torch.randn(4, 3, K)).bfloat16().requires_grad_()
        teacher = probabilities(2, 3, K).requires_grad_()
        out = cross_view(student, teacher, temperature=0.1)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.isfinite().all() and student.grad.isfinite().all()
        assert teacher.grad is None

    def test_teacher_from_inference_mode(self):
        with torch.inference_mode():
            teacher = probabilities(2, 3, K)
        student = torch.randn(4, 3, K, requires_grad=True)
        cross_view(student, teacher, temperature=0.1).sum().backward()
        cross_entropy(student[:2], teacher, temperature=0.1).sum().backward()
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize(
        "student, teacher", [((1, 2, K), (1, 2, K)), ((1, 2, K), (2, 2, K)), ((2, 2, K), (0, 2, K))]
    )
    def test_no_pair(self, student, teacher):
        with pytest.raises(ValueError, match="two at least"):
            cross_view(torch.randn(student), torch.randn(teacher), temperature=0.1)

    def test_bad_input(self):
        for teacher in (torch.randn(2, 1, K), torch.randn(2, 3)):
            with pytest.raises(ValueError, match=r"\(V, B, K\)"):
                cross_view(torch.randn(2, 3, K), teacher, temperature=0.1)


class TestMasked:
    def patches(self):
        """Image 0 has 3 patches, 1 none, 2 one; 3 entries are filling."""
        image, valid = torch.tensor([0, 2, 0, 1, 0, 1, 2]), torch.tensor([1, 1, 1, 0, 1, 0, 0]).bool()
        return torch.randn(7, K, requires_grad=True), probabilities(7, K), image, valid

    def loss(self, student, teacher, image, valid, batch=3):
        return masked(student, teacher, image=image, valid=valid, batch=batch, temperature=0.1)

    def test_against_loops(self):
        student, teacher, image, valid = self.patches()
        got = self.loss(student, teacher, image, valid)
        for b, count in enumerate((3, 0, 1)):
            rows = [i for i in range(7) if image[i] == b and valid[i]]
            assert len(rows) == count
            terms = [cross_entropy(student[i], teacher[i], temperature=0.1) for i in rows]
            torch.testing.assert_close(got[b], sum(terms) / max(count, 1) + torch.zeros(()))

    def test_only_valid_patches_matter(self):
        student, teacher, image, valid = self.patches()
        want = self.loss(student, teacher, image, valid)
        for filling in (7.0, float("nan"), float("inf")):
            outside = ~valid[:, None]
            dirty = student.detach().masked_fill(outside, filling).requires_grad_()
            got = self.loss(dirty, teacher.masked_fill(outside, filling), image.masked_fill(~valid, 99), valid)
            got.sum().backward()
            assert torch.equal(got, want) and dirty.grad.isfinite().all() and (dirty.grad[~valid] == 0).all()
            assert (dirty.grad[valid].abs().sum(1) > 0).all()

    def test_visible_patches_do_not_matter(self):
        """A teacher's full map, of which only the masked patches reach the list."""
        student, teacher, where = torch.randn(2, 9, K), probabilities(2, 9, K), torch.rand(2, 9) > 0.6
        image, patch = where.nonzero(as_tuple=True)
        valid = torch.ones(len(image)).bool()
        want = self.loss(student[image, patch], teacher[image, patch], image, valid, 2)
        student, teacher = student + ~where[..., None], teacher * where[..., None]
        assert torch.equal(self.loss(student[image, patch], teacher[image, patch], image, valid, 2), want)

    def test_nothing_masked(self):
        student, teacher, image, valid = self.patches()
        out = self.loss(student, teacher, image, torch.zeros_like(valid))
        out.sum().backward()
        assert out.tolist() == [0, 0, 0] and (student.grad == 0).all()
        empty = self.loss(student[:0], teacher[:0], image[:0], valid[:0])
        assert empty.tolist() == [0, 0, 0]

    def test_permutation_of_list_and_of_images(self):
        student, teacher, image, valid = self.patches()
        want = self.loss(student, teacher, image, valid)
        order = torch.randperm(7)
        torch.testing.assert_close(self.loss(student[order], teacher[order], image[order], valid[order]), want)
        place = torch.tensor([2, 0, 1])  # image b goes to place[b]
        torch.testing.assert_close(self.loss(student, teacher, place[image], valid)[place], want)

    @pytest.mark.parametrize("scale", [1e2, 0.0])
    def test_finite_in_bf16_and_no_gradient_into_the_teacher(self, scale):
        _, teacher, image, valid = self.patches()
        student = (scale * torch.randn(7, K)).bfloat16().requires_grad_()
        out = self.loss(student, teacher.requires_grad_(), image, valid)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.isfinite().all() and student.grad.isfinite().all()
        assert teacher.grad is None

    def test_bad_input(self):
        student, teacher, image, valid = self.patches()
        with pytest.raises(ValueError, match="int64"):
            self.loss(student, teacher, image.int(), valid)
        with pytest.raises(ValueError, match="bool"):
            self.loss(student, teacher, image, valid.float())
        with pytest.raises(ValueError, match="twice"):
            self.loss(student, teacher[:3], image, valid)


class TestMonitors:
    def test_by_hand(self):
        uniform, collapsed = torch.full((5, K), 1 / K), torch.eye(K)[[2] * 5]
        for monitor in (mean_entropy, entropy_of_mean):
            assert monitor(collapsed).item() == 0
            assert monitor(uniform).item() == pytest.approx(math.log(K))
        # confident and evenly spread: the state to be in
        assert mean_entropy(torch.eye(K)).item() == 0
        assert entropy_of_mean(torch.eye(K)).item() == pytest.approx(math.log(K))
        p = torch.tensor([[0.5, 0.5], [1, 0]])
        assert mean_entropy(p).item() == pytest.approx(math.log(2) / 2)
        assert entropy_of_mean(p).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))

    @pytest.mark.parametrize("monitor", [mean_entropy, entropy_of_mean])
    def test_mask_shape_and_gradient(self, monitor):
        p, mask = probabilities(3, 4, K).requires_grad_(), torch.rand(3, 4) > 0.5
        dirty = p.masked_fill(~mask[..., None], float("nan"))
        out = monitor(dirty, mask)
        assert out.shape == () and out.dtype == torch.float32 and not out.requires_grad
        torch.testing.assert_close(out, monitor(p[mask]))
        assert monitor(p, torch.zeros(3, 4).bool()) == 0
        torch.testing.assert_close(monitor(p[0, 0]), torch.special.entr(p[0, 0]).sum().detach())
        with pytest.raises(ValueError, match="does not fit"):
            monitor(p, mask[0])


def test_no_step_makes_the_host_wait():
    """A tensor on the meta device has no value, so anything that would ask the device for one raises."""
    with torch.device("meta"):
        head, center = small(prototypes=K), Center(K)
        mask, image = torch.ones(7).bool(), torch.zeros(7).long()
        logits = head(torch.randn(7, 8))
        center.update(logits, mask)
        center.assign(logits, 0.04)
        p = sinkhorn(logits, temperature=0.04, mask=mask)
        masked(logits, p, image=image, valid=mask, batch=3, temperature=0.1).sum().backward()
        cross_view(torch.randn(4, 3, K), torch.randn(2, 3, K), temperature=0.1)
        mean_entropy(p, mask), entropy_of_mean(p, mask)


def scenario(rank, world):
    """This rank's part of each batch, and in the last case no row at all on rank 0."""
    center, out = Center(K), {}
    generator = torch.Generator().manual_seed(0)
    for step, (cut, apart) in enumerate([(7, 0.0), (20, 20.0), (0, 0.0)]):
        logits, mask = torch.randn(ROWS, K, generator=generator), torch.rand(ROWS, generator=generator) > 0.3
        # apart: a rank's greatest logit is beyond the range of exp on the other
        logits = logits + apart * torch.arange(ROWS)[:, None]
        part = slice(0, ROWS) if world == 1 else (slice(0, cut), slice(cut, ROWS))[rank]
        logits, mask = logits[part], mask[part]
        out[f"rows.{step}"] = sinkhorn(logits, temperature=0.5)
        out[f"rows.masked.{step}"] = p = sinkhorn(logits, temperature=0.5, mask=mask)
        center.update(logits, mask)
        out[f"center.{step}"] = center.center.clone()
        out[f"entropy.{step}"] = entropy_of_mean(p, mask)
    return out


@pytest.mark.slow
def test_two_ranks_with_unequal_parts_are_one(tmp_path):
    command, env = [sys.executable, __file__, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r)], env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = scenario(0, 1), [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, want in one.items():
        if name.startswith("rows"):
            torch.testing.assert_close(torch.cat([t[name] for t in two]), want, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.equal(two[0][name], two[1][name]), name  # not a bit apart, or the ranks would drift
            torch.testing.assert_close(two[0][name], want, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    folder, me = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(scenario(me, 2), f"{folder}/{me}.pt")
    dist.destroy_process_group()
