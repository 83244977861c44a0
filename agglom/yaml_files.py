"""YAML as plain data, from files that may have been made to hurt.

Tags that build objects are refused (PyYAML's safe loader). So is what grows: a kilobyte of aliases or of `${KEY}` can
stand for more text than a machine holds, and nesting for more calls than Python allows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterable, Iterator

import yaml

from agglom.errors import UserError, brief

MAX_BYTES = 1 << 20  # of a file
MAX_VALUES = 20_000  # once all aliases are written out
MAX_DEPTH = 64
MAX_CHARACTERS = 1 << 20  # once all interpolations are written out
MAX_INTERPOLATIONS = 100

Keys = tuple[str, ...]  # the way to a value

_INTERPOLATION = re.compile(r"\$\{([^{}]*)\}")


def read_text(path: Path) -> str:
    """The text of a file of at most `MAX_BYTES`.

    Raises:
        UserError: it can't be read, is longer, or is not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"more than {MAX_BYTES} bytes; valid: a configuration; take another file")
        return data.decode("utf-8")
    except OSError as err:
        raise UserError(f"can't be read ({err.strerror or err}); take another file") from err
    except UnicodeDecodeError as err:
        raise UserError(f"not YAML: {brief(err)}; mend the file") from err


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """YAML -> plain data and the nodes that it was made of.

    Raises:
        UserError: not YAML, a tag that isn't plain data, or more than the limits of this file.
    """
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        if tree is None:
            return None, None
        _weigh(tree, {}, 0)
        return yaml.constructor.SafeConstructor().construct_document(tree), tree  # type: ignore[no-untyped-call]
    except UserError:
        raise
    except RecursionError as err:
        raise UserError(f"not YAML for a configuration: nested deeper than {MAX_DEPTH}; mend the file") from err
    except Exception as err:  # noqa: BLE001  beside its own errors PyYAML raises those of int(), date(), ...
        raise UserError(f"not YAML: {brief(err)}; mend the file") from err


def _weigh(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node has with all aliases written out; -1 marks those that are being weighed."""
    if depth > MAX_DEPTH:
        raise UserError(f"not YAML for a configuration: nested deeper than {MAX_DEPTH}; mend the file")
    weight = known.get(id(node), 0)
    if weight < 0:
        raise UserError("not YAML for a configuration: a value holds itself; mend the file")
    if weight:
        return weight
    known[id(node)] = -1
    weight = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            parts = item if isinstance(item, tuple) else (item,)
            weight += sum(_weigh(part, known, depth + 1) for part in parts)
            if weight > MAX_VALUES:
                raise UserError(f"not YAML for a configuration: more than {MAX_VALUES} values; mend the file")
    known[id(node)] = weight
    return weight


def check_interpolations(raw: Any) -> None:
    """Refuse `${KEY}` that stand for too much.

    Raises:
        UserError: too many, one inside of another one, or more than `MAX_CHARACTERS` once they are written out.
    """
    texts = dict(_leaves(raw, ()))
    number = sum(text.count("${") for text in texts.values())
    if number > MAX_INTERPOLATIONS:
        raise UserError(f"interpolation: {number} of them; valid: up to {MAX_INTERPOLATIONS}; write the values out")
    known: dict[Keys, int] = {}  # characters of a text; those of a cycle, which OmegaConf refuses, are any number

    def length(keys: Keys) -> int:
        if keys in known:
            return known[keys]
        text = texts[keys]
        known[keys] = len(text)
        names = _INTERPOLATION.findall(text)
        if text.count("${") != len(names):
            raise UserError(f"interpolation: {'.'.join(keys)}: {text!r:.60}; valid: ${{KEY}}, none inside; mend it")
        known[keys] += sum(length(there) for name in names for there in _referred(name, keys, texts))
        if known[keys] > MAX_CHARACTERS:
            raise UserError(f"interpolation: {'.'.join(keys)}: more than {MAX_CHARACTERS} characters; mend the file")
        return known[keys]

    if sum(map(length, texts)) > MAX_CHARACTERS:
        raise UserError(f"interpolation: more than {MAX_CHARACTERS} characters in all; mend the file")


def _referred(name: str, keys: Keys, texts: Iterable[Keys]) -> list[Keys]:
    """The texts that `${name}` at `keys` means: `a.b`, `a[0]`, or `.b` of the mapping it stands in."""
    dots = len(name) - len(name.lstrip("."))
    target = keys[: max(len(keys) - dots, 0)] if dots else ()
    target += tuple(part for part in re.split(r"[.\[\]]", name) if part)
    return [there for there in texts if there[: len(target)] == target]


def _leaves(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """All values that are no mappings or lists, as text."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*keys, str(key)))
    else:
        yield keys, str(value)
