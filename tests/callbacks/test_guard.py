"""A step that isn't finite leaves no trace: not in weights, optimiser, averages' source or statistics.

Teachers, losses and gradients are broken at chosen steps. What is expected is a training loop that never saw them.
"""

import copy
import json
import logging
import statistics
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from agglom.balance import AdaLoss
from agglom.callbacks import Checkpoints, checkpoint_path, read_checkpoint
from agglom.callbacks.guard import FILE, Guard, NotFinite, some, unfinite
from agglom.callbacks.spikes import LossSpikes
from agglom.diagnostics import spread
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.targets import PHIS

NAN = float("nan")


def batches(number, size=2):
    pixels = torch.rand(number, size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [{"image": x, "key": [f"{i}/{k}" for k in range(size)]} for i, x in enumerate(pixels)]


def broken(module, name, at, kind="summary", value=NAN):
    """Let a teacher say `value` in its calls of these numbers (its first is 0)."""
    encoder, calls = module.encoders[name], []
    plain = encoder.encode

    def encode(pixels):
        calls.append(1)
        features = plain(pixels)
        if len(calls) - 1 in at:
            getattr(features, kind)[0] = value
        return features

    encoder.encode = encode
    return module


def state(module):
    return {
        "weights": copy.deepcopy(module.trained.state_dict()),
        "balance": copy.deepcopy(module.balance.state_dict()),
        "optimizer": copy.deepcopy(module.optimizers().state_dict()["state"]),
    }


def differ(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [f"{k}.{x}" for k in a for x in differ(a[k], b[k])]
    return [] if torch.equal(torch.as_tensor(a), torch.as_tensor(b)) else [""]


class States(pl.Callback):
    """Takes the module's state whenever an optimiser step has ended."""

    def __init__(self):
        self.taken = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.taken):
            self.taken.append(state(pl_module))


def run(trainer, module, number):
    trainer.fit(module, DataLoader(batches(number), batch_size=None))


@pytest.fixture
def build(tiny_student, tiny_teachers):
    def make(**options):
        options = {"warmup_steps": 0, "schedule": "constant", "balance": AdaLoss(), **options}
        return Distiller(tiny_student(), tiny_teachers("clip", "dino"), **options)

    return make


@pytest.mark.parametrize("kind", ["summary", "spatial"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "momentum"])
def test_the_step_leaves_no_trace(kind, optimizer, build, quiet_trainer):
    """Weights, moments and every statistic after step 2 are those after step 1, bit for bit; step 3 moves them."""
    module = broken(build(optimizer=optimizer, normalizer=PHIS, skip_nonfinite=1), "dino", [2], kind)
    states = States()
    quiet_trainer(max_steps=4, log_every_n_steps=1, callbacks=[states]).fit(
        module, DataLoader(batches(4), batch_size=None)
    )
    first, second, third, fourth = states.taken
    assert differ(second, third) == []
    moved = differ(third, fourth)
    assert any(x.startswith("weights.student") for x in moved) and any("normalizers" in x for x in moved), moved
    assert any(x.startswith("balance") for x in moved) and any(x.startswith("optimizer") for x in moved)
    assert all(torch.isfinite(x).all() for x in module.trained.state_dict().values())


def test_broken_from_the_first_step_on(build, quiet_trainer):
    """Statistics that take their size and first value from a batch take them from the first good one."""
    module = broken(build(skip_nonfinite=2, ema_decay=None), "dino", [0, 1])
    run(quiet_trainer(max_steps=3, log_every_n_steps=1), module, 3)
    other = build(ema_decay=None)
    quiet_trainer(max_steps=1).fit(other, DataLoader(batches(3)[2:], batch_size=None))
    assert differ(module.trained.state_dict(), other.trained.state_dict()) == []
    assert differ(module.balance.state_dict(), other.balance.state_dict()) == []
    assert module.heads["dino"].normalizers["summary"].taken == 1


def test_a_micro_batch_takes_its_whole_step_along(build, quiet_trainer):
    module = broken(build(skip_nonfinite=1), "clip", [3])  # the second of step 1
    states = States()
    trainer = quiet_trainer(max_steps=3, log_every_n_steps=1, accumulate_grad_batches=2, callbacks=[states])
    run(trainer, module, 6)
    first, second, third = states.taken
    assert differ(first, second) == [] and differ(second, third)


def test_a_gradient_alone(build, quiet_trainer, caplog):
    """All losses are finite, the gradient overflows."""
    module = build(skip_nonfinite=1)
    weight = module.student.backbone.blocks[0].mlp.fc1.weight
    steps = []

    def overflow(gradient):
        steps.append(1)
        return gradient * (float("inf") if len(steps) == 2 else 1)

    weight.register_hook(overflow)
    with caplog.at_level(logging.WARNING, logger="agglom.fit"):
        states = States()
        trainer = quiet_trainer(max_steps=3, log_every_n_steps=1, callbacks=[states])
        run(trainer, module, 3)
    assert differ(*states.taken[:2]) == []
    assert "step 1 is left out (1 in a row, 1 in all): not finite: the gradient; images 1/0, 1/1" in caplog.text


def test_a_loss_that_has_no_gradient_there(build, quiet_trainer):
    """A loss that isn't finite and passes on a finite gradient is still not applied."""
    module = build(skip_nonfinite=1)
    plain, calls = module.heads["clip"].combine, []

    def combine(found):
        calls.append(1)
        loss = plain(found)
        return loss + (NAN if len(calls) == 2 else 0.0)

    module.heads["clip"].combine = combine
    states = States()
    run(quiet_trainer(max_steps=3, callbacks=[states]), module, 3)
    assert differ(*states.taken[:2]) == []


@pytest.mark.parametrize(("at", "limit", "stops"), [([2], 0, 2), ([2, 3, 5], 1, 3), ([1, 2, 4, 5], 2, None)])
def test_more_in_a_row_than_allowed_stop_the_run(at, limit, stops, build, quiet_trainer, tmp_path):
    module = broken(build(skip_nonfinite=limit), "dino", at)
    trainer = quiet_trainer(max_steps=8, log_every_n_steps=1, enable_checkpointing=True, callbacks=[Checkpoints()])
    data = DataLoader(batches(8), batch_size=None)
    if stops is None:
        trainer.fit(module, data)
    else:
        with pytest.raises(NotFinite) as caught:
            trainer.fit(module, data)
        line = str(caught.value)
        assert line.startswith(f"step {stops} is left out, and model.skip_nonfinite: {limit} allows no more in a row")
        assert "the summary of dino, the loss of dino; images" in line and f"{stops}/0, {stops}/1" in line
        saved = read_checkpoint(checkpoint_path(trainer.default_root_dir))
        assert saved["global_step"] == stops + 1
        progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert progress["ready"] == progress["completed"] == stops + 1  # what resumes fetches the next batch
        assert all(torch.isfinite(x).all() for x in saved["state_dict"].values())
    with open(f"{trainer.default_root_dir}/{FILE}") as file:
        written = [json.loads(line) for line in file]
    assert [line["step"] for line in written] == [step for step in at if stops is None or step <= stops]
    assert all(line["keys"] == [f"{line['step']}/0", f"{line['step']}/1"] for line in written)
    assert module.guard.skipped == len(written)


def test_what_happened_between_logged_steps_is_told_at_the_next(build, quiet_trainer):
    module = broken(build(), "dino", [2, 4])
    with pytest.raises(UserError, match="step 2 is left out.*images 2/0, 2/1"):
        run(quiet_trainer(max_steps=9, log_every_n_steps=5), module, 9)
    assert module.global_step == 5


def test_the_last_steps_are_read_too(build, quiet_trainer):
    module = broken(build(), "dino", [2])
    with pytest.raises(NotFinite, match="step 2 "):
        run(quiet_trainer(max_steps=3, log_every_n_steps=50), module, 3)


def test_norm_and_number_are_logged(build, quiet_trainer):
    from lightning.pytorch.loggers import Logger

    class Kept(Logger):
        name, version = "kept", 0
        rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append(metrics)

        def log_hyperparams(self, *_, **__): ...

    module = broken(build(skip_nonfinite=3, ema_decay=None), "dino", [1])
    taken = []
    judge = module.guard.judge

    def measured(trainer, optimizer, clip, algorithm):
        grads = [p.grad.double().flatten() for p in module.trained.parameters() if p.grad is not None]
        taken.append(torch.cat(grads).norm().item())
        judge(trainer, optimizer, clip, algorithm)
        clipped = (
            torch.cat([p.grad.double().flatten() for p in module.trained.parameters() if p.grad is not None])
            .norm()
            .item()
        )
        assert clipped == pytest.approx(min(0.1, taken[-1]), rel=1e-4) or taken[-1] != taken[-1]

    module.guard.judge = measured
    trainer = quiet_trainer(max_steps=3, log_every_n_steps=1, logger=Kept(), gradient_clip_val=0.1)
    run(trainer, module, 3)
    rows = [row for row in Kept.rows if "train/grad_norm" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 1]
    assert [rows[i]["train/grad_norm"] for i in (0, 2)] == pytest.approx([taken[0], taken[2]])


def test_a_teacher_that_says_the_same_of_everything_is_reported_once(build, quiet_trainer, caplog):
    module = build()
    plain = module.encoders["dino"].encode
    module.encoders["dino"].encode = lambda pixels: type(plain(pixels))(
        *(torch.full_like(x, 0.3) for x in plain(pixels))
    )
    with caplog.at_level(logging.WARNING, logger="agglom.fit"):
        run(quiet_trainer(max_steps=4, log_every_n_steps=1), module, 4)
    lines = [record.getMessage() for record in caplog.records if "same everywhere" in record.getMessage()]
    assert [line.split(" is ")[0] for line in lines] == ["step 0: the summary of dino", "step 0: the spatial of dino"]


def test_spread_by_hand():
    assert spread(torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]])) == 0 and spread(torch.zeros(3, 2)) == 0
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 1  # zero mean: all of it deviates
    assert spread(torch.tensor([[3.0], [1.0]])) == pytest.approx((1 / 5) ** 0.5)  # deviations 1, 1 of power (9 + 1) / 2
    image = torch.rand(2, 3, 4, 5)
    rows = image.permute(0, 2, 3, 1).reshape(-1, 3)
    assert spread(image) == pytest.approx((rows.var(0, unbiased=False).mean() / rows.square().mean()).sqrt().item())


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_unfinite_sees_every_place(value):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((2, 3), -60000.0, dtype=dtype)
        x[0] = 60000.0
        assert not unfinite(x) and not unfinite(x[:0])
        for place in range(6):
            y = x.clone()
            y.view(-1)[place] = value
            assert unfinite(y)


