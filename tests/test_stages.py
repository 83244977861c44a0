"""Stages in a real run: exact at their boundaries, and bit by bit the same after a resume at any step."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader

from agglom.balance import AdaLoss, TeacherDropping
from agglom.distiller import Distiller
from agglom.objectives import AngleBalanced
from agglom.plan import Partition, Plan, Stage, slot
from agglom.schedules import multiplier
from agglom.shifts import ShiftOptions
from agglom.targets import PHIS

MICROS = 2
STAGES = [
    Stage(steps=3, teachers=["clip"], freeze_steps=1, warmup_steps=1),
    Stage(
        steps=3,
        lr=2e-3,
        warmup_steps=0,
        partitions=[Partition(batch_size=3), Partition(["sam", "clip"], resolutions=[16, 32], batch_size=2)],
    ),
    Stage(reset_statistics=False, resolutions=[16, 32], freeze_steps=1),
]
STEPS = 9


class Fixed(pl.LightningDataModule):
    """Batches by plan whose pixels follow from their number, from wherever the trainer is."""

    def __init__(self, stages, margin=0):
        super().__init__()
        self.plan, self.margin = Plan(stages, size=32, batch_size=4), margin

    def batch(self, number):
        step, micro = divmod(number, self.trainer.accumulate_grad_batches)
        part = self.plan.part(step, slot(micro, self.trainer.global_rank, self.trainer.world_size))
        generator = torch.Generator().manual_seed(1000 * self.trainer.global_rank + number)
        size = part.size + 2 * self.margin
        pixels = torch.rand(part.batch_size, 3, size, size, generator=generator)
        return {"image": pixels, "key": [str(number)] * part.batch_size, "part": part}

    def train_dataloader(self):
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return DataLoader([self.batch(number) for number in range(first, 60)], batch_size=None)


class Watch(pl.Callback):
    """What a run was like before each optimiser step."""

    def __init__(self):
        self.rates, self.weights, self.counts, self.modes = [], [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.weights.append(copy.deepcopy(module.trained.state_dict()))
        self.counts.append({n: h.normalizers["spatial"].taken for n, h in module.heads.items()})
        self.modes.append(module.student.training)


def build(tiny_student, tiny_teachers, seed, **options):
    student = tiny_student(seed=seed, summary_tokens=2, kwargs={"dynamic_img_size": True})
    options = {"normalizer": PHIS, "summary_loss": AngleBalanced, "balance": TeacherDropping(p=0.5), **options}
    return Distiller(student, tiny_teachers(), lr=1e-3, ema_decay=0.9, stages=STAGES, **options)


def run(module, trainer, margin=0, ckpt=None):
    trainer.fit(module, datamodule=Fixed(STAGES, margin), ckpt_path=ckpt)
    average = next(c for c in trainer.callbacks if hasattr(c, "average"))
    return module.state_dict(), average.average.state_dict(), trainer.optimizers[0].state_dict()


OPTIONS = {
    "dropping": {},
    "adaloss": {"balance": AdaLoss()},
    "shifts": {"shift": ShiftOptions(std=1.0, limit=1)},
}


class SaveAlways(Checkpoint):
    """A checkpoint after every optimiser step; by its type it runs after the other callbacks, as ours does."""

    def __init__(self, folder):
        self.folder, self.last = folder, 0

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > self.last:
            self.last = trainer.global_step
            trainer.save_checkpoint(self.folder / f"{self.last}.ckpt")


def differences(a, b, path=""):
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


@pytest.mark.parametrize("options", OPTIONS)
def test_resume_at_any_step_is_bit_equal(options, tiny_student, tiny_teachers, quiet_trainer, tmp_path):
    """Before, at and after each boundary, and while the trunk is frozen: weights, averages, statistics, optimiser."""
    margin = 8 if options == "shifts" else 0

    def fit(seed, ckpt=None, **more):
        trainer = quiet_trainer(max_steps=STEPS, accumulate_grad_batches=MICROS, **more)
        made = {key: copy.deepcopy(value) for key, value in OPTIONS[options].items()}
        return run(build(tiny_student, tiny_teachers, seed, **made), trainer, margin, ckpt)

    whole = fit(0, callbacks=[SaveAlways(tmp_path)], enable_checkpointing=True)
    for at in (1, 3, 4, 6, 7) if options == "dropping" else (3, 5):
        assert differences(whole, fit(1, ckpt=tmp_path / f"{at}.ckpt")) == [], f"resumed at step {at}"
    assert differences(whole, fit(1))


@pytest.fixture
def watched(tiny_student, tiny_teachers, quiet_trainer):
    watch = Watch()
    module = build(tiny_student, tiny_teachers, 0, balance=None)
    run(module, quiet_trainer(max_steps=STEPS, accumulate_grad_batches=MICROS, callbacks=[watch]))
    return module, watch


def moved(before, after, prefix):
    names = [name for name in before if name.startswith(prefix)]
    assert names
    return [not torch.equal(before[name], after[name]) for name in names]


def test_the_trunk_stands_still_while_heads_settle(watched):
    _, watch = watched
    first, second, third = watch.weights[:3]
    assert not any(moved(first, second, "student.")) and any(moved(second, third, "student."))
    assert all(moved(first, second, "heads.clip.adaptor.spatial.last"))
    assert watch.modes == [False, True, True, True, True, True, False, True, True]
    assert not any(moved(watch.weights[6], watch.weights[7], "student."))


def test_teachers_left_out_of_a_stage_do_not_move(watched):
    _, watch = watched
    for name in ("dino", "sam"):
        assert not any(moved(watch.weights[0], watch.weights[3], f"heads.{name}.adaptor"))
        assert any(moved(watch.weights[3], watch.weights[4], f"heads.{name}.adaptor"))


def test_statistics_begin_anew_at_the_boundary_only_where_they_should(watched):
    """Micro-batches that a normaliser has taken, before each step: two a step, one where only one partition has it."""
    _, watch = watched
    assert [count["clip"] for count in watch.counts] == [2, 4, 6, 2, 4, 6, 8, 10, 12]
    assert [count["dino"] for count in watch.counts] == [0, 0, 0, 1, 2, 3, 5, 7, 9]


def test_learning_rate_of_each_stage(watched):
    _, watch = watched
    kept = {"schedule": "cosine", "final": 0.01}
    expected = [1e-3 * multiplier(k, warmup_steps=1, total_steps=3, **kept) for k in range(3)]
    expected += [2e-3 * multiplier(k, warmup_steps=0, total_steps=3, **kept) for k in range(3)]
    expected += [1e-3 * multiplier(k, warmup_steps=100, total_steps=3, **kept) for k in range(3)]
    assert watch.rates == pytest.approx(expected)


def test_a_batch_of_another_stage_is_refused(tiny_student, tiny_teachers, quiet_trainer):
    class Late(Fixed):
        def batch(self, number):
            return super().batch(number + MICROS)

    module = build(tiny_student, tiny_teachers, 0)
    with pytest.raises(RuntimeError, match="a batch of stage 1 at step 2, which belongs to stage 0"):
        quiet_trainer(max_steps=STEPS, accumulate_grad_batches=MICROS).fit(module, datamodule=Late(STAGES))
