"""Balances: what each weighs, the statistics of dropping, resume, and that invalid pairs never count."""

import pytest
import torch

from agglom.balance import Equal, TeacherDropping
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
