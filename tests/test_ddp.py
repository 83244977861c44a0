"""Two gloo ranks on halves of a batch end with the weights of one rank on the whole, uneven validation included."""

import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from agglom.distiller import Distiller
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent
from agglom.teachers import TinyTeacher

ranks, out = int(sys.argv[1]), sys.argv[2]
STEPS, BATCH = 2, 4


class Module(Distiller):
    def on_before_optimizer_step(self, optimizer):
        named = [*self.named_parameters()]
        missing = [name for name, p in named if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing, missing


class Halves(pl.LightningDataModule):
    """Rank r of n sees images r * B / n to (r + 1) * B / n of each step's batch."""

    def train_dataloader(self):
        pixels = torch.rand(STEPS, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        size = BATCH // ranks
        first = self.trainer.global_rank * size
        steps = [{"image": x[first : first + size], "key": [str(i) for i in range(size)]} for x in pixels]
        return DataLoader(steps, batch_size=None)

    def val_dataloader(self):
        """Rank 0 has a batch more than the others, as the end of an evaluation stream may be."""
        pixels = torch.rand(3 if self.trainer.global_rank == 0 else 2, 2, 3, 32, 32)
        return DataLoader([{"image": x, "key": ["a", "b"]} for x in pixels], batch_size=None)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    student = TimmStudent(
        name="vit_tiny_r_s16_p8_224",
        summary_tokens=2,
        kwargs={"img_size": 32, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    teachers = {name: TeacherConfig(TinyTeacher(name, pretrained=False)) for name in ("clip", "dino", "sam")}
    # SGD: Adam's first steps are signs, which turn rounding of a gradient near 0 into a whole step.
    module = Module(student, teachers, optimizer="sgd", lr=0.1, warmup_steps=0, schedule="constant", ema_decay=0.5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=STEPS, max_epochs=-1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, val_check_interval=1, check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=Halves())
    average = trainer.callbacks[-1] if hasattr(trainer.callbacks[-1], "average") else next(
        c for c in trainer.callbacks if hasattr(c, "average"))
    torch.save({"weights": module.state_dict(), "average": average.average.state_dict()},
               f"{out}/{ranks}-{trainer.global_rank}.pt")
'''


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, one_thread):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for ranks in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(ranks), str(tmp_path)],
            env=one_thread, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for part in ("weights", "average"):
        assert one[part].keys() == first[part].keys()
        for key, expected in one[part].items():
            if not isinstance(expected, torch.Tensor):
                continue
            torch.testing.assert_close(first[part][key], second[part][key], rtol=0, atol=0, msg=f"ranks: {key}")
            torch.testing.assert_close(
                first[part][key], expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
