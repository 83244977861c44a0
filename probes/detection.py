"""Detection on a frozen backbone: a feature pyramid and a detector of torchvision are trained, COCO's AP measured."""

from __future__ import annotations

import itertools
import math
from typing import Any, Collection, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from agglom.data import eval_stream
from agglom.detection import DetectionBackbone
from agglom.errors import UserError, nearest
from agglom.features import Backbone
from agglom.probes.base import Probe, Result, Subject
from agglom.probes.boxes import Example, example, put, shuffled
from agglom.probes.coco_ap import Found, Truth, coco_metrics, resampled_ap
from agglom.probes.detectors import KINDS, Kind, build_detector
from agglom.probes.fingerprint import device_of
from agglom.probes.statistics import draws

RESAMPLES = 200
SHOWN = 10  # detections of a pictured image
SHOWN_SCORE = 0.2
ROOM = 2**29  # bytes of pixels, and of frozen maps, that training may keep


class Seen(NamedTuple):
    """An image of a split: its number, key, stored (height, width), objects and detections."""

    row: int
    key: str
    size: tuple[int, int]
    truth: Truth
    found: Found


class DetectionProbe(Probe):
    """The twelve numbers of COCO's summary (AP as "ap"), on test images in the size in which they are stored.

    Images are resized into the model's canvas with their aspect ratio. Training sees them mirrored half of the time
    and is otherwise the same for all models: AdamW, a linear warm-up over a tenth of the steps, cosine to 0.

    Args:
        detector: "fcos", or "fasterrcnn".
        size: pixels of a side of the canvas for models that take any size; None: the longer side of the first image.
            Models with a size of their own keep it.
        channels: of the pyramid, a multiple of 32.
        convs: convolutions in each of FCOS's two towers.
        steps: of training.
        batch: images a step.
        lr: candidates, chosen by AP on val; a single one is taken as it is.
        weight_decay: of AdamW.
        images: of the test split that are scored, evenly spread; None: all.
    """

    name, metric, fields = "detection", "ap", ("boxes",)

    def __init__(
        self,
        *,
        detector: Kind = "fcos",
        size: int | None = None,
        channels: int = 64,
        convs: int = 1,
        steps: int = 100,
        batch: int = 8,
        lr: Sequence[float] = (0.003,),
        weight_decay: float = 0.05,
        images: int | None = 300,
    ) -> None:
        if detector not in KINDS:
            raise UserError(f"detector: {detector!r}; {nearest(detector, KINDS)}")
        if channels < 32 or channels % 32:
            raise UserError(f"channels: {channels}; valid: 32, 64, 96, ...")
        for key, value in (("steps", steps), ("batch", batch), ("convs", convs), ("images", images)):
            if value is not None and value < 1:
                raise UserError(f"{key}: {value}; valid: 1 or more")
        if not lr:
            raise UserError("lr: none; valid: one learning rate or more")
        self.detector, self.size, self.channels, self.convs = detector, size, channels, convs
        self.steps, self.batch, self.lr, self.weight_decay = steps, batch, tuple(lr), weight_decay
        self.images = images

    def missing(self, subject: Subject) -> str | None:
        assert subject.source is not None
        for role, entry in subject.plan.items():
            if "boxes" not in subject.source.index.fields[entry["split"]]:
                return f"the {role} split has no .boxes.json"
        return "it has no feature map" if subject.features["train"].mean is None else None

    def evaluate(self, subject: Subject) -> Result:
        """Scores on test, with the learning rate that was best on val."""
        task = _Task(self, subject)
        trained = [task.train(lr) for lr in self.lr]
        on_val = [task.ap(detector, "val") for detector, _ in trained] if len(trained) > 1 else []
        best = int(np.nanargmax(on_val)) if on_val else 0
        detector, losses = trained[best]
        count = len(subject.targets["test"].keys)
        scored = set(np.linspace(0, count - 1, min(self.images or count, count)).round().astype(int).tolist())
        seen = {one.row: one for one in task.detect(detector, "test", scored | set(subject.show))}
        truth, found = ([getattr(seen[row], what) for row in sorted(scored)] for what in ("truth", "found"))
        metrics = coco_metrics(truth, found)
        if np.isnan(metrics["ap"]):
            raise UserError(f"{task.where}: the test split has no boxes but crowds; take other data or probes")
        resampled = resampled_ap(truth, found, draws(len(truth), RESAMPLES, subject.seed, 0))
        pyramid = "top-down" if len(task.backbone().map_strides) > 1 else "simple"
        return Result(
            metrics=metrics,
            protocol={
                "features": f"{pyramid} feature pyramid of strides {task.backbone().strides} on the frozen "
                + ("stages" if pyramid == "top-down" else "feature map"),
                "detector": self.detector,
                "canvas": list(task.canvas),
                "channels": self.channels,
                "convs": self.convs,
                "chosen": {"lr": self.lr[best]} if on_val else {},
                "grid": {"lr": list(self.lr)},
                "val_ap": {f"{lr:g}": ap for lr, ap in zip(self.lr, on_val, strict=False)},
                "at_edge": bool(on_val) and self.lr[best] in (min(self.lr), max(self.lr)),
                "solver": f"AdamW, {self.steps} steps of {self.batch} images, mirrored half of the time",
                "weight_decay": self.weight_decay,
                "classes": task.classes,
                "object_size": "area of the box, in stored pixels",
                "images": len(scored),
                "resamples": RESAMPLES,
            },
            resamples={"ap": resampled[:, 0], "ap50": resampled[:, 1]},
            show={"boxes": [_shown(seen[row]) for row in subject.show]},
            series={"loss": losses},
        )


