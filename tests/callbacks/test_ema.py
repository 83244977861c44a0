"""WeightEMA: the closed formula by optimiser step, validation on the average and back bit-exactly, checkpoints."""

import copy
import types

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from agglom.callbacks import WeightEMA
from agglom.callbacks.ema import update_average
from agglom.errors import UserError


class Toy(pl.LightningModule):
    """One Linear with a norm; remembers its weights after each optimiser step and what validation saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.history, self.validated, self.around = [snapshot(self.trained)], [], []

    def training_step(self, batch, index):
        return (self.trained(batch) - batch).square().mean()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.history.append(snapshot(self.trained))

    def validation_step(self, batch, index):
        self.validated.append(snapshot(self.trained))

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained.parameters(), lr=0.5)


def snapshot(module):
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def batches(count):
    return DataLoader(torch.randn(4 * count, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)


def closed(history, decay):
    """The average after the last step: the weighted sum of all weights, written out."""
    decays = [min(decay, step / (9 + step)) for step in range(1, len(history))]
    shares = [torch.tensor(decays).prod().item()]
    for step in range(1, len(history)):
        shares.append((1 - decays[step - 1]) * torch.tensor(decays[step:]).prod().item())
    assert sum(shares) == pytest.approx(1)
    return {
        key: sum(s * w[key].double() for s, w in zip(shares, history, strict=True)) for key in ("0.weight", "1.bias")
    }


@pytest.mark.parametrize("decay", [0.15, 0.999])  # the first is reached within the warm-up, the second is not
@pytest.mark.parametrize("accumulate", [1, 2])
def test_closed_formula_over_three_optimiser_steps(quiet_trainer, decay, accumulate):
    toy, ema = Toy(), WeightEMA(decay)
    trainer = quiet_trainer(max_steps=3, accumulate_grad_batches=accumulate, callbacks=[ema])
    trainer.fit(toy, batches(3 * accumulate))
    assert len(toy.history) == 4
    for key, expected in closed(toy.history, decay).items():
        torch.testing.assert_close(ema.average.state_dict()[key].double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(toy.history[-1][key].double(), expected)
    # buffers are not averaged: the last ones are copied
    torch.testing.assert_close(ema.average[1].running_mean, toy.trained[1].running_mean, rtol=0, atol=0)


def test_decay_0_is_the_weights_themselves(quiet_trainer):
    toy, ema = Toy(), WeightEMA(0.0)
    quiet_trainer(max_steps=2, callbacks=[ema]).fit(toy, batches(2))
    assert all(torch.equal(value, toy.history[-1][key]) for key, value in ema.average.named_parameters())


def test_validates_with_the_average_and_restores_bit_exactly(quiet_trainer):
    toy, ema = Toy(), WeightEMA(0.9)
    trainer = quiet_trainer(max_steps=3, callbacks=[ema], val_check_interval=3, check_val_every_n_epoch=None)
    trainer.fit(toy, batches(3), batches(1))
    (seen,), average = toy.validated, ema.average.state_dict()
    assert all(torch.equal(seen[key], average[key]) for key in seen)
    assert not torch.equal(seen["0.weight"], toy.history[-1]["0.weight"])
    assert all(
        torch.equal(value, toy.trained.state_dict()[key]) for key, value in toy.history[-1].items() if key[0] == "0"
    )
    assert torch.equal(toy.trained[1].weight, toy.history[-1]["1.weight"])


def test_a_restored_average_goes_on_where_it_was(quiet_trainer, tmp_path):
    whole, straight = Toy(), WeightEMA(0.5)
    quiet_trainer(max_steps=4, callbacks=[straight]).fit(whole, batches(4))
    first, path = Toy(), tmp_path / "half.ckpt"
    trainer = quiet_trainer(max_steps=2, callbacks=[WeightEMA(0.5)])
    trainer.fit(first, batches(4))
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert [name for name in saved if "WeightEMA" in name]
    resumed, second = WeightEMA(0.5), Toy()
    resumed.load_state_dict(next(v for k, v in saved.items() if "WeightEMA" in k))
    second.trained.load_state_dict(first.trained.state_dict())
    resumed.on_fit_start(types.SimpleNamespace(global_step=0, max_steps=4), second)
    resumed.on_train_start(types.SimpleNamespace(global_step=2), second)
    second.trained.load_state_dict(whole.history[3])
    resumed.on_train_batch_end(types.SimpleNamespace(global_step=3), second)
    second.trained.load_state_dict(whole.history[4])
    resumed.on_train_batch_end(types.SimpleNamespace(global_step=4), second)
    for ours, theirs in zip(resumed.average.parameters(), straight.average.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exchange_twice_is_nothing():
    toy, ema = Toy(), WeightEMA(0.9)
    ema.exchange(toy)  # before training there is no average
    ema.on_fit_start(types.SimpleNamespace(global_step=0, max_steps=1), toy)
    nn.init.ones_(toy.trained[0].weight)
    before = copy.deepcopy(toy.trained.state_dict())
    ema.exchange(toy)
    assert not torch.equal(toy.trained[0].weight, before["0.weight"])
    ema.exchange(toy)
    assert all(torch.equal(value, toy.trained.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="valid: 0 <= decay <= 1"):
        WeightEMA(decay)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9996, 1.0])
def test_one_update_is_the_formula(decay):
    """To 1e-7, and exactly where it copies (0) or freezes (1); buffers are always copied."""
    torch.manual_seed(0)
    average, weights = Toy().trained, Toy().trained
    for p in weights.parameters():
        nn.init.normal_(p)
    weights[1].running_mean.fill_(3.0)
    before = {k: v.double() for k, v in snapshot(average).items()}
    update_average(average, weights, decay)
    for key, value in average.named_parameters():
        theirs = dict(weights.named_parameters())[key]
        expected = decay * before[key] + (1 - decay) * theirs.double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-7, atol=1e-7)
        if decay in (0.0, 1.0):
            assert torch.equal(value, theirs if decay == 0 else before[key].float())
    assert torch.equal(average[1].running_mean, weights[1].running_mean)


def test_decay_schedules(quiet_trainer):
    """Cosine: 1 - (1 - m)(1 + cos(pi k / K)) / 2, so half-way there in the middle and 1 at the end."""
    ema = WeightEMA(0.9, schedule="cosine")
    quiet_trainer(max_steps=4, callbacks=[ema]).fit(Toy(), batches(4))
    assert [ema.decay_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert [WeightEMA(0.5).decay_at(step) for step in (1, 3, 100)] == pytest.approx([0.1, 0.25, 0.5])
    assert [WeightEMA(0.5, warmup=False).decay_at(step) for step in (1, 100)] == [0.5, 0.5]


def test_a_cosine_needs_an_end(quiet_trainer):
    trainer = quiet_trainer(max_steps=-1, max_time="00:00:01:00", callbacks=[WeightEMA(0.9, schedule="cosine")])
    with pytest.raises(UserError, match="trainer.max_steps: -1, but model.ema_schedule: cosine.*valid: > 0"):
        trainer.fit(Toy(), batches(1))
