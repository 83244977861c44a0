"""Trains every case of CASES for two steps in 1, 2 and 4 processes with gloo: `ranks.py OUT`.

The images of a step are the same for every number of processes; each sees its part. What is drawn at random per image
(teachers, masks) is drawn for the whole step, and each rank takes its part of that too.
"""

import os
import socket
import sys
import traceback
import warnings
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import agglom.selfdistill.dino
from agglom.adaptors import (
    AttentionAdaptor,
    ConvAdaptor,
    LadderAdaptor,
    LinearAdaptor,
    MLPAdaptor,
    OrthogonalAdaptor,
)
from agglom.balance import AdaLoss, Equal, Manual, RandomK, TeacherDropping, Uncertainty
from agglom.distiller import Distiller
from agglom.heads import TeacherConfig
from agglom.objectives import AngleBalanced
from agglom.selfdistill import Dino, Dmae, GramAnchor, ImageText, Mesa
from agglom.students import TimmStudent
from agglom.targets import PHIS, Identity, Standardize, Whiten
from agglom.teachers import TimmTeacher, TinyTeacher

WORLDS, STEPS, IMAGES = (1, 2, 4), 2, 8
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TEXTS = ["a red bag", "a blue coat", "a red bag", "", "a pink shirt", "the red bag", "a bag", "a coat"]
RANDOM_TEACHER = partial(TinyTeacher, pretrained=False)
DINO = {"prototypes": 16, "hidden": 32, "bottleneck": 8}


class AsOne:
    """Draws for the images of all ranks, and takes those of this one."""

    def uniform(self, shape, device):
        teachers, images = shape
        drawn = torch.rand(teachers, IMAGES, generator=torch.Generator().manual_seed(self._draws))
        self._draws += 1
        return drawn[:, part(IMAGES)]


class Dropping(AsOne, TeacherDropping): ...


