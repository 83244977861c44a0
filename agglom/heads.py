"""All that belongs to one teacher during training: adaptor, normalisers, losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal, Sequence

import torch
from torch import Tensor, nn

from agglom.adaptors import Adaptor
from agglom.errors import UserError
from agglom.features import Dims, Features, StudentFeatures, align, sides
from agglom.objectives import Loss
from agglom.shifts import move
from agglom.students import Student
from agglom.targets import Normalizer
from agglom.targets.moments import Statistics
from agglom.teachers import Teacher

AdaptorFactory = Callable[[Dims, Dims, int, Sequence[str]], Adaptor]
NormalizerFactory = Callable[[int], Normalizer]
LossFactory = Callable[[], Loss]
Align = Literal["teacher", "larger"]


@dataclass
class TeacherConfig:
    """One entry of `teachers`. What is left out falls back to the value of the same name beside `teachers`.

    Attributes:
        encoder: the frozen encoder; in a YAML also the word `cached`, where `data.cache` has this teacher's features.
        summary_weight: weight of its summary loss; left out: 1 where the encoder has a summary, else 0.
        spatial_weight: weight of its spatial loss; left out: 1 where the encoder has a feature map, else 0.
        adaptor: class of the adaptor and its options.
        normalizer: class of the normaliser of its targets and its options.
        summary_normalizer: the same for its summaries alone, where they are to have another.
        summary_loss: class of the summary loss and its options.
        spatial_loss: class of the spatial loss and its options.
        align: on whose grid prediction and target are compared: the "teacher"'s, or the "larger" of the two (AM-RADIO).
            A target is never made smaller.
        mosaic: show a teacher of fixed size several images on one canvas where they fit at the student's resolution;
            for teachers without a summary loss (SAM).
        own_data: names of the shards that hold this teacher's own data, with * and ?; for `TeacherDropping` with
            `own_data`.
    """

    encoder: Teacher | Literal["cached"]
    summary_weight: float | None = None
    spatial_weight: float | None = None
    adaptor: AdaptorFactory | None = None
    normalizer: NormalizerFactory | None = None
    summary_normalizer: NormalizerFactory | None = None
    summary_loss: LossFactory | None = None
    spatial_loss: LossFactory | None = None
    align: Align = "teacher"
    mosaic: bool = False
    own_data: list[str] | None = None

    @property
    def teacher(self) -> Teacher:
        """The encoder.

        Raises:
            UserError: it is `cached`, which only `agglom fit` can turn into one.
        """
        if isinstance(self.encoder, str):
            raise UserError(f"encoder: {self.encoder}; valid: a Teacher, such as CachedTeacher(cache=..., name=...)")
        return self.encoder


class Head(nn.Module):
    """The trained and the estimated parts of one teacher: everything but its frozen encoder.

    Attributes:
        weights: weight of the "summary" and of the "spatial" loss; a part of weight 0 is not built.
    """

    def __init__(
        self,
        *,
        student: Dims,
        teacher: Dims,
        token: int,
        tap_names: Sequence[str],
        weights: dict[str, float],
        adaptor: AdaptorFactory,
        normalizers: dict[str, NormalizerFactory],
        losses: dict[str, LossFactory],
        align: Align = "teacher",
    ) -> None:
        super().__init__()
        self.align = align
        widths = {kind: getattr(teacher, kind) for kind, weight in weights.items() if weight > 0}
        self.weights = {kind: weights[kind] for kind in widths}
        used = Dims(widths.get("summary"), widths.get("spatial"))
        self.adaptor = adaptor(student, used, token, tap_names)
        self.normalizers = nn.ModuleDict({kind: normalizers[kind](width) for kind, width in widths.items()})
        self.losses = nn.ModuleDict({kind: losses[kind]() for kind in widths})

    @torch.no_grad()
    def targets(self, features: Features) -> Features:
        """The teacher's features (B, D), (B, C, H, W) -> normalised, fp32; the statistics learn in training.

        A step's targets are normalised with the statistics from before that step.
        """
        out: dict[str, Tensor | None] = {"summary": None, "spatial": None}
        for kind, normalizer in self.normalizers.items():
            value = getattr(features, kind)
            last = value.movedim(1, -1)  # (..., C)
            target = normalizer.normalize(last).movedim(-1, 1)
            if self.training:
                normalizer.update(last)
                self.losses[kind].update(target)
            out[kind] = target
        return Features(**out)

    def forward(self, student: StudentFeatures, target: Features, shift: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted losses, "summary" and "spatial" as far as they are trained: each (B,), fp32.

        Args:
            student: its features.
            target: normalised.
            shift: (B, 2) int64, cells of the student's grid by which the target's frame lies further down and right
                than the student's; only the overlap counts for the spatial loss. None: they see the same view.
        """
        prediction = self.adaptor.project(student)
        losses = {}
        if "summary" in self.losses:
            losses["summary"] = self.losses["summary"](prediction.summary, target.summary)
        if "spatial" in self.losses:
            assert prediction.spatial is not None and target.spatial is not None
            ours, theirs, mask = meet(prediction.spatial, target.spatial, self.align, shift, sides(student.spatial))
            losses["spatial"] = self.losses["spatial"](ours, theirs, mask)
        return losses

    def reset(self) -> None:
        """Forget the statistics of normalisers and losses, as at the start of a stage."""
        for module in (*self.normalizers.values(), *self.losses.values()):
            if isinstance(module, Statistics):
                module.reset()

    def combine(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum over kinds: (B,)."""
        return torch.stack([self.weights[kind] * loss for kind, loss in losses.items()]).sum(0)


def meet(
    prediction: Tensor, target: Tensor, rule: Align, shift: Tensor | None, native: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring a prediction and its target onto one grid and into one frame.

    Args:
        prediction: (B, C, H, W), at the student's grid or a whole multiple of it.
        target: (B, C, H', W').
        rule: see `TeacherConfig.align`.
        shift: see `Head.forward`.
        native: the student's grid, which `shift` counts in.

    Returns:
        prediction and target on one grid, and which cells both frames hold: (B, H'', W'') bool, None for all.
    """
    mask = None
    if shift is not None:
        prediction, mask = move(prediction, shift * (prediction.shape[-1] // native[1]))
    ours, theirs = sides(prediction), sides(target)
    grid = theirs if rule == "teacher" else (max(ours[0], theirs[0]), max(ours[1], theirs[1]))
    if mask is not None and grid != ours:
        # a cell counts only if nothing from outside the overlap has been mixed into it
        mask = align(mask[:, None].float(), grid)[:, 0] > 1 - 1e-4
    return align(prediction, grid), align(target, grid), mask


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
        given, has = getattr(config, f"{kind}_weight"), getattr(config.teacher.dims, kind) is not None
        if given and not has:
            raise UserError(
                f"model.teachers.{name}.{kind}_weight: {given}, but {type(config.teacher).__name__} gives no {kind}; "
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


def build_heads(
    student: Student,
    teachers: dict[str, TeacherConfig],
    *,
    adaptor: AdaptorFactory,
    normalizer: NormalizerFactory,
    summary_normalizer: NormalizerFactory,
    losses: dict[str, LossFactory],
) -> nn.ModuleDict:
    """Name -> `Head` of every teacher; what a teacher leaves out is taken from the keywords.

    Args:
        student: the backbone.
        teachers: name -> teacher.
        adaptor: of teachers that name none.
        normalizer: the same.
        summary_normalizer: of teachers that name no normaliser at all.
        losses: "summary" and "spatial", of teachers that name none.

    Raises:
        UserError: see `teacher_weights` and `summary_tokens`.
    """
    heads = nn.ModuleDict()
    tokens = summary_tokens(student, teachers)
    for name, config in teachers.items():
        heads[name] = Head(
            student=student.dims,
            teacher=config.teacher.dims,
            token=tokens[name],
            tap_names=student.tap_names,
            weights=teacher_weights(name, config),
            adaptor=config.adaptor or adaptor,
            normalizers={
                "summary": config.summary_normalizer or config.normalizer or summary_normalizer,
                "spatial": config.normalizer or normalizer,
            },
            losses={kind: getattr(config, f"{kind}_loss") or loss for kind, loss in losses.items()},
            align=config.align,
        )
    return heads
