"""Self-distillation over crops: DINO between views, iBOT at masked patches, KoLeo against crowding."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.data.masks import block_masks, positions
from agglom.draws import generator
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures
from agglom.objectives.koleo import koleo
from agglom.objectives.prototypes import (
    Center,
    PrototypeHead,
    cross_view,
    entropy_of_mean,
    masked,
    mean_entropy,
    sinkhorn,
)
from agglom.selfdistill.base import Objective, Scene, When
from agglom.students import Student, masked_patches


class Dino(Objective):
    """What the averaged student says of whole images, the student must say of parts of them.

    The average sees the global crops of a batch (`data.crops`), the student global and local ones; no local crop ever
    enters the average. Three terms, weighted among themselves and added up:

    * dino: cross entropy between the prototype assignments of summaries, over all pairs of different views;
    * ibot: the same of single patches that the student sees masked and the average sees;
    * koleo: the student's summaries of a global view keep their distance from each other.

    Source: DINO 2104.14294, iBOT 2111.07832, DINOv2 2304.07193; defaults are DINOv2's for a ViT-L.

    Args:
        student: widths of the student.
        weight: of the three terms together.
        start: first optimiser step, or a fraction of the run.
        ramp: steps over which the weight grows.
        stop: the step from which it no longer runs.
        copy_average: at its first step the average becomes a copy of the student (SigLIP 2).
        dino_weight: of the term over summaries; 0 leaves it out.
        ibot_weight: of the term over masked patches; 0 leaves it out (SigLIP 2: 0.25 of the other's). ViTs only.
        koleo_weight: of the spread of the summaries; 0 leaves it out (DINOv2: 0.1).
        prototypes: K.
        hidden: width of the heads' hidden layers.
        bottleneck: width in which features and prototypes meet.
        assign: how the average's logits become assignments: "sinkhorn", evened out over the batch of all ranks, or
            "center", evened out over time.
        student_temperature: of the student's softmax.
        teacher_temperature: of the average's.
        first_temperature: of the average's at the objective's first step.
        temperature_steps: steps from `first_temperature` to `teacher_temperature`, in a line.
        freeze_last_steps: steps for which the prototypes stay as they are.
        mask_share: part of the global crops that are masked (ibot).
        mask_ratio: least and greatest part of their patches that are.
        token: which summary token it reads.
        seed: of the masks.

    Raises:
        UserError: see Objective; all three weights 0, a temperature of 0 or below, a token that there isn't.
    """

    def __init__(
        self,
        student: Dims,
        *,
        weight: float = 1.0,
        start: When = 0,
        ramp: int = 0,
        stop: When | None = None,
        copy_average: bool = False,
        dino_weight: float = 1.0,
        ibot_weight: float = 0.0,
        koleo_weight: float = 0.0,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        assign: Literal["sinkhorn", "center"] = "sinkhorn",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_temperature: float = 0.04,
        temperature_steps: int = 0,
        freeze_last_steps: int = 0,
        mask_share: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        token: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(student, weight=weight, start=start, ramp=ramp, stop=stop, copy_average=copy_average)
        self.weights = {"dino": dino_weight, "ibot": ibot_weight, "koleo": koleo_weight}
        for name, value in self.weights.items():
            if value < 0:
                raise UserError(f"{name}_weight: {value}; valid: >= 0; change it")
        if not any(self.weights.values()):
            raise UserError("dino_weight: 0, as ibot_weight and koleo_weight; valid: one above 0; raise one")
        temperatures = {"student": student_temperature, "teacher": teacher_temperature, "first": first_temperature}
        for name, value in temperatures.items():
            if value <= 0:
                raise UserError(f"{name}_temperature: {value}; valid: > 0; change it")
        if not 0 <= token < student.tokens:
            raise UserError(
                f"token: {token}; valid: 0 to {student.tokens - 1}, the student's summary tokens; change it"
            )
        if not (0 < mask_share <= 1 and 0 < mask_ratio[0] <= mask_ratio[1] < 1):
            raise UserError(
                f"mask_share {mask_share}, mask_ratio {tuple(mask_ratio)}; valid: share above 0 and up to 1, 0 < least "
                f"<= greatest < 1; change them"
            )
        assert student.summary is not None and student.spatial is not None
        self.needs = {"crops", *(["patches"] if ibot_weight else [])}
        self.temperatures, self.temperature_steps = temperatures, temperature_steps
        self.freeze_last_steps, self.token, self.seed = freeze_last_steps, token, seed
        self.masking = {"share": mask_share, "ratio": tuple(mask_ratio)}
        sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
        widths = {"dino": student.summary, "ibot": student.spatial}
        used = [name for name in widths if self.weights[name]]
        self.prototypes = prototypes
        self.heads = nn.ModuleDict({name: PrototypeHead(widths[name], **sizes) for name in used})
        self.centers = nn.ModuleDict({name: Center(prototypes) for name in used if assign == "center"})
        if ibot_weight:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, student.spatial))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._last: dict[str, Tensor] = {}

    grace = 200  # steps before an alarm: what an untrained head says may look like anything

    def no_weight_decay(self) -> set[str]:
        """The mask token."""
        return {"mask_token"}

    def forward(self, scene: Scene) -> Tensor:
        """See the class; the terms' means are kept for `diagnosis`."""
        if "crops" not in scene.batch:
            raise UserError(f"data.crops: no crops at step {scene.step}; valid: crops from the objective's start on")
        whole, parts = (_by_view(scene.batch["crops"][kind]) for kind in ("global", "local"))  # (V, B, 3, s, s)
        views, batch = whole.shape[:2]
        student, average = cast(Student, scene.student), scene.average["student"]
        with torch.no_grad():
            truth: StudentFeatures = average(whole.flatten(0, 1))
        grid = (truth.spatial.shape[-2], truth.spatial.shape[-1])
        if self.weights["ibot"]:
            drawn = block_masks(
                views * batch, grid, generator=generator(self.seed, *scene.key), **cast(Any, self.masking)
            )
            mask = drawn.to(whole.device, non_blocking=True)
            with masked_patches(student, mask, self.mask_token):
                seen = student(whole.flatten(0, 1))
        else:
            seen = student(whole.flatten(0, 1))
        first = seen.summary[:, self.token].unflatten(0, (views, batch))
        losses: dict[str, Tensor] = {}
        if self.weights["dino"]:
            summaries = [first]
            if len(parts):
                small = student(parts.flatten(0, 1)).summary[:, self.token]
                summaries.append(small.unflatten(0, (len(parts), batch)))
            target = self._assign("dino", scene, truth.summary[:, self.token])
            logits = self._head("dino", torch.cat(summaries), scene.since)
            losses["dino"] = cross_view(
                logits, target.unflatten(0, (views, batch)), temperature=self.temperatures["student"]
            )
        if self.weights["ibot"]:
            place = positions(mask, **cast(Any, self.masking))
            target = self._assign("ibot", scene, _patches(truth.spatial)[place.patch], place.valid)
            logits = self._head("ibot", _patches(seen.spatial)[place.patch], scene.since)
            each = masked(
                logits, target, image=place.image, valid=place.valid, batch=views * batch,
                temperature=self.temperatures["student"],
            )  # fmt: skip
            losses["ibot"] = each.unflatten(0, (views, batch)).mean(0)
        if self.weights["koleo"]:
            losses["koleo"] = torch.stack([koleo(view) for view in first]).mean(0)
        spread = F.normalize(first[0].detach().float(), dim=1).std(0).mean() * math.sqrt(first.shape[-1])
        self._last |= {f"{name}_loss": loss.detach().mean() for name, loss in losses.items()}
        self._last |= {"feature_std": spread}
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum(0)

    def _head(self, name: str, x: Tensor, since: int) -> Tensor:
        """Logits by the trained head; its prototypes get no gradient while they are frozen."""
        head = cast(PrototypeHead, self.heads[name])
        return head(x, frozen=since < self.freeze_last_steps)

    @torch.no_grad()
    def _assign(self, name: str, scene: Scene, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Assignments (..., K) of the average's features, by its own copy of the head; notes their entropies."""
        logits = cast(Dino, scene.own).heads[name](features)
        temperature = self._temperature(scene.since)
        if name in self.centers:
            center = cast(Center, self.centers[name])
            assigned = center.assign(logits, temperature)
            center.update(logits, valid)
        else:
            assigned = sinkhorn(logits, temperature=temperature, mask=valid)
        self._last |= {f"{name}_mean_entropy": mean_entropy(assigned, valid)}
        self._last |= {f"{name}_entropy_of_mean": entropy_of_mean(assigned, valid)}
        return assigned

    def _temperature(self, since: int) -> float:
        """Of the average's softmax, `since` steps after the objective's first."""
        low, high = self.temperatures["first"], self.temperatures["teacher"]
        return high if since >= self.temperature_steps else low + (high - low) * since / self.temperature_steps

    def diagnosis(self) -> dict[str, Tensor]:
        """Each term, entropies of the assignments in nats, and the deviation of the summaries (1 if spread evenly)."""
        return dict(self._last)

    def alarms(self, values: dict[str, float], since: int) -> list[str]:
        """Signs of a collapse: assignments that tell nothing about the image, summaries that are all the same."""
        found: list[str] = []
        if since < self.grace:
            return found
        for name in self.heads:
            known = values[f"{name}_entropy_of_mean"] - values[f"{name}_mean_entropy"]
            if known < LEAST_INFORMATION * math.log(self.prototypes):
                found.append(
                    f"collapse: {name} assignments tell {max(known, 0):.4f} nats of an image, less than "
                    f"{LEAST_INFORMATION} x log {self.prototypes}: all images have the same or none"
                )
        if values["feature_std"] < LEAST_STD:
            found.append(
                f"collapse: feature_std {values['feature_std']:.4f} < {LEAST_STD}: summaries are nearly all the same"
            )
        return found


# Mutual information of image and prototype (entropy of the mean assignment less mean entropy), as a share of log K.
# It is 0 in either kind of collapse: one prototype for all images, or all prototypes for each.
LEAST_INFORMATION = 0.002
LEAST_STD = 0.02  # of normalised summaries, where 1 is an even spread


def _by_view(crops: Tensor) -> Tensor:
    """(B, V, 3, s, s) -> (V, B, 3, s, s)."""
    return crops.transpose(0, 1)


def _patches(spatial: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return spatial.flatten(2).transpose(1, 2).flatten(0, 1)
