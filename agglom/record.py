"""What an export says of the training that it came from, as far as a run directory tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Mapping

import yaml

from agglom.errors import UserError

# of a run's config.yaml, what is about the machine rather than the recipe (a logger may hold a key)
LOCAL = {
    "trainer": ("default_root_dir", "logger", "devices", "num_nodes", "accelerator"),
    "": ("ckpt_path", "overwrite"),
}


def training_record(run: Path) -> dict[str, Any]:
    """Recipe and data of a run, ready for JSON.

    Args:
        run: the run directory.

    Returns:
        {"recipe": its configuration without what is about the machine, "data": address, and from the index: source,
        licence, classes, counts, "sources": name -> the same, where there are several}, or nothing where it has no
        config.yaml.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = {
        key: {k: v for k, v in value.items() if k not in LOCAL.get(key, ())} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in LOCAL[""]
    }
    data = config.get("data") or {}
    record = {"recipe": _clean(recipe), **({"data": _data(data["data"])} if "data" in data else {})}
    if data.get("sources"):  # then `data` is what was validated on
        record["sources"] = {name: _data(entry["data"]) for name, entry in data["sources"].items()}
    return record


def resolutions(about: Mapping[str, Any]) -> list[int]:
    """Pixels of a side that the student was trained at, ascending."""
    recipe = about.get("recipe", {})
    found: set[int] = set()
    for stage in recipe.get("stages") or [{}]:
        for part in stage.get("partitions") or [{}]:
            merged = {**stage, **part}
            found |= set(merged.get("resolutions") or [merged.get("size") or about["input"]["size"][0]])
    return sorted(found)


def objectives(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how) of the parts that made up the loss, in words from the configuration."""
    model = about.get("recipe", {}).get("model", {})
    named = [
        ("summary loss", model.get("summary_loss")),
        ("map loss", model.get("spatial_loss")),
        ("normaliser", model.get("normalizer")),
        ("adaptor", model.get("adaptor")),
        ("balance of the teachers", model.get("balance")),
    ]
    named += [(f"objective {name}", entry) for name, entry in (model.get("objectives") or {}).items()]
    for name, teacher in (model.get("teachers") or {}).items():
        for key in ("summary_loss", "spatial_loss", "normalizer", "adaptor"):
            named.append((f"{key.replace('_', ' ').replace('spatial', 'map')} of {name}", teacher.get(key)))
    return [(what, _spelled(entry)) for what, entry in named if isinstance(entry, dict) and "class_path" in entry]


def _data(address: str) -> dict[str, Any]:
    from agglom.data import read_index

    out: dict[str, Any] = {"address": _scrub(address)}
    try:
        index = read_index(address)
    except (UserError, OSError):  # moved since: the card says that nothing is known
        return out
    counts, classes = dict(index.counts), list(index.classes or ())
    return {**out, "source": index.source, "licence": index.licence, "classes": classes, "counts": counts}


def _spelled(entry: Mapping[str, Any]) -> str:
    """`Name(key=value, ...)`, of what is set."""
    options = {key: value for key, value in (entry.get("init_args") or {}).items() if value is not None}
    return f"{entry['class_path'].rpartition('.')[2]}({', '.join(f'{k}={v}' for k, v in options.items())})"


def _clean(value: Any) -> Any:
    """Without passwords in addresses."""
    if isinstance(value, dict):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return _scrub(value)


def _scrub(value: Any) -> Any:
    return re.sub(r"://[^/@\s]+@", "://***@", value) if isinstance(value, str) else value