def test_spikes_are_told_once_and_noise_is_not():
    rng = torch.Generator().manual_seed(0)
    spikes = LossSpikes(window=40)
    noise = (2 + 0.1 * torch.randn(400, generator=rng)).tolist()
    assert [spikes.add(x) for x in noise] == [None] * 400
    assert spikes.add(5.0) == f"the loss is 5 after a median of {statistics.median(noise[-40:]):.4g} over 40 steps"
    assert spikes.add(5.0) is None  # told
    other = LossSpikes(window=40)
    other.restore(spikes.state())
    assert other.state() == spikes.state()
    early = LossSpikes(window=40)
    assert [early.add(x) for x in [1.0] * 9 + [50.0]] == [None] * 10  # too few to compare with
    flat = LossSpikes(window=40)
    assert [flat.add(x) for x in [1.0] * 30 + [1.1]] == [None] * 31  # no deviation at all, and less than a fifth more


def test_keys_are_shortened_and_the_limit_is_checked():
    assert some(["a", "b"]) == "a, b" and some([*"abcdefg"]) == "a, b, c, d, e and 2 more"
    with pytest.raises(UserError, match="model.skip_nonfinite: -1; valid: 0 or more"):
        Guard(-1)


SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from agglom.distiller import Distiller
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent
from agglom.teachers import TinyTeacher

