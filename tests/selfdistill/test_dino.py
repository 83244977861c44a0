"""DINO, iBOT and KoLeo as an objective: who sees what, what gets a gradient, exact resumes, alarms of a collapse."""

import logging
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, IterableDataset

from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Dims
from agglom.objectives.koleo import koleo
from agglom.selfdistill import Dino, dino
from agglom.students import TimmStudent, masked_patches

SMALL = {"prototypes": 16, "hidden": 32, "bottleneck": 8}


class Numbered(IterableDataset):
    """Batches of images and crops that follow from their number."""

    def __init__(self, count=20, first=0, local=16):
        self.count, self.first, self.local = count, first, local

    def __iter__(self):
        for number in range(self.first, self.count):
            generator = torch.Generator().manual_seed(number)

            def draw(*shape, generator=generator):
                return torch.randint(0, 256, (4, *shape), generator=generator, dtype=torch.uint8)

            crops = {"global": draw(2, 3, 32, 32), "local": draw(3, 3, self.local, self.local)}
            yield {"image": draw(3, 32, 32), "key": list("abcd"), "crops": crops}


def build(tiny_student, seed=0, **options):
    student = tiny_student(seed=seed, kwargs={"dynamic_img_size": True})
    torch.manual_seed(seed)
    return Distiller(
        student, {}, objectives={"dino": partial(Dino, **{**SMALL, **options})}, warmup_steps=0, ema_decay=0.8
    )


def fit(module, trainer, data=None, ckpt=None):
    trainer.fit(module, DataLoader(data or Numbered(), batch_size=None), ckpt_path=ckpt)
    return module


def test_local_crops_never_enter_the_average(tiny_student, quiet_trainer):
    """And the average sees its global crops whole, the student the same ones with masks."""
    seen = {"student": [], "average": []}
    module = build(tiny_student, ibot_weight=1.0)

    class Watch(type(module.ema)):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            for name, model in (("student", pl_module.student), ("average", self.average["student"])):
                model.backbone.blocks[0].register_forward_pre_hook(
                    lambda _, args, name=name: seen[name].append(args[0].detach())
                )

    module.ema = Watch(0.0)
    fit(module, quiet_trainer(max_steps=1))
    assert [x.shape[:2] for x in seen["average"]] == [(8, 17)]  # 2 x 4 images, a token and 16 patches
    assert [x.shape[:2] for x in seen["student"]] == [(8, 17), (12, 5)]  # global, local; nobody asks for the main view
    differs = (seen["student"][0] - seen["average"][0]).abs().amax(2) > 1e-6
    assert not differs[:, 0].any() and differs.any(1).sum() == 4, "half of the images have masked patches"
    assert 0.1 <= differs[differs.any(1)].float().mean() <= 0.5


def test_what_the_average_says_of_visible_patches_does_not_matter(tiny_student, quiet_trainer, monkeypatch):
    """Noise on its map outside of the masks leaves the loss as it was; on one masked patch it does not."""
    masks, losses = [], {}
    plain, draw = Dino.forward, dino.block_masks
    monkeypatch.setattr(dino, "block_masks", lambda *a, **k: masks.append(draw(*a, **k)) or masks[-1])

    def forward(self, scene):
        loss = plain(self, scene)
        losses[case] = loss.detach()
        return loss

    monkeypatch.setattr(Dino, "forward", forward)
    for case in ("plain", "visible", "masked"):
        module = build(tiny_student, dino_weight=0.0, ibot_weight=1.0)

        class Noisy(type(module.ema)):
            def on_train_start(self, trainer, pl_module, case=case):
                super().on_train_start(trainer, pl_module)
                if case == "plain":
                    return
                chosen = masks[0].unsqueeze(1)  # (V * B, 1, H, W), the same in every run
                noise = 100 * torch.randn(8, 32, 4, 4)

                def disturb(_, args, out):
                    return out._replace(spatial=torch.where(chosen == (case == "masked"), noise, out.spatial))

                self.average["student"].register_forward_hook(disturb)

        module.ema = Noisy(0.8)
        fit(module, quiet_trainer(max_steps=1))
    assert 0 < masks[0].sum() < masks[0].numel() and all(torch.equal(mask, masks[0]) for mask in masks)
    assert torch.equal(losses["visible"], losses["plain"]) and not torch.allclose(losses["masked"], losses["plain"])


