"""The training module: composes student, teachers, heads and balance, and logs. It has no maths of its own."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Callable, Literal, Mapping, Sequence, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agglom.adaptors import MLPAdaptor
from agglom.aside import Aside
from agglom.balance import Balance, Equal
from agglom.callbacks.ema import EMASchedule, WeightEMA
from agglom.callbacks.guard import Guard
from agglom.data import arrived
from agglom.diagnostics import RankMe, gradient_shares, teacher_metrics
from agglom.errors import UserError
from agglom.features import Dims, Features, StudentFeatures, sides
from agglom.frames import Frames
from agglom.heads import (
    AdaptorFactory,
    LossFactory,
    NormalizerFactory,
    TeacherConfig,
    build_heads,
    nothing,
)
from agglom.looking import Made, look
from agglom.objectives import Cosine, CosineSmoothL1
from agglom.optimizers import build_optimizer, check_optimizer
from agglom.parameters import parameter_groups
from agglom.place import Place, locate, own_images
from agglom.plan import Part, Plan, Stage
from agglom.schedules import Schedule, rate_at
from agglom.selfdistill import Objective, Scene
from agglom.selfdistill.base import conflicts, objective_metrics, steps
from agglom.sharding import shard
from agglom.shifts import ShiftOptions
from agglom.students import Student
from agglom.suit import suit
from agglom.targets import Memory, Standardize
from agglom.targets.moments import Statistics
from agglom.teachers import CachedTeacher, Teacher

log = logging.getLogger("agglom.fit")

ObjectiveFactory = Callable[[Dims], Objective]


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
        summary_normalizer: the same for summaries alone; left out: `normalizer` for both. PHI-S is of maps, and what
            `AngleBalanced` measures is the raw cone of the summaries, so the RADIO family takes `Identity` here.
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
        objectives: name -> a term of the loss beside the teachers' (`agglom.selfdistill`).
        ema_decay: of the averaged weights that are validated, exported and asked by objectives; null for none.
        ema_schedule: of the decay: fixed, or by a cosine up to 1.
        ema_warmup: let a fixed decay begin low (see `agglom.callbacks.WeightEMA`).
        ema_anneal_anyway: allow a cosine decay beside frozen teachers or captions, which is refused otherwise: as it
            nears 1, an average that objectives learn from stops following what these still teach the student (SILC).
        remember_teachers: run each teacher that isn't cached once an image and keep its features in RAM (see
            `agglom.targets.Memory`); only for training without random views.
        skip_nonfinite: how many steps in a row may be left out because a loss, a gradient or features aren't finite; 0
            stops at the first. Such a step is never applied (see `agglom.callbacks.guard`).
        checkpoint_heads: keep no activations of the heads; the backward pass computes them anew, for less memory.
        compile: what `torch.compile` turns into larger kernels, each module on its own: student, teachers, heads. The
            first steps take minutes; null for nothing.

    Raises:
        UserError: a loss on something that a teacher doesn't give, too few summary tokens, an unknown optimiser.
    """

    def __init__(
        self,
        student: Student,
        teachers: dict[str, TeacherConfig],
        adaptor: AdaptorFactory = MLPAdaptor,
        normalizer: NormalizerFactory = Standardize,
        summary_normalizer: NormalizerFactory | None = None,
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
        objectives: dict[str, ObjectiveFactory] | None = None,
        ema_decay: float | None = 0.999,
        ema_schedule: EMASchedule = "fixed",
        ema_warmup: bool = True,
        ema_anneal_anyway: bool = False,
        remember_teachers: bool = False,
        skip_nonfinite: int = 0,
        checkpoint_heads: bool = False,
        compile: list[Literal["student", "teachers", "heads"]] | None = None,
    ) -> None:
        super().__init__()
        if not teachers and not objectives:
            raise UserError("model.teachers: empty; name at least one teacher, or an objective in model.objectives")
        check_optimizer(optimizer)
        self.names = list(teachers)
        self.encoders = nn.ModuleDict({name: config.teacher for name, config in teachers.items()})
        heads = build_heads(
            student,
            teachers,
            adaptor=adaptor,
            normalizer=normalizer,
            summary_normalizer=summary_normalizer or normalizer,
            losses={"summary": summary_loss, "spatial": spatial_loss},
        )
        built = nn.ModuleDict({name: make(student.dims) for name, make in (objectives or {}).items()})
        anchored = any(cast(Objective, objective).anchors for objective in built.values())
        average: Any = {"ema_decay": ema_decay, "ema_schedule": ema_schedule, "anneal_anyway": ema_anneal_anyway}
        if found := list(conflicts(teachers, objectives or (), anchored=anchored, **average)):
            raise UserError("; ".join(found))
        # One module for everything that is trained: what the optimiser, the EMA and the export look at.
        self.trained = nn.ModuleDict({"student": student, "heads": heads, "objectives": built})
        self.ema = None if ema_decay is None else WeightEMA(ema_decay, schedule=ema_schedule, warmup=ema_warmup)
        self.balance = balance if balance is not None else Equal()
        wanted = {tap for head in heads.values() for tap in head.adaptor.taps}
        self.taps = tuple(tap for tap in student.tap_names if tap in wanted)
        self.optimizer, self.lr, self.weight_decay, self.betas = optimizer, lr, weight_decay, betas
        self.warmup_steps, self.schedule, self.final_lr = warmup_steps, schedule, final_lr
        self.decay_fraction, self.layer_decay, self.compiled = decay_fraction, layer_decay, tuple(compile or ())
        self.plan, self.shift, self.gradient_shares_every = Plan(stages or ()), shift, gradient_shares_every
        self.mosaics = {name: config.mosaic for name, config in teachers.items()}
        self.own_data = {name: config.own_data or [] for name, config in teachers.items()}
        seen_once = [n for n in self.names if remember_teachers and not isinstance(self.encoders[n], CachedTeacher)]
        self.memories = {name: Memory() for name in seen_once}
        self.ranks = {"summary": RankMe(), "spatial": RankMe()}
        self.guard, self.aside, self.checkpoint_heads = Guard(skip_nonfinite), Aside(), checkpoint_heads
        self.per_image: dict[str, Tensor] = {}  # (B,) losses of the last training batch, by teacher and objective

    @property
    def student(self) -> Student:
        return cast(Student, self.trained["student"])

    @property
    def frozen(self) -> dict[str, Teacher]:
        """Every frozen encoder by name: the teachers', and those of objectives that have one."""
        owned = {name: getattr(objective, "encoder", None) for name, objective in self.objectives.items()}
        everyone = {**dict(self.encoders.items()), **{name: x for name, x in owned.items() if x is not None}}
        return cast("dict[str, Teacher]", everyone)

    @property
    def heads(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.trained["heads"])

    @property
    def objectives(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.trained["objectives"])

    def frames(self, images: Tensor, part: Part | None = None, key: tuple[object, ...] = ()) -> Frames:
        """The views of images (B, 3, H, W) in [0, 1]; with a key, those of a training step (see `agglom.frames`)."""
        resolution, shift = None if part is None else part.resolution, self.shift if key else None
        return Frames(images, self.student.input, resolution=resolution, shift=shift, key=key)

    def targets(
        self,
        frames: Frames,
        names: Sequence[str],
        others: Sequence[str] = (),
        keys: Sequence[str] = (),
        cached: Mapping[str, Any] | None = None,
    ) -> dict[str, Features]:
        """Each teacher's normalised features of its view, without gradient.

        Args:
            frames: the views.
            names: the teachers that look.
            others: teachers that look on another rank in this very step: they take part in the statistics here.
            keys: identify the images where teachers are remembered; validation images must have others than training's.
            cached: the batch, where it brings `features` of some teachers.
        """
        resolution = sides(frames.student)
        grid = self.student.input.grid(resolution)

        # Who sees the same view shares its resized copies; where features are remembered few images are resized at all.
        made: Made | None = {} if frames.shift is None and not self.memories else None

        def raw(name: str) -> Features:
            encoder = cast(Teacher, self.encoders[name])
            if name not in names:
                return nothing(encoder, frames.student)
            run: Any = encoder
            if cached and name in cached.get("features", ()) and isinstance(encoder, CachedTeacher):
                run = partial(encoder.recall, features=cached["features"][name], there=cached["cached"])
                if all(cached["cached"]):  # nobody looks, so nothing is resized
                    return run(frames.images)
            elif name in self.memories:  # the views never change, so neither do the features
                run = partial(self.memories[name].features, encoder, keys=keys)
            view, mosaic = frames.view(name), self.mosaics[name]
            return look(run, encoder.input, view, resolution=resolution, grid=grid, mosaic=mosaic, made=made)

        targets = {n: self.heads[n].targets(raw(n)) for n in self.names if n in names or n in others}
        return {name: targets[name] for name in names}

    def losses(
        self, student: StudentFeatures, targets: dict[str, Features], shifts: dict[str, Tensor | None] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Per teacher and kind, (B,) each."""
        run: Any = partial(checkpoint, use_reentrant=False) if self.checkpoint_heads else lambda head, *a: head(*a)
        return {name: run(self.heads[name], student, x, (shifts or {}).get(name)) for name, x in targets.items()}

    def step(self, batch: dict[str, Any], kind: str, batch_idx: int = 0) -> Tensor:
        """One forward pass; logs under `kind/` and returns the scalar loss."""
        images = batch["image"]
        training = kind == "train"
        place = self._place(batch, batch_idx) if training else Place(self.names)
        key = (place.step, batch_idx, self.global_rank) if training else ()
        frames = self.frames(images, batch.get("part") if training else None, key)
        keys = [f"{kind}/{key}" for key in batch["key"]] if self.memories else ()
        with self.aside.beside(images.device):
            targets = self.targets(frames, place.names, place.others, keys, batch)

        @cache  # nobody may ask: without teachers, objectives over crops alone don't
        def student() -> StudentFeatures:
            with torch.no_grad() if place.frozen else nullcontext():
                return cast(StudentFeatures, self.student(frames.student, self.taps))

        offsets = {name: frames.offset(name) for name in targets}
        if targets:
            student()
        self.aside.join(images.device)
        losses = self.losses(student(), targets, offsets) if targets else {}
        per_image = torch.zeros(len(self.names), len(images), device=images.device)  # (T, B)
        rows = {name: self.heads[name].combine(found) for name, found in losses.items()}
        if rows:
            per_image = torch.stack([rows.get(name, per_image[0]) for name in self.names])
        here = torch.tensor([name in rows for name in self.names], dtype=torch.bool)
        valid = here.to(images.device, non_blocking=True)[:, None]
        weights = self.balance(per_image, valid.expand_as(per_image), own_images(self.own_data, batch))
        if place.scales is not None:
            weights = weights * torch.tensor(place.scales).to(images.device, non_blocking=True)[:, None]
        terms = (weights * per_image).mean(1)  # (T,)
        loss = terms.sum() + self.balance.penalty()
        extra = self._objectives(batch, frames, student, place) if training and not place.frozen else {}
        for weight, value in extra.values():
            loss = loss + weight * value.mean()
        if training:
            self.per_image = {**rows, **{name: value for name, (_, value) in extra.items()}}
            loss = self.guard.see(loss, targets, self.per_image)
        self._log(kind, loss, losses, per_image, weights, targets, terms, student, extra)
        return loss

    def _place(self, batch: dict[str, Any], batch_idx: int) -> Place:
        """Where a training batch stands in the plan."""
        micros, ranks = 1, 1
        if not (self.plan.alone() and not self.objectives):
            micros, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        part = batch.get("part")
        return locate(
            self.plan, part, self.names, step=self.global_step, micro=batch_idx % micros, micros=micros, ranks=ranks,
            shares=self.balance.shares,
        )  # fmt: skip

    def _objectives(
        self, batch: dict[str, Any], frames: Frames, student: Callable[[], StudentFeatures], place: Place
    ) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, per-image loss) of the objectives that run at this step; the others are not called."""
        running = {}
        for name, objective in cast("dict[str, Objective]", self.objectives).items():
            weight = objective.weight_at(place.step, self._total())
            if not weight:
                continue
            first = steps(objective.start, self._total())
            if place.step == first and place.micro == 0 and objective.copy_average:
                self.ema.copy(self)

            def snapshot(key: str, every: int | None, first: int = first, name: str = name) -> nn.Module:
                due = place.step == first or (every is not None and (place.step - first) % every == 0)
                return self.ema.snapshot(f"{name}/{key}", renew=due and place.micro == 0)

            assert self.ema.average is not None
            scene = Scene(
                batch=batch,
                features=student,
                student=self.student,
                average=self.ema.average,
                frame=frames.of,
                snapshot=snapshot,
                own=cast(nn.ModuleDict, self.ema.average["objectives"])[name],
                step=place.step,
                since=place.step - first,
                key=frames.key,
            )
            running[name] = weight, objective(scene)
        return running

    def _total(self) -> int:
        """Optimiser steps of the run."""
        return int(self.trainer.estimated_stepping_batches)

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
        student: Callable[[], StudentFeatures],
        extra: dict[str, tuple[float, Tensor]],
    ) -> None:
        """Queue the metrics; only in a step that is logged the host waits for the device."""
        training, every = kind == "train", self.trainer.log_every_n_steps
        if training and (every == 0 or (self.global_step + 1) % every):
            return  # Lightning would drop them
        if training:
            self.guard.look_at(targets, self.global_step)
        metrics = {f"{kind}/loss": loss.detach()}
        for name, row in zip(self.names, per_image.detach().mean(1), strict=True):
            if name in losses:
                metrics[f"{kind}/{name}/loss"] = row
                metrics |= {f"{kind}/{name}/{part}_loss": x.detach().mean() for part, x in losses[name].items()}
        if training:
            pulls = self._pulls(terms, student) if targets else None
            metrics |= teacher_metrics(
                self.names, targets, dict(self.heads.items()), self.balance.kept_share(), weights.mean(1), pulls
            )
            metrics |= objective_metrics(self.objectives, extra, step=self.global_step, total=self._total())
        else:
            self.ranks["summary"].update(student().summary.flatten(1))
            self.ranks["spatial"].update(student().spatial.movedim(1, -1))
        size = per_image.shape[1]
        self.log_dict(metrics, on_step=training, on_epoch=not training, sync_dist=not training, batch_size=size)

    def _pulls(self, terms: Tensor, seen: Callable[[], StudentFeatures]) -> Tensor | None:
        """Shares of the gradient, where this logged step measures them."""
        often, logged = self.gradient_shares_every, self.trainer.log_every_n_steps
        if not often or (self.global_step + 1) // logged % max(1, often // logged):
            return None
        with torch.enable_grad():
            return gradient_shares(list(terms), student) if (student := seen()).spatial.requires_grad else None

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{kind}_rankme": rank.compute() for kind, rank in self.ranks.items()}, rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.student, [*self.heads.children(), *self.objectives.children()], self.balance,
            lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay,
        )  # fmt: skip
        optimizer = build_optimizer(self.optimizer, groups, lr=self.lr, betas=self.betas)
        shape: dict[str, Any] = {
            "schedule": self.schedule,
            "final": self.final_lr,
            "decay_fraction": self.decay_fraction,
        }
        rate = partial(
            rate_at, plan=self.plan, total_steps=self._total(), lr=self.lr, warmup_steps=self.warmup_steps, **shape
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        return [self.guard] if self.ema is None else [self.guard, self.ema]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.guard.judge(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients go as soon as they are used; Lightning would keep them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.optimizers().zero_grad()

    def configure_model(self) -> None:
        """Under Lightning's FSDP2 strategy, which gives a mesh."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        suit(self.student, self.trained, self.frozen.values(), self.trainer.strategy.root_device)

    def on_fit_start(self) -> None:
        modules = {"student": [self.student], "teachers": self.frozen.values(), "heads": self.heads.values()}
        for module in (module for part in self.compiled for module in modules[part]):
            module.compile()

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """See `agglom.data.arrived`."""
        return arrived(batch)
