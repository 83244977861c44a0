"""PHI-S and whitening: the covariance they promise, streaming = batch, inverse = fold, invariances, schedule, state."""

import pytest
import torch
from torch import nn

from agglom.errors import UserError
from agglom.targets import PHIS, Whiten

WIDTHS = [12, 13]  # with and without a Hadamard matrix


def features(c, n=2000, seed=0):
    """(n, c) float64 with a steep spectrum (standard deviations 10 to 0.1) in a random basis and a mean."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(c, c, generator=torch.Generator().manual_seed(99), dtype=torch.float64))[0]
    scale = torch.logspace(1, -1, c, dtype=torch.float64)
    return torch.randn(n, c, generator=g, dtype=torch.float64) * scale @ basis.T + 3


def fitted(cls, x, **options):
    norm = cls(x.shape[-1], **options)
    norm.update(x)
    norm.refresh()  # as the next training step would
    return norm


MAKERS = [
    pytest.param(PHIS, {}, id="phis"),
    pytest.param(Whiten, {"kind": "pca"}, id="pca"),
    pytest.param(Whiten, {"kind": "zca"}, id="zca"),
]


@pytest.mark.parametrize("c", WIDTHS)
def test_phis_every_channel_has_variance_one(c):
    x = features(c)
    y = fitted(PHIS, x).normalize(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(c).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0), torch.ones(c).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("c", WIDTHS)
def test_phis_keeps_shape_up_to_one_scale(c):
    """Isotropic: all distances shrink by the same phi, the root of the mean variance."""
    x = features(c, n=50)
    y = fitted(PHIS, x).normalize(x)
    phi = (x.var(0).sum() / c).sqrt()
    torch.testing.assert_close(torch.cdist(y, y) * phi, torch.cdist(x, x), rtol=1e-5, atol=1e-5)


def test_phis_scale_and_shift_do_not_matter():
    """The target times a factor gives the same normalised features, up to the eigenvectors' sign and order."""
    x = features(12, n=50)
    a, b = fitted(PHIS, x).normalize(x), fitted(PHIS, 0.01 * x + 5).normalize(0.01 * x + 5)
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("c", WIDTHS)
@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_covariance_is_identity(c, kind):
    x = features(c)
    cov = fitted(Whiten, x, kind=kind, eps=0.0).normalize(x).T.cov()
    torch.testing.assert_close(cov, torch.eye(c).double(), atol=1e-4, rtol=0)


def test_pca_is_ordered_and_zca_is_nearest():
    x = features(12)
    pca, zca = (fitted(Whiten, x, kind=k, eps=0.0) for k in ("pca", "zca"))
    deviation = pca.inverse_map.norm(dim=0)
    assert (deviation.diff() < 0).all()
    torch.testing.assert_close(zca.forward_map, zca.forward_map.T)
    assert (torch.linalg.eigvalsh(zca.forward_map) > 0).all()


def test_whiten_eps_bounds_the_noise():
    """A direction without variance is amplified by at most 1 / sqrt(eps * mean variance)."""
    x = features(12)
    x[:, 0] = 0
    norm = fitted(Whiten, x, eps=0.01)
    assert torch.linalg.matrix_norm(norm.forward_map, 2) <= 1.01 / (0.01 * x.var(0).mean()).sqrt()


