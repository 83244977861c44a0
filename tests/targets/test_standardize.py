"""Standardize: its three schedules against plain formulas, the first step, masks, folding, persistence."""

import math

import pytest
import torch
from torch import nn

from agglom.errors import UserError
from agglom.targets import Identity, Standardize

C = 6


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(32, C, generator=g) * torch.arange(1, C + 1) + 10 + i for i in range(5)]


def test_running_is_the_statistics_of_everything(batches):
    norm = Standardize(C, schedule="running")
    for x in batches:
        norm.update(x)
    everything = torch.cat(batches)
    y = norm.normalize(everything)
    torch.testing.assert_close(y.mean(0), torch.zeros(C), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(C), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(160,), (1, 159), (80, 80), (7, 3, 100, 50)])
def test_any_split_gives_the_same(batches, sizes):
    norm = Standardize(C, schedule="running")
    for part in torch.cat(batches).double().split(sizes):
        norm.update(part)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(norm.mean, everything.mean(0))
    torch.testing.assert_close(norm.std, everything.std(0))


def test_large_mean_small_deviation():
    """1e4 +- 1e-1 in float32: a sum of squares would lose it."""
    x = torch.randn(4096, C, generator=torch.Generator().manual_seed(0)).double() * 0.1 + 1e4
    norm = Standardize(C, schedule="running")
    for part in x.float().split(512):
        norm.update(part)
    torch.testing.assert_close(norm.std, x.std(0), rtol=0.01, atol=0)


def test_a_channel_that_was_silent_in_the_first_batch(batches):
    """As in ReLU networks: its first value is at most 100 mean deviations, not a million; the others don't notice."""
    silent = batches[0].clone()
    silent[:, 2] = 0
    norm = Standardize(C)
    norm.update(silent)
    y = norm.normalize(batches[1])
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[:, others], ((batches[1] - silent.mean(0)) / (silent.std(0) + 1e-6))[:, others])
    expected = batches[1][:, 2] / (0.01 * silent.std(0).mean())
    torch.testing.assert_close(y[:, 2], expected, rtol=1e-4, atol=0)


def test_unic_schedule_step_by_step(batches):
    """Statistics of before the step; momentum from 1 to 0.001; std, not variance, is averaged; first step raw."""
    norm = Standardize(C, total_steps=5, initial="raw")
    mean, std = torch.zeros(C), torch.ones(C)
    for k, x in enumerate(batches):
        torch.testing.assert_close(norm.normalize(x), (x - mean) / (std + 1e-6))
        norm.update(x)
        m = 0.001 + 0.999 * (1 + math.cos(math.pi * k / 4)) / 2
        mean, std = (1 - m) * mean + m * x.mean(0), (1 - m) * std + m * x.std(0)
    assert norm.momentum(0) == 1 and norm.momentum(4) == pytest.approx(0.001) == norm.momentum(99)


