"""Balances: what each weighs, the statistics of dropping, resume, and that invalid pairs never count."""

import pytest
import torch

from agglom.balance import AdaLoss, Equal, Manual, RandomK, TeacherDropping, Uncertainty
from agglom.errors import UserError

T, B = 4, 20000


def all_valid(t=T, b=B):
    return torch.ones(t, b, dtype=torch.bool)


@pytest.fixture
def losses():
    return torch.rand(T, B, generator=torch.Generator().manual_seed(1))


def test_equal_shares_an_image_among_its_valid_teachers():
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    weights = Equal()(torch.rand(3, 3), valid)
    assert weights.tolist() == [
        [pytest.approx(1 / 3), 0.5, 0],
        [pytest.approx(1 / 3), 0, 0],
        [pytest.approx(1 / 3), 0.5, 0],
    ]


class TestTeacherDropping:
    @pytest.mark.parametrize("p", [0.5, 0.8])
    def test_statistics(self, losses, p):
        """The worst is always kept; each other with probability 1 - p, independently of the rest."""
        weights = TeacherDropping(p=p)(losses, all_valid())
        kept, worst = weights > 0, losses.argmax(0)
        assert kept.gather(0, worst[None]).all()
        others = ~torch.nn.functional.one_hot(worst, T).T.bool()
        share = kept[others].float().mean().item()
        sigma = (p * (1 - p) / others.sum().item()) ** 0.5
        assert abs(share - (1 - p)) < 4 * sigma
        counts = kept.sum(0) - 1  # binomial if independent
        assert counts.float().var().item() == pytest.approx((T - 1) * p * (1 - p), rel=0.05)

    def test_per_image_gives_every_image_weight_one(self, losses):
        weights = TeacherDropping()(losses, all_valid())
        torch.testing.assert_close(weights.sum(0), torch.ones(B))

    def test_per_pair_is_the_mean_over_kept_pairs(self, losses):
        weights = TeacherDropping(normalization="per_pair")(losses, all_valid())
        kept = weights > 0
        assert len(weights[kept].unique()) == 1
        total = (weights * losses).sum(0).mean()
        torch.testing.assert_close(total, (kept * losses).sum() / kept.sum())

    def test_both_normalizations_keep_the_same_pairs(self, losses):
        a, b = (TeacherDropping(normalization=n)(losses, all_valid()) for n in ("per_image", "per_pair"))
        assert torch.equal(a > 0, b > 0)
        assert not torch.allclose(a, b)

    @pytest.mark.parametrize("normalization", ["per_image", "per_pair"])
    def test_invalid_pairs_never_count(self, losses, normalization):
        valid = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) > 0.5
        losses = losses.masked_fill(~valid, 1e6)  # the worst by far, were it looked at
        weights = TeacherDropping(normalization=normalization)(losses, valid)
        assert (weights[~valid] == 0).all() and weights.isfinite().all()
        worst = losses.masked_fill(~valid, -1).argmax(0, keepdim=True)
        some = valid.any(0)
        assert not some.all() and (weights.gather(0, worst)[0][some] > 0).all()
        assert (weights[:, ~some] == 0).all()

    def test_nothing_valid_at_all(self):
        for normalization in ("per_image", "per_pair"):
            weights = TeacherDropping(normalization=normalization)(torch.rand(2, 3), ~all_valid(2, 3))
            assert (weights == 0).all()

    def test_off_in_eval(self, losses):
        balance = TeacherDropping().eval()
        torch.testing.assert_close(balance(losses, all_valid()), torch.full((T, B), 1 / T))
        assert balance.kept_share().tolist() == [1] * T

    def test_p_zero_is_equal_and_p_one_keeps_only_the_worst(self, losses):
        torch.testing.assert_close(TeacherDropping(p=0.0)(losses, all_valid()), Equal()(losses, all_valid()))
        assert torch.equal(TeacherDropping(p=1.0)(losses, all_valid()).argmax(0), losses.argmax(0))

    def test_resume_repeats_the_draws(self, losses):
        first = TeacherDropping(seed=3)
        first(losses, all_valid())
        state = first.state_dict()
        want = [first(losses, all_valid()) for _ in range(3)]
        second = TeacherDropping(seed=3)
        second.load_state_dict(state)
        assert all(torch.equal(second(losses, all_valid()), w) for w in want)
        assert not torch.equal(want[0], want[1])

    def test_seeds_differ_and_the_global_generator_is_left_alone(self, losses):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        a, b = (TeacherDropping(seed=s)(losses, all_valid()) for s in (0, 1))
        assert not torch.equal(a > 0, b > 0) and torch.equal(torch.get_rng_state(), before)

    def test_own_data_keeps_the_owner_alone(self, losses):
        own = torch.zeros(T, B, dtype=torch.bool)
        own[2, : B // 2] = True
        weights = TeacherDropping(own_data=True)(losses, all_valid(), own)
        assert (weights[:, : B // 2] == torch.tensor([0.0, 0, 1, 0])[:, None]).all()
        assert weights[:, B // 2 :].gt(0).sum(0).float().mean() == pytest.approx(1 + (T - 1) / 2, rel=0.03)
        with pytest.raises(ValueError, match="own"):
            TeacherDropping(own_data=True)(losses, all_valid())

    def test_bad_options(self):
        with pytest.raises(UserError, match="0 to 1"):
            TeacherDropping(p=1.5)
        with pytest.raises(UserError, match="per_image"):
            TeacherDropping(normalization="unic")


def test_diagnostics(losses):
    balance = TeacherDropping()
    with pytest.raises(RuntimeError, match="call the balance"):
        balance.kept_share()
    weights = balance(losses, all_valid())
    torch.testing.assert_close(balance.kept_share(), (weights > 0).float().mean(1))
    torch.testing.assert_close(balance.mean_weight(), weights.mean(1))
    assert balance.penalty() == 0


def test_weights_have_no_gradient_and_losses_keep_theirs():
    losses = torch.rand(2, 3, requires_grad=True)
    weights = TeacherDropping()(losses, all_valid(2, 3))
    assert not weights.requires_grad
    (weights * losses).sum(0).mean().backward()
    torch.testing.assert_close(losses.grad, weights / 3)


class TestManual:
    def test_as_given_or_normalised(self):
        valid = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
        assert Manual(weights=[1, 3])(torch.rand(2, 3), valid).tolist() == [[1, 1, 0], [3, 0, 0]]
        assert Manual(weights=[1, 3], normalize=True)(torch.rand(2, 3), valid).tolist() == [[0.25, 1, 0], [0.75, 0, 0]]

    def test_bad_options(self):
        for weights in ([], [1, -1]):
            with pytest.raises(UserError, match="weights"):
                Manual(weights=weights)
        with pytest.raises(UserError, match="2 teachers, this run has 3"):
            Manual(weights=[1, 1])(torch.rand(3, 2), all_valid(3, 2))


class TestAdaLoss:
    def test_every_teacher_contributes_the_same(self):
        """Losses of 100 and 0.01 both come out as half of 1, from the first step on."""
        balance, scale = AdaLoss(), torch.tensor([[100.0], [0.01]])
        for step in range(20):
            losses = scale * (0.9 + 0.2 * torch.rand(2, 500, generator=torch.Generator().manual_seed(step)))
            share = (balance(losses, all_valid(2, 500)) * losses).mean(1)
            torch.testing.assert_close(share, torch.full((2,), 0.5), rtol=0.02, atol=0)

    def test_average_step_by_step(self):
        """Plain at first, exponential later; a step without a valid image of a teacher leaves its average alone."""
        balance, average, seen = AdaLoss(decay=0.5), torch.zeros(2), [0, 0]
        for step in range(6):
            losses, valid = torch.rand(2, 4) + 1, all_valid(2, 4)
            valid[1] = step % 2 == 0
            weights = balance(losses.masked_fill(~valid, 99), valid)
            for t in range(2):
                if valid[t].any():
                    seen[t] += 1
                    m = max(0.5, 1 / seen[t])
                    average[t] = (1 - m) * average[t] + m * losses[t].mean()
            torch.testing.assert_close(balance.average.float(), average)
            torch.testing.assert_close(weights, valid / valid.sum(0) / average.clamp(min=1e-8)[:, None])

    def test_eval_does_not_move_and_state_resumes(self):
        a, b = AdaLoss(), AdaLoss()
        a(torch.rand(2, 4), all_valid(2, 4))
        b.load_state_dict(a.state_dict())
        losses = torch.rand(2, 4)
        before = a.average.clone()
        assert torch.equal(a.eval()(losses, all_valid(2, 4)), b.eval()(losses, all_valid(2, 4)))
        assert torch.equal(a.average, before)

    def test_zero_loss_is_finite_and_unseen_teacher_has_weight_one(self):
        assert AdaLoss()(torch.zeros(2, 3), all_valid(2, 3)).isfinite().all()
        assert AdaLoss().eval()(torch.rand(2, 3), all_valid(2, 3)).unique().tolist() == [0.5]
        with pytest.raises(UserError, match="decay"):
            AdaLoss(decay=1.0)


class TestUncertainty:
    def test_total_and_gradients_are_those_of_the_formula(self):
        """sum of exp(-2s) L / 2 + s, differentiated as a whole, for the losses and for s."""
        torch.manual_seed(0)
        balance = Uncertainty(teachers=3)
        with torch.no_grad():
            balance.log_sigma.copy_(torch.tensor([0.3, -0.5, 1.0]))
        losses = torch.rand(3, 5, requires_grad=True)
        total = (balance(losses, all_valid(3, 5)) * losses).sum(0).mean() + balance.penalty()
        got = torch.autograd.grad(total, [losses, balance.log_sigma])
        s = balance.log_sigma.detach().clone().requires_grad_()
        formula = (0.5 * torch.exp(-2 * s) * losses.mean(1) + s).sum()
        torch.testing.assert_close(total, formula)
        for a, b in zip(got, torch.autograd.grad(formula, [losses, s]), strict=True):
            torch.testing.assert_close(a, b)

    def test_learns_the_scale(self):
        """At the optimum exp(2s) = L."""
        balance, losses = Uncertainty(teachers=2), torch.tensor([[4.0], [0.25]])
        optimizer = torch.optim.SGD(balance.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            balance(losses, all_valid(2, 1))
            balance.penalty().backward()
            optimizer.step()
        torch.testing.assert_close(torch.exp(2 * balance.log_sigma.detach()), losses[:, 0], rtol=1e-3, atol=0)

    def test_absent_teacher_does_not_learn(self):
        balance, valid = Uncertainty(teachers=2), all_valid(2, 4)
        valid[1] = False
        balance(torch.rand(2, 4), valid)
        balance.penalty().backward()
        assert balance.log_sigma.grad[1] == 0 and balance.log_sigma.grad[0] != 0

    def test_bad_use(self):
        with pytest.raises(UserError, match="teachers 0"):
            Uncertainty(teachers=0)
        with pytest.raises(UserError, match="3 teachers, this run has 2"):
            Uncertainty(teachers=3)(torch.rand(2, 4), all_valid(2, 4))
        with pytest.raises(RuntimeError, match="call the balance"):
            Uncertainty(teachers=3).penalty()


class TestRandomK:
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_statistics_per_image(self, losses, k):
        kept = RandomK(k=k, per="image")(losses, all_valid()) > 0
        assert (kept.sum(0) == k).all()
        torch.testing.assert_close(kept.float().mean(1), torch.full((T,), k / T), atol=0.02, rtol=0)

    def test_statistics_per_batch(self):
        balance, total, n = RandomK(k=2), torch.zeros(T), 600
        for _ in range(n):
            kept = balance(torch.rand(T, 3), all_valid(T, 3)) > 0
            assert (kept == kept[:, :1]).all() and (kept.sum(0) == 2).all()
            total += kept[:, 0]
        torch.testing.assert_close(total / n, torch.full((T,), 0.5), atol=0.09, rtol=0)

    @pytest.mark.parametrize("per", ["batch", "image"])
    def test_valid_only_and_as_many_as_there_are(self, losses, per):
        valid = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) > 0.5
        weights = RandomK(k=2, per=per)(losses, valid)
        kept = weights > 0
        assert not (kept & ~valid).any()
        assert torch.equal(kept.sum(0), valid.sum(0).clamp(max=2))
        torch.testing.assert_close(weights.sum(0), valid.any(0).float())

    def test_all_in_eval_or_with_a_large_k(self, losses):
        for balance in (RandomK(k=1).eval(), RandomK(k=T), RandomK(k=99)):
            torch.testing.assert_close(balance(losses, all_valid()), torch.full((T, B), 1 / T))

    def test_bad_options(self):
        for options in ({"k": 0}, {"k": 1, "per": "epoch"}):
            with pytest.raises(UserError, match="valid"):
                RandomK(**options)


@pytest.mark.parametrize(
    "balance",
    [
        Equal(),
        Manual(weights=[1, 2, 3], normalize=True),
        TeacherDropping(),
        TeacherDropping(normalization="per_pair", own_data=True),
        AdaLoss(),
        Uncertainty(teachers=3),
        RandomK(k=2),
        RandomK(k=2, per="image"),
    ],
    ids=lambda b: type(b).__name__,
)
def test_the_host_never_waits(balance):
    """A tensor on the meta device has no value: anything that would ask the device for one raises here."""
    balance.to("meta")
    losses, valid = torch.empty(3, 5, device="meta"), torch.empty(3, 5, dtype=torch.bool, device="meta")
    for _ in range(2):
        assert balance(losses, valid, valid).shape == (3, 5)
        balance.penalty()
        assert balance.kept_share().shape == balance.mean_weight().shape == (3,)