@pytest.mark.parametrize(("options", "running"), [({"start": 2}, [2, 3]), ({"weight": 0.0}, []), ({"stop": 1}, [0])])
def test_only_where_it_has_a_weight_anything_runs(options, running, tiny_student, quiet_trainer):
    """Counted: forward passes of the average, further ones of the student, and those of the heads of both."""
    module, calls = build(tiny_student, ibot_weight=1.0, **options), []
    module.trained["extra"] = torch.nn.Linear(1, 1)
    module.balance.penalty = lambda: module.trained["extra"](torch.ones(1)).sum()  # something to learn otherwise

    class Count(type(module.ema)):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            watched = {"student": pl_module.student, "average": self.average["student"]}
            for name, parent in (("head", pl_module.objectives), ("average's head", self.average["objectives"])):
                watched |= {f"{name} {kind}": head for kind, head in parent["dino"].heads.items()}
            for name, one in watched.items():
                one.register_forward_hook(lambda *_, name=name: calls.append((trainer.global_step, name)))

    module.ema = Count(0.8)
    fit(module, quiet_trainer(max_steps=4))
    heads = [f"{name} {kind}" for name in ("average's head", "head") for kind in ("dino", "ibot")]
    for step in range(4):
        # the student sees global and local crops; without teachers nobody asks for its main view
        expected = ["average", "student", "student", *heads] if step in running else []
        assert sorted(name for at, name in calls if at == step) == sorted(expected), step


def test_masked_patches_see_the_token_and_nothing_else_changes(tiny_student):
    student = tiny_student().eval()
    images, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 0] = True
    token = torch.randn(1, 1, 32, requires_grad=True)
    inputs = []
    student.backbone.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    plain = student(images)
    with masked_patches(student, mask, token):
        hidden = student(images)
    assert torch.equal(student(images).spatial, plain.spatial), "it lasts as long as the context"
    before, during, _ = (x[:, 1:] - student.backbone.pos_embed[:, 1:] for x in inputs)
    flat = mask.flatten(1)
    torch.testing.assert_close(during[flat], token[0].expand(2, -1))
    assert torch.equal(during[~flat], before[~flat])
    assert torch.equal(hidden.spatial[1], plain.spatial[1]) and not torch.equal(hidden.spatial[0], plain.spatial[0])
    hidden.spatial.sum().backward()
    assert token.grad.abs().sum() > 0


def test_masks_on_a_cnn_are_refused():
    student = TimmStudent(name="resnet10t")
    with (
        pytest.raises(UserError, match="ResNet has no patches to mask; valid: a ViT"),
        masked_patches(student, None, None),
    ):
        pass


def test_terms_add_up_by_their_weights(tiny_student, quiet_trainer, monkeypatch):
    """The total is the weighted sum of the terms that are logged, and KoLeo's that of the summaries themselves."""
    seen = []
    plain = Dino.forward

    def forward(self, scene):
        loss = plain(self, scene)
        seen.append((loss, self.diagnosis(), scene))
        return loss

    monkeypatch.setattr(Dino, "forward", forward)
    weights = {"dino": 1.0, "ibot": 0.25, "koleo": 0.1}
    fit(build(tiny_student, **{f"{k}_weight": v for k, v in weights.items()}), quiet_trainer(max_steps=2))
    for loss, values, _ in seen:
        assert loss.shape == (4,)
        torch.testing.assert_close(loss.mean(), sum(w * values[f"{k}_loss"] for k, w in weights.items()))
        assert values["dino_loss"] >= values["dino_mean_entropy"] - 1e-4, "a cross entropy is no less than the entropy"
        assert values["dino_entropy_of_mean"] == pytest.approx(math.log(16), rel=1e-3)  # Sinkhorn's even prototypes
    seen.clear()
    fit(build(tiny_student, dino_weight=0.0, koleo_weight=2.0), quiet_trainer(max_steps=1))
    ((loss, values, scene),) = seen
    module = build(tiny_student)
    crops = scene.batch["crops"]["global"]
    expected = torch.stack([koleo(module.student(crops[:, v]).summary[:, 0]) for v in range(2)]).mean(0)
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-4, atol=1e-5)
    assert set(values) == {"koleo_loss", "feature_std"} and not seen[0][2].own.heads


