"""From a trained student to a folder that plain timm loads, and back.

config.json, model.safetensors    timm's own format: timm.create_model("local-dir:DIR", pretrained=True)
adaptors.json, adaptors.safetensors   the adaptors, answering in their teachers' own units
agglom.json                       what the folder is: student, teachers, sizes, versions
README.md                         model card
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import agglom
from agglom.adaptors import Adaptor
from agglom.card import licence_of, model_card
from agglom.errors import UserError, brief, nearest
from agglom.features import Answer, Dims, Features, InputSpec, StudentFeatures, TextTower, align
from agglom.image_checks import check_images
from agglom.record import training_record
from agglom.students import TimmStudent, fold_weights

FORMAT = 1


def write_export(
    out: Path,
    *,
    student: TimmStudent,
    heads: Mapping[str, nn.Module],
    teachers: dict[str, Any],
    size: int,
    step: int,
    run: Path | None = None,
) -> Path:
    """Write the export folder; an existing one is replaced file by file.

    Args:
        out: the folder.
        student: the student with the weights to hand over (the EMA's, if one was kept).
        heads: name -> `agglom.heads.Head`; left untouched (adaptors are copied before the normalisers are folded in).
        teachers: the manifest of the run's teachers.
        size: pixels of a side that the student was trained at; becomes `pretrained_cfg.input_size`.
        step: optimiser steps behind the weights.
        run: the run directory, for what the model card says of recipe, data and probes.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(
            f"out: {out}: {err.strerror or err}; valid: a folder that can be written; choose another"
        ) from err
    for path in (*out.glob("*.onnx*"), *out.glob("*.pt2")):  # graphs of the weights that are replaced
        path.unlink()
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, head in heads.items():
        adaptor = fold_normalizers(head)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in adaptor.state_dict().items()}
        entries[name] = {
            "class": type(adaptor).__name__,
            "module": _foreign(type(adaptor).__module__),
            "options": adaptor.options,
            "student": asdict(adaptor.student),
            "teacher": asdict(adaptor.teacher),
            "token": adaptor.token,
            "tap_names": list(adaptor.tap_names),
        }
    about = {
        "format": FORMAT,
        "agglom": agglom.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "student": {
            "name": student.name,
            "summary_tokens": student.tokens,
            "registers": student.registers,
            "vit": student.is_vit,
            "module": _foreign(timm.models.model_entrypoint(_architecture(student)).__module__),
        },
        "input": {**student.input.as_dict(), "size": [size, size]},
        "steps": step,
        "teachers": teachers["teachers"],
        "adaptors": list(heads),
        **(training_record(run) if run else {}),
    }
    _save_backbone(student, out, about)
    save_file(tensors, out / "adaptors.safetensors")
    _write_json(out / "adaptors.json", entries)
    _write_json(out / "agglom.json", about)
    for path in out.glob("*.safetensors"):  # safetensors keeps them to their owner; a hand-over is for others
        path.chmod((out / "agglom.json").stat().st_mode & 0o777)
    return write_card(out, run)


def _architecture(student: TimmStudent) -> str:
    return str(cast(Any, student.backbone).pretrained_cfg["architecture"])


def _foreign(module: str) -> str | None:
    """The name of a user's own module, which has to be imported before an export that needs it is loaded."""
    return None if module.split(".")[0] in ("agglom", "timm") else module


