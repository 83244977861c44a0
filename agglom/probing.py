"""`agglom probe` and `agglom embed`: which models meet which data, under which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence, cast

import torch

from agglom.data import read_index
from agglom.data.ranks import distributed
from agglom.devices import choose
from agglom.export import Exported, random_like, write_card
from agglom.features import Backbone, TextTower
from agglom.probes import run_probes, write_embeddings, write_report
from agglom.runs import load_run, resolve

STUDENT, RANDOM = "student", "random"


def probe_run(
    run: str | Path,
    *,
    probes: Sequence[str],
    limits: Mapping[str, int | None],
    extra: Sequence[str] = (),
    data: str | None = None,
    out: str | Path | None = None,
    size: int | None = None,
    templates: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Probe a run's student, its teachers, a student before training, and `extra` references.

    Args:
        device: where the models run, see `agglom.devices.choose`.

    Returns:
        The path of report.html.
    """
    place, loaded = choose(device), load_run(run)
    models: dict[str, Backbone] = {STUDENT: loaded.student, **loaded.teachers}
    models |= {RANDOM: random_like(loaded.student, seed), **{ref: resolve(ref) for ref in extra}}
    _move(models, place)
    out = Path(out or Path(run) / "probes")
    data = data or loaded.config["data"]["data"]
    run_probes(
        models,
        data=data,
        templates=_templates(data, templates),
        probes=probes,
        out=out,
        text=_text_towers(loaded.teachers),
        student=STUDENT,
        teachers=list(loaded.teachers),
        random=RANDOM,
        limits={split: count for split, count in limits.items() if count is not None},
        size=size,
        seed=seed,
    )
    page = write_report(out)
    if out == Path(run) / "probes":
        write_card(Path(run) / "export", Path(run))  # it has the numbers now
    return page


def probe_models(
    refs: Sequence[str],
    *,
    data: str,
    out: str | Path,
    probes: Sequence[str],
    limits: Mapping[str, int | None],
    size: int | None = None,
    templates: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Probe models by reference under one protocol.

    Args:
        device: where the models run, see `agglom.devices.choose`.

    Returns:
        The path of report.html.
    """
    place = choose(device)
    models = {ref: resolve(ref) for ref in refs}
    _move(models, place)
    student = next((ref for ref, model in models.items() if isinstance(model, Exported)), refs[0])
    run_probes(
        models,
        data=data,
        templates=_templates(data, templates),
        probes=probes,
        out=Path(out),
        text=_text_towers(models),
        student=student,
        teachers=[ref for ref in refs if ref != student],
        random=None,
        limits={split: count for split, count in limits.items() if count is not None},
        size=size,
        seed=seed,
    )
    return write_report(Path(out))


def embed_model(ref: str, data: str, out: str, *, device: str = "auto", **options: Any) -> str:
    """Vectors of a model by reference.

    Args:
        ref, data, out, options: see `agglom.probes.write_embeddings`.
        device: where the model runs, see `agglom.devices.choose`.

    Returns:
        what was written, in a line; empty in all processes but the first.
    """
    place, model, (rank, world_size) = choose(device), resolve(ref), distributed()
    _move({ref: model}, place)
    return write_embeddings(model, data, out, name=ref, rank=rank, world_size=world_size, **options)


def _move(models: Mapping[str, Backbone], place: torch.device) -> None:
    for model in models.values():
        cast(torch.nn.Module, model).to(place)


def _text_towers(models: Mapping[str, Backbone]) -> dict[str, TextTower]:
    towers = {name: getattr(model, "text", None) for name, model in models.items()}
    return {name: tower for name, tower in towers.items() if isinstance(tower, TextTower)}


def _templates(data: str, asked: str | None) -> str | Sequence[str]:
    """Zero-shot prompts: those asked for, else the data set's own (its index's `extra.templates`), else plain ones."""
    return asked or read_index(data).extra.get("templates", "simple")
