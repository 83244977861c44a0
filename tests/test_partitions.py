"""Partitions: two gloo ranks, and one process alternating micro-batches, both have the gradient of the whole."""

import subprocess
import sys

import pytest
import torch

from agglom.balance import Manual, Uncertainty
from agglom.distiller import Distiller
from agglom.plan import Partition, Plan, Stage, slot

STAGES = [
    Stage(
        partitions=[
            Partition(teachers=["clip", "dino"], resolutions=[32], batch_size=4),
            Partition(teachers=["sam", "clip"], resolutions=[16], batch_size=2),
        ]
    )
]
SCRIPT = '''
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from agglom.balance import AdaLoss
from agglom.distiller import Distiller
from agglom.heads import TeacherConfig
from agglom.objectives import AngleBalanced
from agglom.plan import Partition, Plan, Stage, slot
from agglom.students import TimmStudent
from agglom.targets import PHIS, Standardize
from agglom.teachers import TinyTeacher

ranks, micros, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
STAGES = [Stage(partitions=[
    Partition(teachers=["clip", "dino"], resolutions=[32], batch_size=4),
    Partition(teachers=["sam", "clip"], resolutions=[16], batch_size=2),
])]


class Data(pl.LightningDataModule):
    """The same images for a slot of a step, whichever rank and micro-batch it is."""

    def train_dataloader(self):
        plan, rank = Plan(STAGES, size=32), self.trainer.global_rank
        def batch(number):
            step, micro = divmod(number, micros)
            place = slot(micro, rank, ranks)
            part = plan.part(step, place)
            generator = torch.Generator().manual_seed(100 * step + place)
            pixels = torch.rand(part.batch_size, 3, part.size, part.size, generator=generator)
            return {"image": pixels, "key": ["x"] * part.batch_size, "part": part}
        return DataLoader([batch(number) for number in range(4 * micros)], batch_size=None)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    student = TimmStudent(name="vit_tiny_patch16_224", summary_tokens=2, kwargs={
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True})
    teachers = {name: TeacherConfig(TinyTeacher(name, pretrained=False)) for name in ("clip", "dino", "sam")}
    teachers["sam"].normalizer = PHIS
    teachers["clip"].normalizer = lambda dim: Standardize(dim, schedule="frozen", warmup_steps=1)
    # clip is seen by both partitions: by one process one after the other, by two ranks at once. Its statistics would
    # learn differently and are fixed. sam and dino are seen by one rank each, and the other must learn theirs too.
    module = Distiller(student, teachers, optimizer="sgd", lr=0.1, warmup_steps=0, schedule="constant", ema_decay=None,
        stages=STAGES, normalizer=Standardize, summary_loss=AngleBalanced)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    module.heads["clip"].targets(module.encoders["clip"](images))
    module.heads["clip"].losses["summary"].freeze_after = 1
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp_find_unused_parameters_true" if ranks > 1 else "auto",
        max_steps=3, max_epochs=-1, accumulate_grad_batches=micros, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Data())
    torch.save(module.state_dict(), f"{out}/{ranks}x{micros}-{trainer.global_rank}.pt")
'''


@pytest.mark.slow
def test_two_ranks_and_alternating_micro_batches_train_the_same_weights(tmp_path, one_thread):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for ranks, micros in ((1, 4), (2, 2)):
        done = subprocess.run(
            [sys.executable, str(script), str(ranks), str(micros), str(tmp_path)],
            env=one_thread, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]

    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1x4-0", "2x2-0", "2x2-1")
    )
    for key, expected in one.items():
        if isinstance(expected, torch.Tensor) and not key.startswith("trained.heads.clip.losses.summary.steps"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=f"ranks: {key}")
            torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert one["trained.heads.sam.normalizers.spatial.count"] == 3 * 2 * 2 * 64  # steps x slots x images x cells
    assert first["trained.heads.dino.normalizers.spatial.steps"] == 3 * 2


def gradient(module, batches):
    """Gradient of a step whose micro-batches are these, as the trainer accumulates it."""
    module.zero_grad()
    for index, batch in enumerate(batches):
        (module.step(batch, "train", index) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("balance", ["equal", "manual", "uncertainty"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_step_has_the_gradient_of_all_its_images_seen_at_once(
    balance, rounds, tiny_student, tiny_teachers, monkeypatch
):
    """Written out: the weighted sum over teachers of the mean loss over all the images that a teacher saw."""
    torch.manual_seed(0)
    factors = {"equal": [1 / 3] * 3, "manual": [1.0, 3.0, 0.5], "uncertainty": [0.5] * 3}[balance]
    made = {"equal": None, "manual": Manual(weights=factors), "uncertainty": Uncertainty(teachers=3)}[balance]
    student = tiny_student(summary_tokens=2, kwargs={"dynamic_img_size": True})
    module = Distiller(student, tiny_teachers(), stages=STAGES, balance=made).train()
    monkeypatch.setattr(module, "_log", lambda *_: None)
    for name, head in module.heads.items():  # settled statistics, as the order of the parts would show in moving ones
        head.targets(module.encoders[name](torch.rand(8, 3, 32, 32)))
        head.normalizers.eval()

        for normalizer in head.normalizers.values():
            normalizer.update = lambda *_: None
    micros = 2 * rounds
    module._trainer = type(
        "Trainer", (), {"accumulate_grad_batches": micros, "world_size": 1, "global_step": 0, "global_rank": 0}
    )()
    plan = Plan(STAGES, size=32)
    batches = []
    for micro in range(micros):
        part = plan.part(0, slot(micro, 0, 1))
        pixels = torch.rand(part.batch_size, 3, part.size, part.size)
        batches.append({"image": pixels, "key": ["x"] * part.batch_size, "part": part})
    got = gradient(module, batches)

    module.zero_grad()
    losses: dict[str, list] = {"clip": [], "dino": [], "sam": []}
    for batch in batches:
        features = module.student(batch["image"])
        for name in STAGES[0].partitions[batch["part"].partition].teachers:
            head = module.heads[name]
            target = head.targets(module.encoders[name](batch["image"]))
            losses[name].append(head.combine(head(features, target)))
    total = sum(f * torch.cat(losses[name]).mean() for f, name in zip(factors, losses, strict=True))
    total.backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    expected = {n: g for n, g in expected.items() if not n.startswith("balance")}
    assert {n for n in got if not n.startswith("balance")} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_sam_partition_gives_nothing_to_dino(tiny_student, tiny_teachers, monkeypatch):
    student = tiny_student(summary_tokens=2, kwargs={"dynamic_img_size": True})
    module = Distiller(student, tiny_teachers(), stages=STAGES).train()
    monkeypatch.setattr(module, "_log", lambda *_: None)
    module._trainer = type(
        "Trainer", (), {"accumulate_grad_batches": 2, "world_size": 1, "global_step": 0, "global_rank": 0}
    )()
    part = Plan(STAGES, size=32).part(0, 1)
    batch = {"image": torch.rand(2, 3, 16, 16), "key": ["x"] * 2, "part": part}
    module.step(batch, "train", 1).backward()
    assert all(p.grad is None for p in module.heads["dino"].parameters())
    assert module.heads["dino"].normalizers["spatial"].taken == 0
    assert any(p.grad is not None for p in module.heads["sam"].parameters())
