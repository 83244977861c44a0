"""The training module: composes student, teachers, heads and balance, and logs. It has no maths of its own."""

from __future__ import annotations

from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence, cast

import lightning.pytorch as pl
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from agglom.adaptors import MLPAdaptor
from agglom.balance import Balance, Equal
from agglom.callbacks.ema import WeightEMA
from agglom.diagnostics import FiniteWatch, RankMe, gradient_shares
from agglom.errors import UserError, nearest
from agglom.features import Features, StudentFeatures, resize, sides
from agglom.heads import AdaptorFactory, Head, LossFactory, NormalizerFactory, TeacherConfig
from agglom.looking import look
from agglom.objectives import Cosine, CosineSmoothL1
from agglom.parameters import parameter_groups
from agglom.plan import Part, Plan, Stage, slot
from agglom.schedules import Schedule, multiplier
from agglom.shifts import ShiftOptions, crop, draw
from agglom.students import Student, attend_plainly
from agglom.targets import Memory, Standardize
from agglom.targets.moments import Statistics
from agglom.teachers import Teacher


class Views(NamedTuple):
    """What student and teachers see of a batch.

    Attributes:
        student: (B, 3, r, r).
        teachers: name -> (B, 3, s, s).
        shifts: name -> (B, 2) cells of the student's grid from its frame to the teacher's, or None: one frame.
    """

    student: Tensor
    teachers: dict[str, Tensor]
    shifts: dict[str, Tensor | None]


