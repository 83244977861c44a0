"""YAML files and `--key value` overrides as plain data, for a check of what a command line says as a whole.

jsonargparse, which does the parsing proper, stops at the first problem and speaks of its own types; when it refuses a
command line, this gives `agglom.checks` something to find all problems in.
"""

from __future__ import annotations

from typing import Any, Sequence

from agglom.checks import numbers, read_yaml
from agglom.errors import UserError
from agglom.yaml_files import parse

CONFIG = ("-c", "--config")


def stated(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the arguments of `agglom fit` say, and a line for each key that a file gives twice or word that is lost.

    Raises:
        UserError: a file is missing or not YAML.
    """
    config: dict[str, Any] = {}
    lines: list[str] = []
    rest = list(args)
    while rest:
        option, given, text = rest.pop(0).partition("=")
        if not option.startswith("-"):
            lines.append(f"{option}: neither an option nor the value of one; valid: --KEY VALUE; remove it")
            continue
        if not given:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if option in CONFIG:
            try:
                found, twice = read_yaml(text)
            except UserError as err:
                raise UserError(str(err) if str(err).startswith(text) else f"{text}: {err}") from err
            config = _merge(config, found)
            lines += [f"{text}: {line}" for line in twice]
        else:
            _set(config, option.lstrip("-").rstrip("+").split("."), _value(text), append=option.endswith("+"))
    return config, lines


def _value(text: str) -> Any:
    try:
        return numbers(parse(text)[0])
    except UserError:
        return text


def _merge(old: Any, new: Any) -> Any:
    """Mappings key by key; anything else, and the options of another class, replace what was there."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "class_path" in new and new["class_path"] != old.get("class_path"):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def _set(config: dict[str, Any], keys: Sequence[str], value: Any, *, append: bool) -> None:
    """`model.student.name` means `model.student.init_args.name`, as it does to jsonargparse."""
    here = config
    for position, key in enumerate(keys):
        if "class_path" in here and key not in ("class_path", "init_args"):
            here = here.setdefault("init_args", {})
        if position < len(keys) - 1:
            if not isinstance(here.get(key), dict):
                here[key] = {"class_path": here[key]} if isinstance(here.get(key), str) else {}
            here = here[key]
        elif append:
            here[key] = [*(here.get(key) or ()), *(value if isinstance(value, list) else [value])]
        else:
            here[key] = _merge(here.get(key), value)