def test_default_momentum_averages_first(batches):
    """Without a length the statistics are a plain average of the batches' until the EMA is long enough."""
    norm = Standardize(C)
    for x in batches:
        norm.update(x)
    torch.testing.assert_close(norm.mean.float(), torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(norm.std.float(), torch.stack([x.std(0) for x in batches]).mean(0))
    assert norm.momentum(10_000) == 0.001


def test_frozen_after_warm_up(batches):
    norm = Standardize(C, schedule="frozen", warmup_steps=3)
    for x in batches:
        assert norm.frozen == (norm.taken >= 3)
        norm.update(x)
    torch.testing.assert_close(norm.mean.float(), torch.cat(batches[:3]).mean(0))
    assert norm.taken == 3


@pytest.mark.parametrize("schedule", ["ema", "frozen", "running"])
class TestFirstStep:
    def test_batch(self, batches, schedule):
        norm, x = Standardize(C, schedule=schedule), batches[0]
        first = norm.normalize(x)
        norm.update(x)
        torch.testing.assert_close(first, norm.normalize(x))
        torch.testing.assert_close(first.std(0), torch.ones(C), atol=1e-4, rtol=0)

    def test_raw_and_eval_see_it_as_it_is(self, batches, schedule):
        x = batches[0]
        torch.testing.assert_close(Standardize(C, schedule=schedule, initial="raw").normalize(x), x)
        torch.testing.assert_close(Standardize(C, schedule=schedule).eval().normalize(x), x)

    def test_single_row(self, batches, schedule):
        """One row has no deviation: it must neither divide by 0 nor set the statistics to 0."""
        norm, x = Standardize(C, schedule=schedule), batches[0][:1]
        assert norm.normalize(x).abs().max() < 20
        norm.update(x)
        assert (norm.std == 1).all()
        norm.update(batches[1])
        assert norm.normalize(batches[1]).isfinite().all()


@pytest.mark.parametrize("schedule", ["ema", "frozen", "running"])
def test_masked_rows_are_left_out(batches, schedule):
    x = torch.stack(batches)  # (5, 32, C)
    mask = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    dirty = x.masked_fill(~mask[..., None], float("nan"))
    masked, plain = Standardize(C, schedule=schedule), Standardize(C, schedule=schedule)
    torch.testing.assert_close(masked.normalize(dirty, mask)[mask], plain.normalize(x[mask]))
    masked.update(dirty, mask)
    plain.update(x[mask])
    torch.testing.assert_close(masked.mean.float(), plain.mean.float())
    torch.testing.assert_close(masked.std.float(), plain.std.float())
    before = masked.std.clone()
    masked.update(dirty, torch.zeros_like(mask))  # nothing valid: nothing moves
    assert torch.equal(masked.std, before) and masked.mean.isfinite().all()


def test_constant_channel_is_finite(batches):
    x = batches[0].clone()
    x[:, 2] = 0.1
    norm = Standardize(C, schedule="running")
    norm.update(x)
    norm.update(x)
    y = norm.normalize(x)
    assert y.isfinite().all() and norm.std[2] < 1e-6


def test_round_trip_and_bf16_input(batches):
    norm = Standardize(C)
    norm.update(batches[0])
    x = batches[1].view(2, 4, 4, C)
    torch.testing.assert_close(norm.denormalize(norm.normalize(x)), x)
    assert norm.normalize(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_fold_is_denormalize(batches, bias, kind):
    norm = Standardize(C)
    norm.update(batches[0])
    x = torch.randn(2, 5, 3, 3)
    if kind == "linear":
        layer, x = nn.Linear(5, C, bias=bias), x.movedim(1, -1)
        want = norm.denormalize(layer(x))
    else:
        layer = nn.Conv2d(5, C, 1, bias=bias)
        want = norm.denormalize(layer(x).movedim(1, -1)).movedim(-1, 1)
    norm.fold_into(layer)
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_fold_before_a_pixel_shuffle(batches):
    norm = Standardize(C)
    norm.update(batches[0])
    layer, shuffle, x = nn.Conv2d(5, C * 4, 1), nn.PixelShuffle(2), torch.randn(2, 5, 3, 3)
    want = norm.denormalize(shuffle(layer(x)).movedim(1, -1)).movedim(-1, 1)
    norm.fold_into(layer, repeats=4)
    torch.testing.assert_close(shuffle(layer(x)), want, atol=1e-5, rtol=1e-5)


def test_fold_into_rungs_that_are_summed(batches):
    norm = Standardize(C)
    norm.update(batches[0])
    rungs, x = [nn.Linear(5, C) for _ in range(3)], torch.randn(7, 5)
    want = norm.denormalize(sum(r(x) for r in rungs))
    for i, rung in enumerate(rungs):
        norm.fold_into(rung, shift=i == 0)
    torch.testing.assert_close(sum(r(x) for r in rungs), want, atol=1e-5, rtol=1e-5)


def test_fold_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="6 channels"):
        Standardize(C).fold_into(nn.Linear(5, C + 1))
    with pytest.raises(TypeError, match="nn.Linear"):
        Standardize(C).fold_into(nn.LayerNorm(C))


def test_state_dict_resumes_exactly(batches):
    norm = Standardize(C, total_steps=5)
    for x in batches[:3]:
        norm.update(x)
    twin = Standardize(C, total_steps=5)
    twin.load_state_dict(norm.state_dict())
    assert twin.taken == 3
    for x in batches[3:]:
        norm.update(x)
        twin.update(x)
    assert torch.equal(norm.mean, twin.mean) and torch.equal(norm.std, twin.std)


def test_reset_is_a_new_one(batches):
    norm, new = Standardize(C, schedule="running"), Standardize(C, schedule="running")
    norm.update(batches[0])
    norm.reset()
    for n in (norm, new):
        n.update(batches[1])
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), new.buffers(), strict=True))


def test_statistics_keep_their_precision_when_the_module_is_cast(batches):
    norm = Standardize(C)
    norm.update(batches[0])
    mean = norm.mean.clone()
    nn.Sequential(norm).to(torch.bfloat16)
    assert norm.mean.dtype == torch.float64 and torch.equal(norm.mean, mean)
    with torch.device("meta"):
        meta = Standardize(C)
    meta.to_empty(device="cpu").reset()
    assert meta.mean.dtype == torch.float64 and (meta.std == 1).all()


def test_no_gradient_into_statistics(batches):
    x = batches[0].clone().requires_grad_()
    norm = Standardize(C)
    norm.update(x)
    assert not norm.mean.requires_grad


def test_works_under_inference_mode(batches):
    """Teachers may run there; what was measured there must still serve a step with gradients."""
    norm = Standardize(C)
    with torch.inference_mode():
        norm.update(batches[0])
    (norm.normalize(batches[1]) * torch.ones(C, requires_grad=True)).sum().backward()


def test_identity(batches):
    norm, layer = Identity(C), nn.Linear(5, C)
    weight = layer.weight.clone()
    norm.update(batches[0])
    norm.fold_into(layer)
    torch.testing.assert_close(norm.normalize(batches[0]), batches[0])
    torch.testing.assert_close(norm.denormalize(batches[0]), batches[0])
    assert torch.equal(layer.weight, weight)


def test_bad_input(batches):
    with pytest.raises(UserError, match="'ema', 'frozen', 'running'"):
        Standardize(C, schedule="never")
    with pytest.raises(ValueError, match="built for 6"):
        Standardize(C).normalize(torch.randn(2, C + 1))
    with pytest.raises(ValueError, match="mask"):
        Standardize(C).update(batches[0], torch.ones(3, dtype=torch.bool))