limit, out = int(sys.argv[1]), sys.argv[2]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        rank = self.trainer.global_rank
        pixels = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        steps = [{"image": x, "key": [f"rank {rank} step {i}"]} for i, x in enumerate(pixels)]
        return DataLoader(steps, batch_size=None)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    student = TimmStudent(
        name="vit_tiny_patch16_224",
        kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    teachers = {name: TeacherConfig(TinyTeacher(name, pretrained=False)) for name in ("clip", "sam")}
    module = Distiller(student, teachers, warmup_steps=0, skip_nonfinite=limit)
    calls, plain = [], module.encoders["sam"].encode

    def encode(pixels):
        calls.append(1)
        features = plain(pixels)
        if trainer.global_rank == 1 and len(calls) == 2:
            features.spatial[1, 3] = float("inf")
        return features

    module.encoders["sam"].encode = encode
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=4, max_epochs=-1, logger=False, log_every_n_steps=4,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        use_distributed_sampler=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )
    trainer.fit(module, Data())
    torch.save(module.trained.state_dict(), f"{out}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_what_breaks_on_one_rank_is_left_out_on_both(tmp_path, one_thread):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run([*command, "1", str(tmp_path)], env=one_thread, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (tmp_path / FILE).read_text().splitlines()
    said = json.loads(line)
    assert said["step"] == 1 and said["keys"] == ["rank 1 step 1"]
    assert said["broken"] == ["the spatial of sam", "the loss of sam"]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differ(first, second) == [] and all(torch.isfinite(x).all() for x in first.values())
    done = subprocess.run([*command, "0", str(tmp_path)], env=one_thread, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "NotFinite: step 1 is left out" in done.stderr