class Distiller(pl.LightningModule):
    """Distils several frozen teachers into one student.

    A step: every teacher sees the batch (own resize, own mean and std, no gradient), its features are normalised; the
    student sees the same batch once; each teacher's adaptor predicts its targets at the student's grid, and the
    prediction is brought into the teacher's frame and grid; losses are per image; the balance weights them per teacher
    and image. Stages and partitions (`agglom.plan`) say which teachers see a batch, and how large.

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
        final_lr: learning rate at the last step as a share of the peak (cosine and wsd).
        decay_fraction: last part of a wsd schedule, in which the learning rate falls.
        layer_decay: the student's learning rate shrinks by this factor from block to block towards the input (BEiT,
            2106.08254); null for one rate. Heads have the full rate.
        stages: spans of steps with their own teachers, sizes, learning rates and freezes (`agglom.plan`); in a YAML
            they stand at the top level, as `stages`.
        shift: show student and teachers crops that are shifted against each other; null for one and the same view.
            Training images then need a margin (`data.margin`).
        gradient_shares_every: steps between two measurements of each teacher's share of the gradient at the student's
            features (a backward pass through the heads); 0 for none.
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
        decay_fraction: float = 0.2,
        layer_decay: float | None = None,
        stages: list[Stage] | None = None,
        shift: ShiftOptions | None = None,
        gradient_shares_every: int = 100,
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
                align=config.align,
            )
        # One module for everything that is trained: what the optimiser, the EMA and the export look at.
        self.trained = nn.ModuleDict({"student": student, "heads": heads})
        self.balance = balance if balance is not None else Equal()
        wanted = {tap for head in heads.values() for tap in head.adaptor.taps}
        self.taps = tuple(tap for tap in student.tap_names if tap in wanted)
        self.optimizer, self.lr, self.weight_decay, self.betas = optimizer, lr, weight_decay, betas
        self.warmup_steps, self.schedule, self.final_lr = warmup_steps, schedule, final_lr
        self.decay_fraction, self.layer_decay = decay_fraction, layer_decay
        self.plan, self.shift, self.gradient_shares_every = Plan(stages or ()), shift, gradient_shares_every
        self.mosaics = {name: config.mosaic for name, config in teachers.items()}
        self.own_data = {name: config.own_data or [] for name, config in teachers.items()}
        self.ema_decay = ema_decay
        self.memories = {name: Memory() for name in self.names} if remember_teachers else {}
        self.ranks = {"summary": RankMe(), "spatial": RankMe()}
        self.watch = FiniteWatch(self.names)

    @property
    def student(self) -> Student:
        return cast(Student, self.trained["student"])

    @property
    def heads(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.trained["heads"])

    def views(self, images: Tensor, part: Part | None, names: Sequence[str], *key: object) -> Views:
        """What student and teachers see of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1]. With shifts they have a margin.
            part: of a training batch; None: the student sees the images as they are.
            names: the teachers that look.
            key: what the shifts follow from, beside the teacher; empty: no shifts, no margin.
        """
        resolution = sides(images) if part is None else (part.resolution, part.resolution)
        if self.shift is None or not key:
            own = resize(images, resolution, self.student.input.interpolation)
            return Views(own, dict.fromkeys(names, images), dict.fromkeys(names))
        stride, limit = self.student.input.stride, self.shift.limit
        size = (images.shape[-2] - 2 * limit * stride, images.shape[-1] - 2 * limit * stride)
        if min(size) < stride or (part is not None and size != resolution):
            raise UserError(
                f"data.margin: images of {sides(images)} pixels; valid: {limit * stride} pixels on each side of the "
                f"student's {resolution} (shift.limit {limit} x its stride {stride}); set data.margin"
            )
        number = len(images)
        shifts = {name: draw(self.shift, number, *key, name) for name in ("", *names)}  # "": the student's own

        def window(name: str) -> Tensor:
            corner = ((shifts[name] + limit) * stride).to(images.device, non_blocking=True)
            return crop(images, corner, size)

        apart = {n: (shifts[n] - shifts[""]).to(images.device, non_blocking=True) for n in names}
        return Views(window(""), {name: window(name) for name in names}, {**apart})

    def targets(self, views: Views, others: Sequence[str] = (), keys: Sequence[str] = ()) -> dict[str, Features]:
        """Each teacher's normalised features of its view, without gradient.

        Args:
            views: of the teachers that look.
            others: teachers that look on another rank in this very step: they take part in the statistics here.
            keys: identify the images where teachers are remembered; validation images must have others than training's.
        """
        resolution = sides(views.student)
        grid = self.student.input.grid(resolution)

        def raw(name: str) -> Features:
            encoder = cast(Teacher, self.encoders[name])
            if name not in views.teachers:
                return nothing(encoder, views.student)
            run: Any = encoder
            if self.memories:  # the views never change, so neither do the features
                run = partial(self.memories[name].features, encoder, keys=keys)
            return look(
                run, encoder.input, views.teachers[name], resolution=resolution, grid=grid, mosaic=self.mosaics[name]
            )

        looked = [name for name in self.names if name in views.teachers or name in others]
        targets = {name: self.heads[name].targets(raw(name)) for name in looked}
        return {name: targets[name] for name in views.teachers}

    def losses(
        self, student: StudentFeatures, targets: dict[str, Features], shifts: dict[str, Tensor | None] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Per teacher and kind, (B,) each."""
        return {name: self.heads[name](student, target, (shifts or {}).get(name)) for name, target in targets.items()}

    def step(self, batch: dict[str, Any], kind: str, batch_idx: int = 0) -> Tensor:
        """One forward pass; logs under `kind/` and returns the scalar loss."""
        images = batch["image"]
        training = kind == "train"
        place = self._place(batch, batch_idx) if training else Place(list(self.names))
        key = (place.step, batch_idx, self.global_rank) if training else ()
        views = self.views(images, batch.get("part") if training else None, place.names, *key)
        keys = [f"{kind}/{key}" for key in batch["key"]] if self.memories else ()
        targets = self.targets(views, place.others, keys)
        with torch.no_grad() if place.frozen else nullcontext():
            student = self.student(views.student, self.taps)
        losses = self.losses(student, targets, views.shifts)
        shape = (len(self.names), len(images))
        rows = {name: self.heads[name].combine(found) for name, found in losses.items()}
        absent = next(iter(rows.values())).detach().new_zeros(len(images))
        per_image = torch.stack([rows.get(name, absent) for name in self.names])  # (T, B)
        valid = torch.tensor([name in rows for name in self.names]).to(images.device, non_blocking=True)[:, None]
        weights = self.balance(per_image, valid.expand(shape), self._own(batch, shape))
        if place.scales is not None:
            weights = weights * torch.tensor(place.scales).to(images.device, non_blocking=True)[:, None]
        if training:
            self.watch.update(per_image, place.step)
        terms = (weights * per_image).mean(1)  # (T,)
        loss = terms.sum() + self.balance.penalty()
        self._log(kind, loss, losses, per_image, weights, targets, terms, student)
        return loss

    def _place(self, batch: dict[str, Any], batch_idx: int) -> Place:
        """Which part of the plan a training batch is, and what follows from it."""
        step = self.global_step
        index = self.plan.stage_at(step)
        part: Part = batch.get("part") or Part(index, 0, 0, 0, len(batch["image"]))
        if part.stage != index:
            raise RuntimeError(f"a batch of stage {part.stage} at step {step}, which belongs to stage {index}")
        stage, names = self.plan.stages[index], self.plan.teachers(index, part.partition, self.names)
        frozen = step - self.plan.starts[index] < stage.freeze_steps
        if self.plan.alone():
            return Place(list(self.names), step=step, frozen=frozen)
        micros, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        scales = self.plan.scales(index, part.partition, micros * ranks, self.names)
        if self.balance.shares:  # an image that some of the stage's teachers see counts for their part of the whole
            share = len(names) / len(self.plan.present(index, self.names))
            scales = [scale * share for scale in scales]
        micro = batch_idx % micros
        parts = {slot(micro, rank, ranks) % len(self.plan.parts[index]) for rank in range(ranks)}
        looking = {name for number in parts for name in self.plan.teachers(index, number, self.names)}
        return Place(names, [n for n in self.names if n in looking - {*names}], step, frozen, scales)

    def _own(self, batch: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """(T, B) bool: whether an image comes from a shard of the teacher's own data; None if nobody has any."""
        if not any(self.own_data.values()):
            return None
        rows = [
            [any(fnmatchcase(shard, pattern) for pattern in self.own_data[name]) for shard in batch["shard"]]
            for name in self.names
        ]
        return torch.tensor(rows).view(shape).to(batch["image"].device, non_blocking=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """At a stage's first step its statistics begin anew; while its heads settle, the trunk stands still."""
        step = self.global_step
        index = self.plan.stage_at(step)
        stage, start = self.plan.stages[index], self.plan.starts[index]
        if index and step == start and batch_idx % self.trainer.accumulate_grad_batches == 0 and stage.reset_statistics:
            for head in self.heads.values():
                head.reset()
            if isinstance(self.balance, Statistics):
                self.balance.reset()
        learns = step - start >= stage.freeze_steps
        if self.student.training != learns:
            self.student.train(learns)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "train", batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.step(batch, "val", batch_idx)

    @torch.no_grad()
    def _log(
        self,
        kind: str,
        loss: Tensor,
        losses: dict[str, dict[str, Tensor]],
        per_image: Tensor,
        weights: Tensor,
        targets: dict[str, Features],
        terms: Tensor,
        student: StudentFeatures,
    ) -> None:
        """Queue the metrics; only in a step that is logged the host waits for the device."""
        training, every = kind == "train", self.trainer.log_every_n_steps
        if training and (every == 0 or (self.global_step + 1) % every):
            return  # Lightning would drop them
        if training:
            self.watch.check()
        metrics = {f"{kind}/loss": loss.detach()}
        for name, row in zip(self.names, per_image.detach().mean(1), strict=True):
            if name in losses:
                metrics[f"{kind}/{name}/loss"] = row
                metrics |= {f"{kind}/{name}/{part}_loss": x.detach().mean() for part, x in losses[name].items()}
        if training:
            metrics |= self._diagnosis(weights, targets, terms, student)
        else:
            self.ranks["summary"].update(student.summary.flatten(1))
            self.ranks["spatial"].update(student.spatial.movedim(1, -1))
        self.log_dict(
            metrics, on_step=training, on_epoch=not training, sync_dist=not training, batch_size=per_image.shape[1]
        )

    def _diagnosis(
        self, weights: Tensor, targets: dict[str, Features], terms: Tensor, student: StudentFeatures
    ) -> dict[str, Tensor]:
        """Of each teacher: weight, share of the images kept, scale of the targets, share of the gradient."""
        metrics: dict[str, Tensor] = {}
        kept, shares = self.balance.kept_share(), weights.mean(1)
        often, logged = self.gradient_shares_every, self.trainer.log_every_n_steps
        pulls = None
        if often and (self.global_step + 1) // logged % max(1, often // logged) == 0 and student.spatial.requires_grad:
            with torch.enable_grad():
                pulls = gradient_shares(list(terms), student)
        for index, name in enumerate(self.names):
            if name not in targets:
                continue
            metrics |= {f"train/{name}/weight": shares[index], f"train/{name}/kept": kept[index]}
            if pulls is not None:
                metrics[f"train/{name}/gradient_share"] = pulls[index]
            for part in self.heads[name].losses:
                target = getattr(targets[name], part)
                metrics |= {f"train/{name}/{part}_target_mean": target.mean()}
                metrics |= {f"train/{name}/{part}_target_std": target.std()}
        return metrics

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{kind}_rankme": rank.compute() for kind, rank in self.ranks.items()}, rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.student,
            list(self.heads.children()),
            self.balance,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
        )
        betas: dict[str, Any] = {"betas": self.betas} if get_optimizer_info(self.optimizer).has_betas else {}
        optimizer = create_optimizer_v2(groups, opt=self.optimizer, lr=self.lr, weight_decay=0.0, **betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, self._rate(int(self.trainer.estimated_stepping_batches))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, total: int) -> Callable[[int], float]:
        """Learning rate of a step as a share of `lr`, in a run of `total` steps."""
        spans = self.plan.spans(total)

        def rate(step: int) -> float:
            index = self.plan.stage_at(step)
            stage, (start, length) = self.plan.stages[index], spans[index]
            return (
                (stage.lr or self.lr)
                / self.lr
                * multiplier(
                    step - start,
                    schedule=self.schedule,
                    warmup_steps=self.warmup_steps if stage.warmup_steps is None else stage.warmup_steps,
                    total_steps=length,
                    final=self.final_lr,
                    decay_fraction=self.decay_fraction,
                )
            )

        return rate

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


class Place(NamedTuple):
    """What a batch's place in the plan comes to.

    Attributes:
        names: the teachers that see it.
        others: those that see another rank's batch of the same step.
        step: optimiser steps before it.
        frozen: whether only the heads learn.
        scales: a factor for each teacher's mean loss, or None for 1.
    """

    names: list[str]
    others: Sequence[str] = ()
    step: int = 0
    frozen: bool = False
    scales: list[float] | None = None


def nothing(encoder: Teacher, like: Tensor) -> Features:
    """Features of no image."""
    dims = encoder.dims
    return Features(
        None if dims.summary is None else like.new_zeros(0, dims.summary),
        None if dims.spatial is None else like.new_zeros(0, dims.spatial, 1, 1),
    )


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
