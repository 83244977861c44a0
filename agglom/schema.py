"""Does a plain value fit a type? All problems at once, each under its full key.

jsonargparse, which builds the objects later, stops at the first problem; this walks on. It knows what agglom's own
signatures are made of (dataclasses, classes given as class_path and init_args, factories, mappings) and leaves every
other type to jsonargparse.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from importlib import import_module
from typing import Any, Iterator, Literal, Mapping

from agglom.errors import nearest
from agglom.parsing import denied, parser

_UNION = (typing.Union, types.UnionType)


def problems(key: str, value: Any, kind: Any) -> Iterator[str]:
    """One line for each way in which `value`, found under `key`, does not fit `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is inspect.Parameter.empty:
        yield from _plain(key, value)
        return
    if origin in _UNION:
        if value is None and type(None) in arguments:
            return
        options = [option for option in arguments if option is not type(None)]
        words = {word for option in options for word in typing.get_args(option) if typing.get_origin(option) is Literal}
        classes = [option for option in options if _ours(option)]
        if len(options) == 1:
            yield from problems(key, value, options[0])
        elif len(classes) == 1:  # what is wrong with it says more than what else there might have been
            if not isinstance(value, str) or value not in words:
                yield from problems(key, value, classes[0])
        elif all(list(problems(key, value, option)) for option in options):
            yield f"{key}: {_show(value)}; valid: {_name(kind)}; change it"
    elif origin is Literal:
        if value not in arguments:
            yield f"{key}: {_show(value)}; {nearest(str(value), map(str, arguments))}; take one"
    elif origin is collections.abc.Callable:
        yield from _instance(key, value, arguments[1], given=len(arguments[0]))
    elif dataclasses.is_dataclass(kind):
        yield from _arguments(key, value, kind)
    elif origin is list and dataclasses.is_dataclass(arguments[0]):
        if not isinstance(value, list):
            yield f"{key}: {_show(value)}; valid: a list of mappings; change it"
            return
        for position, item in enumerate(value):
            yield from problems(f"{key}.{position}", item, arguments[0])
    elif origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            yield f"{key}: {_show(value)}; valid: a mapping; change it"
            return
        for name, item in value.items():
            yield from problems(f"{key}.{name}", item, arguments[1])
    elif _ours(kind):
        yield from _instance(key, value, kind, given=0)
    elif value is None or not _parses(value, kind):  # jsonargparse takes null for anything
        yield f"{key}: {_show(value)}; valid: {_name(kind)}; change it"


def signature_problems(key: str, value: Any, callable_: Any, *, given: int = 0) -> Iterator[str]:
    """The same for the arguments of a class or function; the first `given` are filled in by the caller."""
    yield from _arguments(key, value, callable_, given=given)


def find_class(path: str, base: type) -> type | None:
    """The class a class_path names: a dotted path, or the bare name of an imported subclass of `base`; else None.

    A dotted path is imported to see what it is, unless `agglom.parsing` forbids it.
    """
    module, _, name = path.rpartition(".")
    if not module:
        return {cls.__name__: cls for cls in [base, *_subclasses(base)]}.get(name)
    if denied(path) or not all(part.isidentifier() for part in path.split(".")):
        return None
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit):  # noqa: BLE001  whatever a module does when it is imported
        return None
    return found if inspect.isclass(found) else None


def denied_classes(config: Any, key: str = "") -> list[str]:
    """A line for each class_path anywhere in plain data that must not even be imported, as every parser does."""
    if isinstance(config, list):
        return [line for number, item in enumerate(config) for line in denied_classes(item, f"{key}.{number}")]
    if not isinstance(config, Mapping):
        return []
    path = config.get("class_path")
    lines = [
        line for name, item in config.items() for line in denied_classes(item, f"{key}.{name}" if key else str(name))
    ]
    if isinstance(path, str) and denied(path):
        lines.append(f"{key}.class_path: {path}: not to be named by a configuration; take a class made for this place")
    return lines


def _ours(kind: Any) -> bool:
    return inspect.isclass(kind) and kind.__module__.split(".")[0] == "agglom"


def _instance(key: str, value: Any, base: type, *, given: int) -> Iterator[str]:
    """A class, by class_path and init_args or by its path alone."""
    entry = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        yield f"{key}: {_show(value)}; valid: a mapping with class_path and init_args, of a {base.__name__}; change it"
        return
    for name in set(entry) - {"class_path", "init_args"}:
        yield f"{key}.{name}: unknown key; valid: class_path, init_args (options belong under init_args)"
    cls = find_class(str(entry["class_path"]), base)
    if cls is None or not issubclass(cls, base):
        forbidden = denied(str(entry["class_path"]))
        prefix = "" if forbidden else str(entry["class_path"]).rpartition(".")[0]
        valid = {
            f"{prefix}.{c.__name__}" if prefix else c.__name__ for c in _subclasses(base) if not inspect.isabstract(c)
        }
        reason = "unknown class" if cls is None else f"no {base.__name__}"
        if forbidden:
            reason = "not to be named by a configuration"
        yield f"{key}.class_path: {entry['class_path']}: {reason}; {nearest(str(entry['class_path']), valid)}; take one"
        return
    yield from _arguments(f"{key}.init_args", entry.get("init_args") or {}, cls, given=given)


def _plain(key: str, value: Any) -> Iterator[str]:
    """Options of plain values build nothing."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield f"{key}.class_path: {_show(value['class_path'])}; valid: plain values, no classes; remove it"
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _plain(f"{key}.{name}", item)


def _arguments(key: str, value: Any, callable_: Any, *, given: int = 0) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{key}: {_show(value)}; valid: a mapping of options; change it"
        return
    target = callable_.__init__ if inspect.isclass(callable_) else callable_
    hints = typing.get_type_hints(target)
    parameters = [p for p in inspect.signature(target).parameters.values() if p.name != "self"][given:]
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for name, item in value.items():
        if name in named and item is None and named[name].default is None:
            continue  # as good as left out, whatever the annotation
        if name in named:
            yield from problems(f"{key}.{name}", item, hints.get(name, Any))
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters):
            yield f"{key}.{name}: unknown key; {nearest(str(name), named)}; rename or remove it"
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in value:
            yield f"{key}.{name}: missing; valid: {_name(hints.get(name, Any))}; add the key"


def _parses(value: Any, kind: Any) -> bool:
    one = parser()
    one.add_argument("--value", type=kind)
    try:
        one.parse_object({"value": value})
    except Exception:  # noqa: BLE001  whatever it raises means: no
        return False
    return True


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _name(kind: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNION:
        return " or ".join("null" if option is type(None) else _name(option) for option in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (list, tuple, dict):
        inner = ", ".join(_name(a) if a is not ... else "..." for a in arguments)
        return f"{origin.__name__} of ({inner})"
    return getattr(kind, "__name__", str(kind))