class DroppingHere(TeacherDropping):
    """Of the first half of the images all teachers but one are dropped, of the others none: so the first ranks differ
    from the last ones."""

    def uniform(self, shape, device):
        drawn = (torch.arange(IMAGES) >= IMAGES // 2).float()
        return drawn.expand(shape[0], IMAGES)[:, part(IMAGES)]


class OfK(AsOne, RandomK): ...


class VisibleAsOne(Dmae):
    def _visible(self, count, patches, key):
        return super()._visible(IMAGES, patches, key[:1])[part(IMAGES)]


def part(number):
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    return slice(rank * number // world, (rank + 1) * number // world)


def masks(number, grid, *, generator, share, ratio, plain=agglom.selfdistill.dino.block_masks):
    """Of both views of all images, a view at a time."""
    views = number // len(range(*part(IMAGES).indices(IMAGES)))
    drawn = plain(views * IMAGES, grid, generator=torch.Generator().manual_seed(0), share=share, ratio=ratio)
    return drawn.unflatten(0, (views, IMAGES))[:, part(IMAGES)].flatten(0, 1)


CASES = {
    **{
        adaptor.__name__: {"adaptor": adaptor}
        for adaptor in (
            MLPAdaptor,
            LadderAdaptor,
            LinearAdaptor,
            AttentionAdaptor,
            partial(ConvAdaptor, upsample=2),
            OrthogonalAdaptor,
        )
        for adaptor in [getattr(adaptor, "func", adaptor)]
    },
    "Equal": {"balance": Equal},
    "Manual": {"balance": partial(Manual, weights=[0.5, 2.0])},
    "AdaLoss": {"balance": AdaLoss},
    "Uncertainty": {"balance": partial(Uncertainty, teachers=2)},
    "TeacherDropping": {"balance": partial(Dropping, p=0.7)},
    "TeacherDropping here": {"balance": partial(DroppingHere, p=0.5)},
    "RandomK": {"balance": partial(OfK, k=1, per="image")},
    "Identity": {"normalizer": Identity},
    "Standardize running": {"normalizer": partial(Standardize, schedule="running")},
    "Standardize frozen": {"normalizer": partial(Standardize, schedule="frozen", warmup_steps=1)},
    "PHIS": {"normalizer": PHIS, "summary_normalizer": Standardize},
    "Whiten": {"normalizer": Whiten, "summary_normalizer": Standardize},
    "AngleBalanced": {"summary_loss": AngleBalanced, "summary_normalizer": Identity},
    "Dino sinkhorn": {"objectives": {"x": partial(Dino, **DINO)}},
    "Dino center": {"objectives": {"x": partial(Dino, assign="center", **DINO)}},
    "Dino ibot": {"objectives": {"x": partial(Dino, ibot_weight=1.0, mask_share=1.0, **DINO)}},
    "Mesa": {"objectives": {"x": Mesa}},
    "GramAnchor": {"objectives": {"x": partial(GramAnchor, refresh_every=1)}},
    "ImageText": {"objectives": {"x": lambda dims: ImageText(dims, text=RANDOM_TEACHER("clip"), trainable=True)}},
    "Dmae": {
        "objectives": {
            "x": lambda dims: VisibleAsOne(
                dims,
                encoder=TimmTeacher(name="vit_tiny_patch16_224", pretrained=False, kwargs=VIT, input_size=32),
            )
        }
    },
}
CASES |= {
    "FSDP2": {"ema_decay": None},
    "FSDP2 adamw": {"ema_decay": None, "adaptor": LadderAdaptor, "optimizer": "adamw", "lr": 1e-4},
}
UNUSED = {"Dmae"}  # blocks past the one that is read get no gradient


class Steps(pl.LightningDataModule):
    def train_dataloader(self):
        steps = []
        for number in range(STEPS):
            generator = torch.Generator().manual_seed(number)
            pixels = torch.rand(IMAGES, 3, 32, 32, generator=generator)
            crops = {kind: torch.rand(IMAGES, 2, 3, 32, 32, generator=generator) for kind in ("global", "local")}
            here = part(IMAGES)
            steps.append(
                {
                    "image": pixels[here],
                    "key": TEXTS[here],
                    "txt": TEXTS[here],
                    "crops": {kind: x[here] for kind, x in crops.items()},
                }
            )
        return DataLoader(steps, batch_size=None)


def trainer_of(world, strategy, out):
    return pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=STEPS, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        use_distributed_sampler=False, default_root_dir=out,
    )  # fmt: skip


def sharded(module, world, out, name):
    """Through Lightning's strategy for FSDP2, which shards in `configure_model`."""
    trainer = trainer_of(world, ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), out)
    trainer.fit(module, datamodule=Steps())
    weights = [p for p in module.trained.parameters() if isinstance(p, DTensor)]
    assert weights and any(p.to_local().numel() < p.numel() for p in weights)
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.trained.state_dict().items()}
    saved = {"trained": {k: v for k, v in whole.items() if torch.is_tensor(v)}, "balance": {}, "kept": None}
    torch.save(saved, f"{out}/{name}-{world}-{trainer.global_rank}.pt")


def train(name, world, out):
    case = dict(CASES[name])
    pl.seed_everything(0, verbose=False)
    student = TimmStudent(name="vit_tiny_patch16_224", kwargs=VIT)
    teachers = {name: TeacherConfig(RANDOM_TEACHER(name)) for name in ("clip", "sam")}
    if balance := case.pop("balance", None):
        case["balance"] = balance()
    # SGD: Adam's first steps are signs, which turn rounding of a gradient near 0 into a whole step.
    options = {"optimizer": "sgd", "lr": 0.1, "ema_decay": 0.5, **case}
    module = Distiller(student, teachers, warmup_steps=0, schedule="constant", **options)
    if name.startswith("FSDP2") and world > 1:
        sharded(module, world, out, name)
        return
    strategy = "ddp_find_unused_parameters_true" if name in UNUSED else "ddp"
    trainer = trainer_of(world, strategy if world > 1 else "auto", out)
    trainer.fit(module, datamodule=Steps())
    states = {"trained": module.trained, "balance": module.balance}
    if module.ema is not None:
        states["average"] = module.ema.average
    saved = {kind: {k: v for k, v in x.state_dict().items() if torch.is_tensor(v)} for kind, x in states.items()}
    saved["kept"] = module.balance.kept_share()  # of this rank's images, in the last step
    torch.save(saved, f"{out}/{name}-{world}-{trainer.global_rank}.pt")


def run(world, rank, port, out):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    os.environ |= {key: str(value) for key, value in ranks.items()}
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    agglom.selfdistill.dino.block_masks = masks
    warnings.simplefilter("ignore")
    for name in CASES:
        train(name, world, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    run(world, rank, port, sys.argv[1])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        for child in children:
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                for other in children:
                    try:
                        os.kill(other, 9)
                    except ProcessLookupError:
                        pass
                sys.exit(1)