def _save_backbone(student: TimmStudent, out: Path, about: Mapping[str, Any]) -> None:
    """config.json and model.safetensors, which say nothing of the weights that the architecture's name stands for."""
    backbone: Any = fold_weights(copy.deepcopy(student.backbone))  # plain timm knows no other weights
    licence = licence_of(about)
    foreign = ("hf_hub_id", "url", "file", "origin_url", "paper_name", "paper_ids", "notes", "description", "license")
    own = {key: value for key, value in backbone.pretrained_cfg.items() if key not in foreign}
    backbone.pretrained_cfg = {**own, "tag": "agglom", **({"license": licence.name.lower()} if licence else {})}
    data_config = {
        "input_size": (3, about["input"]["size"][0], about["input"]["size"][1]),
        "mean": student.input.mean,
        "std": student.input.std,
        "interpolation": student.input.interpolation,
        "crop_pct": 1.0,
    }
    backbone.to(memory_format=torch.contiguous_format)  # safetensors takes nothing else
    save_for_hf(backbone, str(out), data_config=data_config, safe_serialization=True)
    config = _read_json(out / "config.json")
    config.get("model_args", {}).pop("num_classes", None)  # said above it too; transformers would hand it over twice
    _write_json(out / "config.json", config)


def write_card(folder: Path, run: Path | None = None) -> Path:
    """Write the model card (README.md) of an export folder anew.

    Args:
        folder: the export.
        run: the run directory that it came from; its report goes in, if it is of exactly these weights.
    """
    about, entries = _read_json(folder / "agglom.json"), _read_json(folder / "adaptors.json")
    report = _report_of(folder, run) if run else None
    (folder / "README.md").write_text(model_card(about, entries, report), encoding="utf-8")
    return folder


def note(folder: Path, run: Path | None = None, **facts: Any) -> None:
    """Enter more about an export into its agglom.json and model card.

    Args:
        folder: the export.
        run: see `write_card`.
        facts: "formats": further files, name -> what there is to say; "hub": name of its repository.
    """
    _write_json(folder / "agglom.json", {**_read_json(folder / "agglom.json"), **facts})
    write_card(folder, run)