@pytest.mark.parametrize("maker, options", MAKERS)
class TestAll:
    @pytest.mark.parametrize("c", WIDTHS)
    @pytest.mark.parametrize("sizes", [(1999, 1), (1, 1999), (500,) * 4, (3, 700, 1297)])
    def test_streaming_is_batch(self, maker, options, c, sizes):
        x = features(c)
        whole, streamed = fitted(maker, x, **options), maker(c, update_every=1, **options)
        for part in x.split(sizes):
            streamed.update(part)
        torch.testing.assert_close(streamed.mean, x.mean(0))
        torch.testing.assert_close(streamed.scatter / (len(x) - 1), x.T.cov())
        torch.testing.assert_close(streamed.normalize(x), whole.normalize(x), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("c", WIDTHS)
    def test_round_trip(self, maker, options, c):
        x = features(c)
        norm = fitted(maker, x, **options)
        for y in (x, x.float().view(20, 10, 10, c)):
            assert (norm.denormalize(norm.normalize(y)) - y).norm() / y.norm() < 1e-5

    @pytest.mark.parametrize("c", WIDTHS)
    def test_fold_is_denormalize(self, maker, options, c):
        torch.manual_seed(0)
        norm = fitted(maker, features(c), **options)
        for bias in (True, False):
            linear, x = nn.Linear(5, c, bias=bias).double(), torch.randn(7, 5).double()
            want = norm.denormalize(linear(x))
            norm.fold_into(linear)
            torch.testing.assert_close(linear(x), want, atol=1e-5, rtol=1e-5)
        conv, shuffle, x = nn.Conv2d(5, c * 4, 1), nn.PixelShuffle(2), torch.randn(2, 5, 3, 3)
        want = norm.denormalize(shuffle(conv(x)).movedim(1, -1)).movedim(-1, 1)
        norm.fold_into(conv, repeats=4)
        torch.testing.assert_close(shuffle(conv(x)), want, atol=1e-5, rtol=1e-5)

    def test_first_step(self, maker, options):
        x = features(12)
        norm = maker(12, **options)
        first = norm.normalize(x)
        norm.update(x)
        torch.testing.assert_close(first, norm.normalize(x), atol=1e-5, rtol=1e-5)
        raw = maker(12, initial="raw", **options)
        torch.testing.assert_close(raw.normalize(x), x)
        torch.testing.assert_close(maker(12, **options).eval().normalize(x), x)

    def test_masked_rows_are_left_out(self, maker, options):
        x = features(12).view(20, 100, 12)
        mask = torch.rand(20, 100, generator=torch.Generator().manual_seed(1)) > 0.3
        masked, plain = maker(12, **options), maker(12, **options)
        masked.update(x.masked_fill(~mask[..., None], float("nan")), mask)
        plain.update(x[mask])
        torch.testing.assert_close(masked.scatter, plain.scatter)
        torch.testing.assert_close(masked.normalize(x), plain.normalize(x))

    def test_degenerate_batches_stay_finite(self, maker, options):
        """Fewer rows than channels, one row, no valid row, constant features."""
        x = features(12)
        for batch in (x[:3], x[:1], x[:1].expand(50, 12)):
            norm = fitted(maker, batch, **options)
            assert norm.normalize(x).isfinite().all()
        norm = maker(12, **options)
        norm.update(x, torch.zeros(len(x), dtype=torch.bool))
        torch.testing.assert_close(norm.normalize(x), x)

    def test_nan_shows(self, maker, options):
        """A NaN in the targets must surface as a NaN loss, not as an error on one rank with the others waiting."""
        x = features(12)
        x[5, 3] = float("nan")
        assert fitted(maker, x, **options).normalize(x).isnan().all()

    def test_state_dict_resumes_exactly(self, maker, options):
        batches = [features(12, n=40, seed=s) for s in range(9)]
        norm, twin = (maker(12, update_every=4, **options) for _ in range(2))
        for x in batches[:5]:
            norm.normalize(x), norm.update(x)
        twin.load_state_dict(norm.state_dict())
        for x in batches[5:]:
            assert torch.equal(norm.normalize(x), twin.normalize(x))
            norm.update(x), twin.update(x)
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))

    def test_reset_is_a_new_one(self, maker, options):
        norm = fitted(maker, features(12), **options)
        norm.reset()
        new = maker(12, **options)
        assert norm.taken == 0
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), new.buffers(), strict=True))

    def test_inference_mode_input_and_cast(self, maker, options):
        with torch.inference_mode():
            x = features(12)
            norm = fitted(maker, x, **options)
        nn.Sequential(norm).bfloat16()
        assert norm.scatter.dtype == torch.float64 and norm.forward_map.dtype == torch.float32
        y = norm.normalize(x)
        (y * torch.ones(12, requires_grad=True)).sum().backward()
        assert norm.normalize(x.bfloat16()).dtype == torch.float32

    def test_autocast_does_not_round_the_maps(self, maker, options):
        x = features(12).float()
        norm = fitted(maker, x, **options)
        plain = norm.normalize(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm.normalize(x), plain)
            torch.testing.assert_close(norm.denormalize(plain), x, atol=1e-4, rtol=1e-4)


def test_schedule():
    """The map moves after updates 1, 2, 4, then every 5, and not after 12: when the next step asks for targets."""
    norm, moved = PHIS(12, update_every=5, freeze_after=12), []
    for step in range(1, 16):
        before = norm.forward_map.clone()
        norm.update(features(12, n=30, seed=step))
        assert torch.equal(before, norm.forward_map), "not before: a head is exported in the map it was trained for"
        norm.eval().normalize(features(12, n=3))
        assert torch.equal(before, norm.forward_map), "not by validation"
        norm.train().normalize(features(12, n=3))
        if not torch.equal(before, norm.forward_map):
            moved.append(step)
    assert moved == [1, 2, 4, 5, 10, 12] and norm.frozen and norm.taken == 12


def test_eigenvectors_have_a_fixed_sign():
    x = features(12)
    torch.testing.assert_close(fitted(PHIS, x).forward_map, fitted(PHIS, x.flip(0)).forward_map, atol=1e-5, rtol=1e-5)


def test_bad_options():
    with pytest.raises(UserError, match="update_every 0"):
        PHIS(12, update_every=0)
    with pytest.raises(UserError, match="freeze_after 0"):
        PHIS(12, freeze_after=0)
    with pytest.raises(UserError, match="'pca', 'zca'"):
        Whiten(12, kind="hadamard")
