"""Plain values against types: all problems at once, each under its full key."""

from dataclasses import dataclass
from typing import Any, Callable, Literal

import pytest

from agglom.objectives import Loss
from agglom.schema import find_class, problems, signature_problems


@dataclass
class Options:
    """Some options."""

    rate: float
    kind: Literal["low", "high"] = "low"
    pair: tuple[int, int] = (1, 2)
    inner: dict[str, int] | None = None


@pytest.mark.parametrize(
    "value, kind",
    [
        (1, int),
        (1, float),
        (None, int | None),
        ([1, 2], tuple[int, int]),
        ({"a": 1}, dict[str, int]),
        ("low", Literal["low", "high"]),
        ({"rate": 1e-3, "inner": None}, Options),
        ("agglom.objectives.Cosine", Callable[[], Loss]),
        ({"class_path": "Cosine"}, Callable[[], Loss]),
        (3, bool | int),
    ],
)
def test_what_fits(value, kind):
    assert list(problems("key", value, kind)) == []


@pytest.mark.parametrize(
    "value, kind, starts",
    [
        ("x", int, ["key: 'x'; valid: int"]),
        (1.5, int, ["key: 1.5; valid: int"]),
        (None, int, ["key: None; valid: int"]),
        ([1], tuple[int, int], ["key: [1]; valid: tuple of (int, int)"]),
        ([1], dict[str, int], ["key: [1]; valid: a mapping"]),
        ({"a": "x", "b": 1, "c": "y"}, dict[str, int], ["key.a: 'x'", "key.c: 'y'"]),
        ("lwo", Literal["low", "high"], ["key: 'lwo'; valid: high, low (did you mean low?)"]),
        ("x", int | bool, ["key: 'x'; valid: int or bool"]),
        ({}, Options, ["key.rate: missing; valid: float"]),
        ({"rate": 1, "raet": 2, "pair": 3}, Options, ["key.raet: unknown key", "key.pair: 3"]),
        ({"class_path": "Cosinus"}, Callable[[], Loss], ["key.class_path: Cosinus: unknown class"]),
        (
            {"class_path": "Cosine", "eps": 1},
            Callable[[], Loss],
            ["key.eps: unknown key; valid: class_path, init_args"],
        ),
        (7, Callable[[], Loss], ["key: 7; valid: a mapping with class_path"]),
        ("torch.nn.Linear", Callable[[], Loss], ["key.class_path: torch.nn.Linear: no Loss"]),
        ("os.system", Callable[[], Loss], ["key.class_path: os.system: not to be named by a configuration"]),
        ({"a": [{"class_path": "torch.nn.Linear"}]}, dict[str, Any], ["key.a.0.class_path: 'torch.nn.Linear'; valid"]),
    ],
)
def test_what_does_not(value, kind, starts):
    found = list(problems("key", value, kind))
    assert len(found) == len(starts), found
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True)), found


def test_arguments_that_the_caller_fills_in_are_not_missing():
    def build(dims, *, width: int):
        """Build."""

    assert list(signature_problems("k", {"width": 3}, build, given=1)) == []
    assert [line.split(":")[0] for line in signature_problems("k", {"dims": 3}, build, given=1)] == [
        "k.dims",
        "k.width",
    ]


def test_find_class():
    assert find_class("agglom.objectives.Cosine", Loss) is find_class("Cosine", Loss)
    assert find_class("agglom.nowhere.Cosine", Loss) is None and find_class("Nobody", Loss) is None