def test_frozen_prototypes_and_temperatures(tiny_student, quiet_trainer):
    objective = Dino(Dims(32, 32), **SMALL, first_temperature=0.04, teacher_temperature=0.07, temperature_steps=3)
    assert [objective._temperature(k) for k in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    module = build(tiny_student, freeze_last_steps=2)
    head = module.objectives["dino"].heads["dino"]
    prototypes, first = head.directions.detach().clone(), head.mlp[0].weight.detach().clone()
    fit(module, quiet_trainer(max_steps=2))
    assert torch.equal(head.directions, prototypes) and not torch.equal(head.mlp[0].weight, first)
    fit(build(tiny_student, freeze_last_steps=2), trainer := quiet_trainer(max_steps=3))
    assert not torch.equal(trainer.lightning_module.objectives["dino"].heads["dino"].directions, prototypes)


def test_the_averages_own_head_gives_the_targets(tiny_student, quiet_trainer):
    """With the average's head broken to NaN the loss is NaN; the trained head alone could not tell."""
    module = build(tiny_student)

    class Broken(type(module.ema)):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.average["objectives"]["dino"].heads["dino"].directions.data.fill_(float("nan"))

    module.ema = Broken(1.0, warmup=False)
    with pytest.raises(UserError, match="step 0 is left out.*not finite: the loss of dino; images"):
        fit(module, quiet_trainer(max_steps=2, log_every_n_steps=1))


class SaveAlways(Checkpoint):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("assign", ["sinkhorn", "center"])
def test_resume_is_bit_equal(assign, tiny_student, quiet_trainer, tmp_path):
    """With a start in the middle, masks drawn by step, moving temperature, centres and prototypes thawing."""

    def run(seed, first=0, ckpt=None, **more):
        module = build(
            tiny_student, seed, assign=assign, ibot_weight=0.5, koleo_weight=0.1, start=2, temperature_steps=3,
            freeze_last_steps=1, copy_average=True,
        )  # fmt: skip
        module.trained["extra"] = torch.nn.Linear(1, 1)
        module.balance.penalty = lambda: module.trained["extra"](torch.ones(1)).sum()  # something to learn before
        fit(module, quiet_trainer(max_steps=7, **more), Numbered(first=first), ckpt)
        return {**module.state_dict(), **{f"average.{k}": v for k, v in module.ema.average.state_dict().items()}}

    whole = run(0, callbacks=[SaveAlways(tmp_path)], enable_checkpointing=True)
    for at in (1, 2, 3, 5):
        resumed = run(1, at, tmp_path / f"{at}.ckpt")
        different = [k for k, v in whole.items() if isinstance(v, torch.Tensor) and not torch.equal(v, resumed[k])]
        assert not different, (at, different[:5])


def test_a_collapse_is_told_with_its_step(tiny_student, quiet_trainer, caplog, monkeypatch):
    """An average that says the same of all images: assignments tell nothing, and that is an alarm; not in the grace."""
    monkeypatch.setattr(Dino, "grace", 1)
    module = build(tiny_student, dino_weight=1.0)

    class Constant(type(module.ema)):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            norm = self.average["student"].backbone.norm
            norm.weight.data.zero_(), norm.bias.data.fill_(1.0)

    module.ema = Constant(1.0, warmup=False)
    with caplog.at_level(logging.WARNING, "agglom.fit"):
        fit(module, quiet_trainer(max_steps=4, log_every_n_steps=2))
    lines = [record.getMessage() for record in caplog.records if "collapse" in record.getMessage()]
    assert lines[0].startswith("step 1: model.objectives.dino: collapse: dino assignments tell 0.0000 nats")
    assert any(line.startswith("step 3") for line in lines)
    caplog.clear()
    monkeypatch.setattr(Dino, "grace", 4)
    with caplog.at_level(logging.WARNING, "agglom.fit"):
        fit(module, quiet_trainer(max_steps=4, log_every_n_steps=2))
    assert not [record for record in caplog.records if "collapse" in record.getMessage()]
    objective = Dino(Dims(32, 32), **SMALL)
    healthy = {"dino_entropy_of_mean": 2.0, "dino_mean_entropy": 0.5, "feature_std": 0.5}
    assert objective.alarms(healthy, 4) == []
    assert "feature_std 0.0010" in objective.alarms({**healthy, "feature_std": 0.001}, 4)[0]
    assert "tell 0.0010 nats" in objective.alarms({**healthy, "dino_mean_entropy": 1.999}, 4)[0]


def test_crops_that_never_came(tiny_student, quiet_trainer):
    class Without(Numbered):
        def __iter__(self):
            yield from ({k: v for k, v in batch.items() if k != "crops"} for batch in super().__iter__())

    with pytest.raises(UserError, match="data.crops: no crops at step 0"):
        fit(build(tiny_student), quiet_trainer(max_steps=1), Without())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dino_weight": 0.0}, "dino_weight: 0"),
        ({"ibot_weight": -1.0}, "ibot_weight: -1.0"),
        ({"student_temperature": 0.0}, "student_temperature: 0.0; valid: > 0"),
        ({"token": 1}, "token: 1; valid: 0 to 0"),
        ({"mask_ratio": (0.5, 0.1)}, "mask_ratio"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words) as err:
        Dino(Dims(32, 32), **{**SMALL, **options})
    assert "\n" not in str(err.value)


def test_students_logits_reach_the_trunk(tiny_student, quiet_trainer):
    module = build(tiny_student, ibot_weight=1.0)
    before = {k: v.clone() for k, v in module.trained.named_parameters()}
    fit(module, quiet_trainer(max_steps=1))
    still = [k for k, v in module.trained.named_parameters() if torch.equal(v, before[k])]
    assert not still, still
    assert F.normalize(module.objectives["dino"].heads["ibot"].weight, dim=1).shape == (16, 8)