def _report_of(folder: Path, run: Path) -> dict[str, Any] | None:
    """The run's report, if it is of the weights in this folder: they may be of another checkpoint."""
    whole = run / "export"
    if not (run / "probes" / "report.json").is_file() or not (whole / "agglom.json").is_file():
        return None
    from agglom.probes import read_report, weights_hash

    report, _ = read_report(run)
    probed = report["provenance"]["models"][report["student"]]["fingerprint"]
    same = (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    return report if same and weights_hash(load(whole)) == probed else None


def fold_normalizers(head: nn.Module) -> Adaptor:
    """A copy of a head's adaptor whose outputs are in the teacher's own units."""
    adaptor = cast(Adaptor, copy.deepcopy(head.adaptor)).float().cpu()
    normalizers = cast(nn.ModuleDict, copy.deepcopy(head.normalizers)).cpu()
    for kind, layer in adaptor.last_linears().items():
        if layer is not None:
            # A head that upsamples by u has u * u outputs a channel.
            normalizers[kind].fold_into(layer, repeats=len(layer.weight) // normalizers[kind].dim)
    return adaptor.eval()


class Exported(nn.Module):
    """An export, ready for use: `model(images)` for features, `model.adaptors["clip"](images)` for a teacher's space.

    Attributes:
        input: the input contract.
        adaptors: name of a teacher -> callable, images (B, 3, H, W) in [0, 1] -> Features in that teacher's own units,
            the map at the student's grid.
        about: what agglom.json says.
    """

    student: TimmStudent
    about: dict[str, Any]

    def __init__(self, student: TimmStudent, adaptors: Mapping[str, Adaptor], about: dict[str, Any]) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleDict(adaptors)
        self.about = about
        self.towers: dict[str, TextTower] = {}  # by teacher, once they were asked for
        self.words: tuple[Any, Tensor] = (None, torch.empty(0))  # the last texts and their embeddings
        self.eval()

    @property
    def input(self) -> InputSpec:
        return self.student.input

    def forward_features(self, images: Tensor, taps: tuple[str, ...] = ()) -> StudentFeatures:
        """images (B, 3, H, W) in [0, 1] -> summary tokens (B, K, D), map (B, C, H', W'), taps."""
        check_images(images, self.student)
        return self.student(images, taps)

    def zero_shot(
        self,
        images: Tensor,
        texts: Sequence[str],
        *,
        adaptor: str | None = None,
        tower: TextTower | None = None,
        templates: str | Sequence[str] = ("{}",),
    ) -> Tensor:
        """How well each text fits each image, through the adaptor for an image-text teacher and its text tower.

        The tower is built from the teacher's own reference when it is first asked for, which may need the hub.

        Args:
            images: (B, 3, H, W) in [0, 1].
            texts: N texts, such as ["a dog", "a cat"].
            adaptor: the teacher whose space to compare in; left out: the only one that has a text tower.
            tower: a text tower of that space, instead of the teacher's own.
            templates: prompts that each text is put into, whose embeddings are averaged: a list with one {} each,
                "simple", "full", or a file. Left out: the text alone.

        Returns:
            (B, N) logits: the cosine times the teacher's own temperature (plus its bias, for SigLIP). `softmax(1)`
            makes them probabilities.

        Raises:
            UserError: no such adaptor, or none with a text tower; a tower that can't be built.
        """
        from agglom.zero_shot import zero_shot

        return zero_shot(self, images, texts, adaptor=adaptor, tower=tower, templates=templates)

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W) in [0, 1] -> all summary tokens side by side (B, K * D), map (B, C, H', W')."""
        return self.answer(images).features

    def answer(self, images: Tensor, *, blocks: int = 0, adaptors: Sequence[str] = ()) -> Answer:
        """As `forward`, with the last blocks and the spaces of these teachers out of one pass of the student."""
        heads = {name: self.adaptors[name].adaptor for name in adaptors}
        check_images(images, self.student)
        last = self.student.tap_names[-blocks:] if blocks else ()
        wanted = {*last, *(tap for head in heads.values() for tap in head.taps)}
        features = self.student(images, tuple(tap for tap in self.student.tap_names if tap in wanted))
        return Answer(
            Features(features.summary.flatten(1), features.spatial),
            [self.student.normed(*features.taps[tap]) for tap in last],
            {name: head(features) for name, head in heads.items()},
        )

    @property
    def adaptors(self) -> Mapping[str, ThroughAdaptor]:
        return _Adaptors(self)


class ThroughAdaptor:
    """The student through one adaptor: images -> Features in that teacher's space. A Backbone like any other."""

    def __init__(self, exported: Exported, name: str) -> None:
        self.exported, self.adaptor = exported, cast(Adaptor, exported.heads[name])

    @property
    def input(self) -> InputSpec:
        return self.exported.input

    def __call__(self, images: Tensor, grid: tuple[int, int] | None = None) -> Features:
        """images (B, 3, H, W) in [0, 1] -> Features; `grid` (h, w) brings the map to another grid, as a decoder of the
        teacher may want it (SAM's: 64 x 64)."""
        summary, spatial = self.adaptor(self.exported.forward_features(images, tuple(self.adaptor.taps)))
        return Features(summary, spatial if spatial is None or grid is None else align(spatial, grid))

    def answer(self, images: Tensor, *, blocks: int = 0, adaptors: Sequence[str] = ()) -> Answer:
        """As calling it; an adaptor has no blocks of its own."""
        return Answer(self(images), [], {})


class _NoAdaptor(UserError, KeyError):
    """A KeyError as a mapping owes it, that reads well when it reaches the user."""

    __str__ = Exception.__str__  # KeyError's own puts the message into quotes


class _Adaptors(Mapping[str, ThroughAdaptor]):
    def __init__(self, exported: Exported) -> None:
        self.exported = exported

    def __getitem__(self, name: str) -> ThroughAdaptor:
        if name not in self.exported.heads:
            kept = nearest(name, self.exported.heads)
            raise _NoAdaptor(f"adaptor {name!r}; {kept}; `agglom export --adaptors` decides which go along")
        return ThroughAdaptor(self.exported, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.exported.heads)

    def __len__(self) -> int:
        return len(self.exported.heads)


def load(path: str | Path) -> Exported:
    """Load an export folder, or a run directory that holds one.

    Raises:
        UserError: no such folder, or a file of it is missing or unreadable.
    """
    folder = Path(path)
    if (folder / "export").is_dir():
        folder = folder / "export"
    about = _read_json(folder / "agglom.json")
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / 'agglom.json'}: format {about.get('format')!r:.40}; valid: {FORMAT}; export again")
    try:
        return _load(folder, about)
    except UserError:
        raise
    except Exception as err:  # the files of an export contradict each other: whatever timm and torch say of it
        said = f"no {err}" if isinstance(err, KeyError) else brief(err)
        raise UserError(f"{folder}: broken export ({said}); export the run again") from err


