"""What a run directory or a model reference holds, brought back to life."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from agglom.errors import UserError, brief, nearest
from agglom.export import Exported, load
from agglom.features import Backbone
from agglom.schema import denied_classes, problems, signature_problems
from agglom.teachers import CachedTeacher, Teacher, from_ref
from agglom.yaml_files import parse, read_text

if TYPE_CHECKING:
    from agglom.distiller import Distiller


@dataclass
class Run:
    """A finished training.

    Attributes:
        path: the run directory.
        config: its config.yaml.
        student: its export.
        teachers: name -> the frozen encoder, built again from the config.
    """

    path: Path
    config: dict[str, Any]
    student: Exported
    teachers: dict[str, Teacher]


def load_run(path: str | Path) -> Run:
    """Load a run directory with an export.

    Raises:
        UserError: not a run directory, it has no export yet, or a class of it can't be imported.
    """
    path = Path(path)
    config = read_config(path / "config.yaml")
    _import_classes(config, path)
    return Run(path, config, load(path), build_teachers(config))


def read_config(path: Path) -> dict[str, Any]:
    """A run's resolved YAML.

    Raises:
        UserError: missing, not YAML, or without the sections of a run.
    """
    if not path.exists():
        raise UserError(f"{path}: missing; give a run directory, as `agglom fit` leaves it")
    try:
        config = parse(read_text(path))[0]
    except UserError as err:
        raise UserError(f"{path}: {err}") from err
    sections = [config.get(key) if isinstance(config, dict) else None for key in ("model", "data")]
    if not all(isinstance(section, dict) for section in sections) or not isinstance(sections[0].get("teachers"), dict):
        raise UserError(f"{path}: no configuration of a run (model with teachers, and data); give a run directory")
    return config


def _import_classes(config: Any, run: Path) -> None:
    """Import what a run's config names, so that the user's own students and adaptors are known when it is loaded.

    Raises:
        UserError: it names what a configuration may not, or something that can't be imported.
    """
    for line in denied_classes(config):
        raise UserError(f"{run / 'config.yaml'}: {line}")
    _import(config)


def _import(value: Any) -> None:
    for name, item in value.items() if isinstance(value, dict) else ():
        if name == "class_path" and isinstance(item, str) and "." in item:
            try:
                import_module(item.rpartition(".")[0])
            except (ImportError, TypeError, ValueError) as err:  # "..os" is no name at all
                raise UserError(f"{item}: can't be imported ({brief(err)}); put its folder on PYTHONPATH") from err
        _import(item)
    if isinstance(value, list):
        for item in value:
            _import(item)


def _trained_parts(config: dict[str, Any]) -> dict[str, Any]:
    """What an export's student and adaptors are made of, at its place in a run's config."""

    def parts(entry: Any) -> dict[str, Any]:
        return {key: entry.get(key) for key in ("student", "adaptor")} if isinstance(entry, dict) else {}

    model = config["model"]
    return {"model": {**parts(model), "teachers": {name: parts(entry) for name, entry in model["teachers"].items()}}}


def build_teachers(config: dict[str, Any]) -> dict[str, Teacher]:
    """The encoders of a run's config, without student or data."""
    from agglom.parsing import parser

    entries = parser()
    entries.add_argument("--encoder", type=Teacher)
    built = {}
    for name, entry in config["model"]["teachers"].items():
        _refuse(problems(f"model.teachers.{name}.encoder", entry["encoder"], Teacher))
        encoder = entries.instantiate(entries.parse_object({"encoder": entry["encoder"]})).encoder
        built[name] = encoder.original() if isinstance(encoder, CachedTeacher) else encoder
    return built


def resolve(ref: str) -> Backbone:
    """A model reference: `timm:NAME`, `open_clip:NAME/TAG`, `tiny:clip`, or the path of an export or a run."""
    path = Path(ref)
    if (path / "config.yaml").is_file() and (path / "export").is_dir():  # of a run, student and adaptors alone
        _import_classes(_trained_parts(read_config(path / "config.yaml")), path)
    if path.exists():
        return load(ref)
    if ":" not in ref:
        raise UserError(f"model {ref!r}: no such folder; valid: timm:NAME, open_clip:NAME/TAG, tiny:NAME, or a path")
    return from_ref(ref)


def build_distiller(config: dict[str, Any]) -> Distiller:
    """The training module of a run's config, with fresh weights."""
    from agglom.distiller import Distiller
    from agglom.parsing import parser

    _refuse(signature_problems("model", config["model"], Distiller))
    whole = parser()
    whole.add_class_arguments(Distiller, "model")
    return whole.instantiate(whole.parse_object({"model": config["model"]})).model


def _refuse(problems: Iterator[str]) -> None:
    """A run's own file was checked before it was trained; a run of somebody else's may hold anything."""
    if line := next(problems, None):
        raise UserError(f"config.yaml: {line}")


def export_checkpoint(ckpt: Path, out: Path, adaptors: Sequence[str] | None = None) -> Path:
    """Write the export of a checkpoint (the averaged weights where it holds them).

    Args:
        ckpt: RUN/checkpoints/NAME.ckpt, or the run directory for its newest.
        out: the folder to write.
        adaptors: teachers whose adaptors go along; None for all.

    Raises:
        UserError: no such checkpoint, or it can't be read; an adaptor that the run doesn't have.
    """
    from agglom.callbacks import Unreadable, export_module, newest, read_checkpoint
    from agglom.teachers import manifest

    fix = "give RUN/checkpoints/last.ckpt or a run directory that holds one"
    if not ckpt.exists():
        raise UserError(f"ckpt: {ckpt} does not exist; {fix}")
    try:
        path, state = newest(ckpt)[:2] if ckpt.is_dir() else (ckpt, read_checkpoint(ckpt))
    except Unreadable as err:
        reason = str(err) if ckpt.is_dir() else f"{ckpt} can't be read ({err})"
        raise UserError(f"ckpt: {reason}; {fix}") from err
    config = read_config(path.parent.parent / "config.yaml")
    names = list(config["model"]["teachers"])
    for name in adaptors or ():
        if name not in names:
            raise UserError(f"adaptors: {name!r}; {nearest(name, names)}; take some of them, or none")
    module = build_distiller(config)
    try:
        module.load_state_dict(state["state_dict"])
        average = next((c["average"] for n, c in state["callbacks"].items() if n.startswith("WeightEMA") and c), None)
        if average is not None:
            module.trained.load_state_dict(average)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"ckpt: {path} is of another model than its config.yaml ({brief(err)}); {fix}") from err
    return export_module(
        module,
        out,
        manifest(module.frozen),
        config["data"]["size"],
        state["global_step"],
        names if adaptors is None else adaptors,
        run=path.parent.parent,
    )
