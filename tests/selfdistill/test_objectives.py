"""Objectives beside the teachers: when they run, what they cost before, what they touch, exactness after a resume."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader

from agglom.callbacks.ema import WeightEMA
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Dims
from agglom.plan import Part
from agglom.selfdistill import GramAnchor, Mesa, Objective
from agglom.selfdistill.base import layer_norm
from agglom.shifts import ShiftOptions

DIMS = Dims(32, 32)


def build(tiny_student, tiny_teachers, objectives, names=("sam",), seed=0, **options):
    return Distiller(tiny_student(seed=seed), tiny_teachers(*names), objectives=objectives, warmup_steps=0, **options)


def loader(count, size=32):
    """The same images for the same number, from the batch where the trainer is."""

    def batch(number):
        pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(number))
        return {"image": pixels, "key": list("abc")}

    class Numbered(torch.utils.data.IterableDataset):
        first = 0

        def __iter__(self):
            yield from (batch(number) for number in range(self.first, count))

    return DataLoader(Numbered(), batch_size=None)


def fit(module, trainer, count=40, size=32, ckpt=None, first=0):
    data = loader(count, size)
    data.dataset.first = first
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


class Record(Objective):
    """Notes the steps at which it runs; its loss is the student's mean feature."""

    def __init__(self, student, **options):
        super().__init__(student, **options)
        self.layer = nn.Linear(student.summary, 1)
        self.steps = []

    def forward(self, scene):
        self.steps.append(scene.step)
        return self.layer(scene.features().summary[:, 0]).squeeze(1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0] * 6),
        ({"weight": 0.5, "start": 2, "stop": 4}, [0, 0, 0.5, 0.5, 0, 0]),
        ({"start": 0.5}, [0, 0, 0, 1, 1, 1]),
        ({"weight": 3.0, "start": 1, "ramp": 3}, [0, 1, 2, 3, 3, 3]),
        ({"stop": 0.5}, [1, 1, 1, 0, 0, 0]),
        ({"weight": 0.0}, [0] * 6),
    ],
)
def test_weights_by_hand(options, expected):
    objective = Objective(DIMS, **options)
    assert [objective.weight_at(step, 6) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"), [({"weight": -1.0}, "weight: -1.0"), ({"start": 5, "stop": 5}, "stop: 5")]
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        Objective(DIMS, **options)


def test_before_its_start_it_adds_no_forward_call(tiny_student, tiny_teachers, quiet_trainer):
    """Of the average, of the student's further views, of its own heads: counted."""
    module = build(tiny_student, tiny_teachers, {"mesa": lambda dims: Mesa(dims, start=3)})
    calls = []

    class Count(WeightEMA):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.average["student"].register_forward_hook(lambda *_: calls.append(trainer.global_step))

    module.ema = Count(0.9)
    fit(module, quiet_trainer(max_steps=6))
    assert calls == [3, 4, 5]


class Blind(Record):
    """Looks at nothing of the student but a weight of its own."""

    def forward(self, scene):
        return self.layer.bias.expand(len(scene.batch["image"]))


@pytest.mark.parametrize(("objective", "passes"), [(Blind, 0), (Record, 1)])
def test_the_shared_view_is_seen_only_if_somebody_asks(tiny_student, quiet_trainer, objective, passes):
    module = build(tiny_student, lambda: {}, {"note": objective, "again": objective}, names=())
    calls = []
    module.student.register_forward_hook(lambda *_: calls.append(module.global_step))
    fit(module, quiet_trainer(max_steps=2))
    assert calls == [step for step in range(2) for _ in range(passes)]


def test_weight_0_never_runs(tiny_student, tiny_teachers, quiet_trainer):
    module = build(tiny_student, tiny_teachers, {"note": lambda dims: Record(dims, weight=0.0)})
    fit(module, quiet_trainer(max_steps=3))
    assert module.objectives["note"].steps == []


def test_no_gradient_into_the_average(tiny_student, tiny_teachers, quiet_trainer):
    module = build(
        tiny_student, tiny_teachers, {"mesa": Mesa, "gram": GramAnchor, "note": Record}, shift=ShiftOptions(limit=1)
    )
    module.plan = type(module.plan)([], size=32)
    fit(module, quiet_trainer(max_steps=2), size=48)
    average = module.ema.average
    assert not any(p.requires_grad or p.grad is not None for p in average.parameters())
    assert not average.training and not any(m.training for m in average.modules())
    held = {id(p) for group in module.optimizers().optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in average.parameters()}
    assert {id(p) for p in module.objectives["note"].parameters()} <= held
    copied = average["objectives"]["note"].layer.weight
    assert not torch.equal(copied, module.objectives["note"].layer.weight), "heads are averaged, too"


def test_mesa_is_0_where_the_average_is_the_student(tiny_student, tiny_teachers, quiet_trainer, monkeypatch):
    """Decay 0 and no shift: every step's average is the student itself."""
    seen = []
    plain = Mesa.forward
    monkeypatch.setattr(Mesa, "forward", lambda self, scene: seen.append(plain(self, scene)) or seen[-1])
    fit(build(tiny_student, tiny_teachers, {"mesa": Mesa}, ema_decay=0.0), quiet_trainer(max_steps=4))
    assert len(seen) == 4 and all(loss.shape == (3,) and loss.abs().max() < 1e-10 for loss in seen)
    seen.clear()
    fit(build(tiny_student, tiny_teachers, {"mesa": Mesa}, ema_decay=0.9), quiet_trainer(max_steps=4))
    assert seen[0].abs().max() < 1e-10 and seen[3].min() > 1e-6


class Pixels(nn.Module):
    """A student that sees its pixels cell by cell, so that it is exactly shift-equivariant."""

    def __init__(self, real):
        super().__init__()
        self.input, self.dims, self.tap_names, self.backbone = real.input, real.dims, real.tap_names, real.backbone
        self.scale = nn.Parameter(torch.ones(()))

    def no_weight_decay(self):
        return set()

    def forward(self, images, taps=()):
        from agglom.features import StudentFeatures

        cells = self.scale * nn.functional.pixel_unshuffle(images, 8)[:, :32]
        return StudentFeatures(cells.mean((2, 3))[:, None], cells)


def test_mesa_follows_the_shifts(tiny_student, tiny_teachers, quiet_trainer, monkeypatch):
    """An exactly equivariant student agrees with its average under any shifts, and not if they were ignored."""
    seen = []
    plain = Mesa.forward
    monkeypatch.setattr(Mesa, "forward", lambda self, scene: seen.append(plain(self, scene)) or seen[-1])
    module = Distiller(
        Pixels(tiny_student()), tiny_teachers("sam"), objectives={"mesa": Mesa}, ema_decay=0.0, warmup_steps=0,
        shift=ShiftOptions(std=2.0, limit=1),
    )  # fmt: skip
    fit(module, quiet_trainer(max_steps=3), size=48)
    assert len(seen) == 3 and all(loss.abs().max() < 1e-9 for loss in seen)
    images = torch.rand(4, 3, 48, 48)
    frames = module.frames(images, Part(0, 0, 32, 32, 4), (1,))
    view, offset = frames.of("mesa")
    assert (
        offset.any()
        and (layer_norm(module.student(frames.student).spatial) - layer_norm(module.student(view).spatial)).abs().max()
        > 0.1
    )


def test_the_anchor_is_taken_at_the_start_and_renewed(tiny_student, tiny_teachers, quiet_trainer, monkeypatch):
    """Gram loss is 0 exactly at steps where the anchor was just taken from an average that is the student."""
    seen = []
    plain = GramAnchor.forward
    monkeypatch.setattr(
        GramAnchor, "forward", lambda self, scene: seen.append((scene.step, plain(self, scene))) or seen[-1][1]
    )
    objectives = {"gram": lambda dims: GramAnchor(dims, start=2, refresh_every=3, weight=10.0)}
    fit(build(tiny_student, tiny_teachers, objectives, ema_decay=0.0), quiet_trainer(max_steps=8))
    assert [step for step, _ in seen] == [2, 3, 4, 5, 6, 7]
    assert [step for step, loss in seen if loss.max() < 1e-10] == [2, 5]


def test_the_average_is_copied_at_the_start(tiny_student, tiny_teachers, quiet_trainer):
    distances = {}

    class Copying(Record):
        def forward(self, scene):
            pairs = zip(scene.student.parameters(), scene.average["student"].parameters(), strict=True)
            distances[scene.step] = max((a - b).abs().max().item() for a, b in pairs)
            return super().forward(scene)

    objectives = {"note": lambda dims: Copying(dims, start=3, copy_average=True)}
    fit(build(tiny_student, tiny_teachers, objectives, ema_decay=0.9), quiet_trainer(max_steps=6))
    assert distances[3] == 0 and min(distances[4], distances[5]) > 0


class SaveAlways(Checkpoint):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_resume_is_bit_equal(tiny_student, tiny_teachers, quiet_trainer, tmp_path):
    """Before an objective's start, at it, at a renewal of the anchor and after: weights, average and anchor."""

    def run(seed, ckpt=None, first=0, **more):
        objectives = {
            "mesa": lambda dims: Mesa(dims, start=2, ramp=2),
            "gram": lambda dims: GramAnchor(dims, start=3, refresh_every=2),
            "note": Record,
        }
        shift = ShiftOptions(std=1.0, limit=1)
        module = build(tiny_student, tiny_teachers, objectives, seed=seed, ema_decay=0.8, shift=shift)
        fit(module, quiet_trainer(max_steps=8, **more), size=48, ckpt=ckpt, first=first)
        state = {**module.state_dict(), **{f"average.{k}": v for k, v in module.ema.average.state_dict().items()}}
        anchor = module.ema.state_dict()["snapshots"]["gram/gram_anchor"]
        return {**state, **{f"anchor.{k}": v for k, v in anchor.items()}}, module

    whole, noted = run(0, callbacks=[SaveAlways(tmp_path)], enable_checkpointing=True)
    for at in (1, 2, 4, 5, 6):
        resumed, module = run(1, ckpt=tmp_path / f"{at}.ckpt", first=at)
        assert module.objectives["note"].steps == list(range(at, 8))
        different = [k for k, v in whole.items() if isinstance(v, torch.Tensor) and not torch.equal(v, resumed[k])]
        assert not different, (at, different[:5])
    other, _ = run(1)
    assert not torch.equal(whole["trained.student.backbone.pos_embed"], other["trained.student.backbone.pos_embed"])


def test_without_teachers(tiny_student, quiet_trainer):
    module = Distiller(tiny_student(), {}, objectives={"note": Record}, warmup_steps=0)
    before = copy.deepcopy(module.trained.state_dict())
    fit(module, quiet_trainer(max_steps=2))
    assert not torch.equal(before["student.backbone.pos_embed"], module.student.backbone.pos_embed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema_decay": None}, "model.ema_decay: null"),
        ({"ema_schedule": "cosine"}, "model.ema_schedule: cosine.*no longer follows.*ema_anneal_anyway: true"),
        ({"objectives": {"sam": Record}}, "model.objectives.sam: also the name of a teacher"),
    ],
)
def test_what_the_distiller_refuses(options, words, tiny_student, tiny_teachers):
    with pytest.raises(UserError, match=words):
        Distiller(tiny_student(), tiny_teachers("sam"), **{"objectives": {"note": Record}, **options})
    told = {"ema_schedule": "cosine", "ema_anneal_anyway": True}
    Distiller(tiny_student(), tiny_teachers("sam"), objectives={"note": Record}, **told)