def _load(folder: Path, about: dict[str, Any]) -> Exported:
    student = _student(folder, about)
    tensors = _read_tensors(folder / "adaptors.safetensors")
    adaptors: dict[str, Adaptor] = {}
    for name, entry in _read_json(folder / "adaptors.json").items():
        adaptor = _build_adaptor(entry)
        prefix = f"{name}."
        adaptor.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        adaptors[name] = adaptor
    return Exported(student, adaptors, about)


def random_like(exported: Exported, seed: int = 0) -> Exported:
    """The same student and adaptors before any training: the reference that a probe has to beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        entry = exported.about["student"]
        options = dict(exported.student.backbone._model_args)
        student = TimmStudent(
            name=entry["name"],
            summary_tokens=entry["summary_tokens"],
            registers=entry["registers"],
            kwargs={key: value for key, value in options.items() if key not in ("num_classes", "reg_tokens")},
            mean=exported.input.mean,
            std=exported.input.std,
        )
        adaptors = {
            name: type(head)(head.student, head.teacher, head.token, head.tap_names, **head.options)
            for name, head in ((name, cast(Adaptor, head)) for name, head in exported.heads.items())
        }
    return Exported(student, adaptors, {**exported.about, "steps": 0})


def _student(folder: Path, about: dict[str, Any]) -> TimmStudent:
    architecture = str(_read_json(folder / "config.json").get("architecture"))
    if not timm.is_model(architecture):
        own = about["student"].get("module") or "the module that registers it"
        raise UserError(
            f"{folder}: timm knows no model {architecture!r}; import {own} before it is loaded; commands do so by "
            "themselves for a run directory"
        )
    _read_tensors(folder / "model.safetensors")  # mapped, not copied
    entry = about["student"]
    student = TimmStudent(
        name=f"local-dir:{folder}",
        pretrained=True,
        summary_tokens=entry["summary_tokens"],
        registers=entry["registers"],
    )
    student.name = entry["name"]
    return student


def _build_adaptor(entry: dict[str, Any]) -> Adaptor:
    """By class name among the adaptors that are imported; nothing else is imported on a file's word."""
    known = {cls.__name__: cls for cls in _subclasses(Adaptor)}
    if entry["class"] not in known:
        own = entry.get("module") or "yours"
        raise UserError(
            f"adaptors.json: class {entry['class']!r}; {nearest(entry['class'], known)}; import {own} first"
        )
    sides: list[dict[str, Any]] = [dict(entry["student"]), dict(entry["teacher"])]
    student, teacher = (Dims(**{**side, "taps": tuple(map(tuple, side["taps"]))}) for side in sides)
    return known[entry["class"]](student, teacher, entry["token"], entry["tap_names"], **entry["options"])


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as err:
        raise UserError(
            f"{path}: missing; give an export folder or a run directory with one (`agglom export`)"
        ) from err
    except ValueError as err:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({brief(err)}); export the run again") from err
    except (OSError, RecursionError) as err:
        raise UserError(f"{path}: can't be read ({brief(err)}); export the run again") from err
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object; export the run again")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as err:
        raise UserError(f"{path}: missing; export the run again") from err
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path}: broken ({brief(err)}); export the run again") from err


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
