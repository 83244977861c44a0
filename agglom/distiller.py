"""The training module: composes student, teachers, heads and balance, and logs. It has no maths of its own."""

from __future__ import annotations

from functools import partial
from typing import Any, Sequence, cast

import lightning.pytorch as pl
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from agglom.adaptors import MLPAdaptor
from agglom.balance import Balance, Equal
from agglom.callbacks.ema import WeightEMA
from agglom.errors import UserError, nearest
from agglom.features import Features, StudentFeatures
from agglom.heads import AdaptorFactory, Head, LossFactory, NormalizerFactory, TeacherConfig
from agglom.objectives import Cosine, CosineSmoothL1
from agglom.schedules import Schedule, multiplier
from agglom.students import Student, attend_plainly
from agglom.targets import Memory, Standardize
from agglom.teachers import Teacher


class Distiller(pl.LightningModule):
    """Distils several frozen teachers into one student.

    A step: every teacher sees the batch (own resize, own mean and std, no gradient), its features are normalised; the
    student sees the same batch once; each teacher's adaptor predicts its targets at the student's grid and aligns the
    prediction to the teacher's grid; losses are per image; the balance weights them per teacher and image.

    Args:
        student: the backbone to train.
        teachers: name -> teacher. Names are used in logs, reports and exports.
        adaptor: adaptor of teachers that name none.
        normalizer: normaliser of the targets of teachers that name none.
        summary_loss: summary loss of teachers that name none.
        spatial_loss: spatial loss of teachers that name none.
        balance: how the per-image losses of the teachers become one loss; left out: all equal.
        optimizer: a name known to `timm.optim`, such as adamw or lamb.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms, prefix tokens and position embeddings.
        betas: of the optimiser, where it has them.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: after the warm-up.
        final_lr: learning rate at the last step as a share of the peak (cosine).
        ema_decay: of the averaged weights that are validated and exported; null for none.
        remember_teachers: run each teacher once an image and keep its features in RAM (see `agglom.targets.Memory`);
            only for training without random crops and flips.

    Raises:
        UserError: a loss on something that a teacher doesn't give, too few summary tokens, an unknown optimiser.
    """

    def __init__(
        self,
        student: Student,
        teachers: dict[str, TeacherConfig],
        adaptor: AdaptorFactory = MLPAdaptor,
        normalizer: NormalizerFactory = Standardize,
        summary_loss: LossFactory = Cosine,
        spatial_loss: LossFactory = CosineSmoothL1,
        balance: Balance | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 100,
        schedule: Schedule = "cosine",
        final_lr: float = 0.01,
        ema_decay: float | None = 0.999,
        remember_teachers: bool = False,
    ) -> None:
        super().__init__()
        if not teachers:
            raise UserError("model.teachers: empty; name at least one teacher")
        known = [str(name) for name in list_optimizers()]
        if optimizer not in known:
            raise UserError(f"model.optimizer: {optimizer!r}; {nearest(optimizer, known)}; take one")
        self.names = list(teachers)
        self.encoders = nn.ModuleDict({name: config.encoder for name, config in teachers.items()})
        heads = nn.ModuleDict()
        tokens = summary_tokens(student, teachers)
        for name, config in teachers.items():
            heads[name] = Head(
                student=student.dims,
                teacher=config.encoder.dims,
                token=tokens[name],
                tap_names=student.tap_names,
                weights=teacher_weights(name, config),
                adaptor=config.adaptor or adaptor,
                normalizer=config.normalizer or normalizer,
                losses={
                    "summary": config.summary_loss or summary_loss,
                    "spatial": config.spatial_loss or spatial_loss,
                },
            )
        # One module for everything that is trained: what the optimiser, the EMA and the export look at.
        self.trained = nn.ModuleDict({"student": student, "heads": heads})
        self.balance = balance if balance is not None else Equal()
        wanted = {tap for head in heads.values() for tap in head.adaptor.taps}
        self.taps = tuple(tap for tap in student.tap_names if tap in wanted)
        self.optimizer, self.lr, self.weight_decay, self.betas = optimizer, lr, weight_decay, betas
        self.warmup_steps, self.schedule, self.final_lr = warmup_steps, schedule, final_lr
        self.ema_decay = ema_decay
        self.memories = {name: Memory() for name in self.names} if remember_teachers else {}

    @property
    def student(self) -> Student:
        return cast(Student, self.trained["student"])

    @property
    def heads(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.trained["heads"])

    def targets(self, images: Tensor, keys: Sequence[str] = ()) -> dict[str, Features]:
        """images (B, 3, H, W) in [0, 1] -> each teacher's normalised features, without gradient.

        `keys` identify the images where teachers are remembered; validation images must have others than training's.
        """

        def raw(name: str) -> Features:
            encoder = cast(Teacher, self.encoders[name])
            return self.memories[name].features(encoder, images, keys) if self.memories else encoder(images)

        return {name: self.heads[name].targets(raw(name)) for name in self.names}

    def losses(self, student: StudentFeatures, targets: dict[str, Features]) -> dict[str, dict[str, Tensor]]:
        """Per teacher and kind, (B,) each."""
        return {name: self.heads[name](student, targets[name]) for name in self.names}

    def step(self, batch: dict[str, Any], stage: str) -> Tensor:
        """One forward pass; logs under `stage/` and returns the scalar loss."""
        images = batch["image"]
        targets = self.targets(images, [f"{stage}/{key}" for key in batch["key"]] if self.memories else ())
        losses = self.losses(self.student(images, self.taps), targets)
        per_image = torch.stack([self.heads[name].combine(losses[name]) for name in self.names])  # (T, B)
        weights = self.balance(per_image, torch.ones_like(per_image, dtype=torch.bool))
        loss = (weights * per_image).sum(0).mean() + self.balance.penalty()
        self._log(stage, loss, losses, per_image, weights, targets)
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.step(batch, "val")

    @torch.no_grad()
    def _log(
        self,
        stage: str,
        loss: Tensor,
        losses: dict[str, dict[str, Tensor]],
        per_image: Tensor,
        weights: Tensor,
        targets: dict[str, Features],
    ) -> None:
        """Queue the metrics; nothing here waits for the device."""
        training = stage == "train"
        if training and (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
            return  # Lightning would drop them
        metrics = {f"{stage}/loss": loss.detach()}
        shares = weights.mean(1)
        for index, name in enumerate(self.names):
            metrics[f"{stage}/{name}/loss"] = per_image[index].mean()
            for kind, value in losses[name].items():
                metrics[f"{stage}/{name}/{kind}_loss"] = value.detach().mean()
            if training:
                metrics[f"train/{name}/weight"] = shares[index]
                for kind in losses[name]:
                    target = getattr(targets[name], kind)
                    metrics[f"train/{name}/{kind}_target_std"] = target.std()
        self.log_dict(
            metrics, on_step=training, on_epoch=not training, sync_dist=not training, batch_size=len(per_image[0])
        )

    def configure_optimizers(self) -> Any:
        groups = self._parameter_groups()
        betas: dict[str, Any] = {"betas": self.betas} if get_optimizer_info(self.optimizer).has_betas else {}
        optimizer = create_optimizer_v2(groups, opt=self.optimizer, lr=self.lr, weight_decay=0.0, **betas)
        rate = partial(
            multiplier,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            total_steps=int(self.trainer.estimated_stepping_batches),
            final=self.final_lr,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Two groups: with and without weight decay (one-dimensional, and what student and adaptors exempt)."""
        exempt = {f"student.{name}" for name in self.student.no_weight_decay()}
        for teacher, head in self.heads.items():
            names: set[str] = getattr(head.adaptor, "no_weight_decay", set)()
            exempt |= {f"heads.{teacher}.adaptor.{name}" for name in names}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in [*self.trained.named_parameters(), *self.balance.named_parameters()]:
            if parameter.requires_grad:
                (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]

    def configure_callbacks(self) -> list[pl.Callback]:
        return [] if self.ema_decay is None else [WeightEMA(self.ema_decay)]

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            attend_plainly(self)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Pixels travel as uint8 and become floats in [0, 1] on the device."""
        if batch["image"].dtype == torch.uint8:
            batch["image"] = batch["image"].float().div_(255)
        return batch


def teacher_weights(name: str, config: TeacherConfig) -> dict[str, float]:
    weights = {}
    for kind in ("summary", "spatial"):
        given, has = getattr(config, f"{kind}_weight"), getattr(config.encoder.dims, kind) is not None
        if given and not has:
            raise UserError(
                f"model.teachers.{name}.{kind}_weight: {given}, but {type(config.encoder).__name__} gives no {kind}; "
                f"valid: 0; remove the key"
            )
        if given is not None and given < 0:
            raise UserError(f"model.teachers.{name}.{kind}_weight: {given}; valid: >= 0")
        weights[kind] = float(has) if given is None else given
    if not any(weights.values()):
        raise UserError(f"model.teachers.{name}: both weights are 0; raise one or remove the teacher")
    return weights


def summary_tokens(student: Student, teachers: dict[str, TeacherConfig]) -> dict[str, int]:
    """Which summary token is whose: all share one, or each teacher with a summary loss has its own, in order."""
    readers = [name for name, config in teachers.items() if teacher_weights(name, config)["summary"] > 0]
    if student.dims.tokens not in (1, max(1, len(readers))):
        raise UserError(
            f"model.student.init_args.summary_tokens: {student.dims.tokens}; valid: 1 (shared) or {len(readers)} "
            f"(one for each teacher with a summary loss: {', '.join(readers)})"
        )
    own = student.dims.tokens > 1
    return {name: readers.index(name) if own and name in readers else 0 for name in teachers}