class _Task:
    """One model and its data."""

    def __init__(self, probe: DetectionProbe, subject: Subject) -> None:
        assert subject.source is not None
        self.probe, self.subject, self.where = probe, subject, subject.source.root
        self.device = device_of(subject.model)
        self.offset = int(probe.detector == "fasterrcnn")  # whose label 0 is the background
        self.classes = len(subject.classes or ()) or self._count_classes()
        first = next(subject.samples("train", ("boxes",), raw=True), None)
        if first is None or not self.classes:
            raise UserError(f"{self.where}: the train split has no boxes; take other data or probes")
        self.canvas = self.backbone().canvas(probe.size or max(first["image"].shape[1:]))

    def backbone(self) -> Remembering:
        """A new pyramid over the model."""
        return Remembering(
            self.subject.model, channels=self.probe.channels, pool=int(self.probe.detector == "fasterrcnn")
        )

    def train(self, lr: float) -> tuple[nn.Module, list[tuple[float, float]]]:
        """A trained detector, and its loss over the steps."""
        probe, device = self.probe, self.device
        rng = np.random.default_rng(self.subject.seed)
        drawn = shuffled(lambda: self.read("train"), ROOM, rng)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.subject.seed)
            backbone = self.backbone()
            detector = build_detector(probe.detector, backbone, self.classes, convs=probe.convs)
            detector.to(device).train()
            optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=probe.weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, probe.steps))
            losses = torch.zeros(probe.steps, device=device)
            for step in range(probe.steps):
                some = [x.mirrored() if rng.random() < 0.5 else x for x in itertools.islice(drawn, probe.batch)]
                backbone.keys = [(x.row, x.flipped) for x in some]
                targets = [{k: v.to(device) for k, v in x.target(self.offset).items()} for x in some]
                loss = sum(detector(list(self.images(some)), targets).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses[step] = loss.detach()
        if not losses.isfinite().all():
            raise UserError(f"detection of {self.subject.name}: the loss is not finite with lr {lr:g}; lower it")
        backbone.forget()
        stretches = losses.cpu().double().split(max(1, probe.steps // 20))
        ends = np.cumsum([len(x) for x in stretches])
        return detector.eval(), [(float(end), float(x.mean())) for end, x in zip(ends, stretches, strict=True)]

    def detect(self, detector: nn.Module, role: str, rows: Collection[int] | None = None) -> list[Seen]:
        """What the detector says of a role's images, or of some."""
        out = []
        stream = (one for one in self.read(role) if rows is None or one.row in rows)
        while some := list(itertools.islice(stream, 2 * self.probe.batch)):
            with torch.inference_mode():
                answers = detector(list(self.images(some)))
            for one, answer in zip(some, answers, strict=True):
                out.append(Seen(one.row, one.key, one.size, one.truth, one.found(answer, self.offset)))
        return out

    def ap(self, detector: nn.Module, role: str) -> float:
        seen = self.detect(detector, role)
        return coco_metrics([one.truth for one in seen], [one.found for one in seen])["ap"]

    def images(self, some: Sequence[Example]) -> Tensor:
        """(B, 3, *canvas) on the device; what isn't image has the model's mean, which it sees as 0."""
        return put(some, self.canvas, self.subject.model.input.mean).to(self.device)

    def read(self, role: str) -> Iterator[Example]:
        for row, sample in enumerate(self.subject.samples(role, ("boxes",), raw=True)):
            yield example(row, sample, self.canvas, self.classes)

    def _count_classes(self) -> int:
        source = self.subject.source
        assert source is not None
        labels = [
            box.get("label", 0)
            for split in {entry["split"] for entry in self.subject.plan.values()}
            for sample in eval_stream(source.index, split, fields=("boxes",), limit=source.rows(split))
            for box in sample["boxes"]
        ]
        return 1 + max((label for label in labels if isinstance(label, int)), default=-1)


class Remembering(DetectionBackbone):
    """Keeps the frozen maps of images that it is told the names of, as long as there is room.

    Attributes:
        room: bytes that may be kept.
        keys: of the images of the next call, or None: they won't be seen again.
    """

    room = ROOM
    keys: Sequence[Any] | None = None
    kept: dict[Any, tuple[Tensor, ...]]

    def __init__(self, model: Backbone, *, channels: int, pool: int) -> None:
        self.__dict__["kept"] = {}
        super().__init__(model, channels=channels, pool=pool)

    def maps(self, images: Tensor) -> list[Tensor]:
        if self.keys is None:
            return super().maps(images)
        lacking = [i for i, key in enumerate(self.keys) if key not in self.kept]
        fresh = dict(zip(lacking, zip(*super().maps(images[lacking]), strict=True), strict=True)) if lacking else {}
        maps = [fresh[i] if i in fresh else self.kept[key] for i, key in enumerate(self.keys)]
        size = sum(x.nbytes for x in maps[0])
        for i in lacking:
            if (len(self.kept) + 1) * size <= self.room:
                self.kept[self.keys[i]] = tuple(x.clone() for x in maps[i])
        return [torch.stack(level) for level in zip(*maps, strict=True)]

    def forget(self) -> None:
        """Training is over."""
        self.kept.clear()
        self.keys = None


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up over a tenth of the steps, then a cosine to 0."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


def _shown(seen: Seen) -> dict[str, Any]:
    """Plain data of one image: its best detections and its objects, boxes as x0, y0, x1, y1 in stored pixels."""
    boxes, labels, scores = seen.found
    best = [i for i in np.argsort(-scores, kind="stable")[:SHOWN] if scores[i] >= SHOWN_SCORE]

    def corners(box: np.ndarray) -> list[float]:
        return [round(float(v), 2) for v in (*box[:2], *(box[:2] + box[2:]))]

    return {
        "key": seen.key,
        "size": list(seen.size),
        "found": [(corners(boxes[i]), int(labels[i]), round(float(scores[i]), 4)) for i in best],
        "truth": [(corners(box), int(label), int(crowd)) for box, label, crowd in zip(*seen.truth, strict=True)],
    }
