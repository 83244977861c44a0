"""Features and targets of every model and role, as all probes of a report share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from agglom.errors import UserError
from agglom.features import Answer, Backbone, Features, ask
from agglom.probes.base import Probe, in_part
from agglom.probes.extract import Wanted, extract
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.source import Source

ROLES = ("train", "val", "test")


@dataclass
class Gathered:
    """What was read and computed.

    Attributes:
        targets: role -> labels, masks and captions.
        features: model, or "MODEL > TEACHER" -> role -> features.
        through: the "MODEL > TEACHER" among them -> (model, teacher).
        places: the cache folders in use.
    """

    targets: dict[str, Targets] = field(default_factory=dict)
    features: dict[str, dict[str, FeatureSet]] = field(default_factory=dict)
    through: dict[str, tuple[str, str]] = field(default_factory=dict)
    places: set[Path] = field(default_factory=set)


def splits_of(index: Any) -> dict[str, dict[str, Any]]:
    """train, val, test -> `{"split", "rows"}`: which split it is, and "all" or which part of it.

    Without a test split, val is the test; without a val split (or when it became the test), every fifth train sample
    is val and the others train, so that nothing is ever chosen on test.

    Raises:
        UserError: there is no train split, or neither val nor test.
    """
    counts = {split: count for split, count in index.counts.items() if count}
    if "train" not in counts or not {"val", "test"} & set(counts):
        have = ", ".join(sorted(counts)) or "none"
        raise UserError(f"{index.root}: splits {have}; the probes want train, and val or test or both")
    test = "test" if "test" in counts else "val"
    if "val" in counts and test != "val":
        return {role: {"split": role, "rows": "all"} for role in ROLES}
    return {
        "train": {"split": "train", "rows": "4 of 5"},
        "val": {"split": "train", "rows": "every 5th"},
        "test": {"split": test, "rows": "all"},
    }


def gather(
    models: Mapping[str, Backbone],
    source: Source,
    plan: dict[str, dict[str, Any]],
    probes: Sequence[Probe],
    adaptors: Mapping[str, Sequence[str]],
    cache: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Gathered:
    """Extract (or read) everything; writes counts of readable and unreadable samples into the plan.

    Args:
        models: name -> model.
        source: the data.
        plan: from `splits_of`.
        probes: decide whether maps and blocks are kept.
        adaptors: model -> the teachers through whose adaptors it is looked at too.
        cache: folder of the feature cache.
        rank, world_size: see `extract`.
    """
    maps = any(p.spatial and all(f in source.index.fields[plan["test"]["split"]] for f in p.fields) for p in probes)
    blocks = max((probe.blocks for probe in probes), default=0)
    wanted = {
        name: Wanted(model, spatial=maps, blocks=blocks, adaptors=tuple(adaptors.get(name, ())))
        for name, model in models.items()
    }
    out = Gathered(through={f"{n} > {t}": (n, t) for n, want in wanted.items() for t in want.adaptors})
    read: dict[str, tuple[Targets, dict[str, FeatureSet]]] = {}
    for role in ROLES:
        split = plan[role]["split"]
        if split not in read:
            found_targets, found, places = extract(wanted, source, split, cache, rank=rank, world_size=world_size)
            read[split] = found_targets, found
            out.places |= places
        found_targets, found = read[split]
        rows = _part(len(found_targets.keys), plan[role]["rows"])
        out.targets[role] = found_targets if rows is None else found_targets.take(rows)
        plan[role]["count"] = len(out.targets[role].keys)
        plan[role]["unreadable"] = source.rows(split) - len(found_targets.keys)
        for name, features in found.items():
            out.features.setdefault(name, {})[role] = features if rows is None else features.take(rows)
    return out


def _part(count: int, rows: str) -> np.ndarray | None:
    return None if rows == "all" else np.array([n for n in range(count) if in_part(n, rows)], np.int64)


class ThroughModel:
    """A model through one of its adaptors, as a backbone of its own."""

    def __init__(self, model: Backbone, teacher: str) -> None:
        self.model, self.teacher = model, teacher

    @property
    def input(self) -> Any:
        """The model's input contract."""
        return self.model.input

    def tensors(self) -> Any:
        """The model's, so that its device is known."""
        from agglom.probes.fingerprint import tensors_of

        return tensors_of(self.model)

    def __call__(self, images: Any) -> Features:
        """images (B, 3, H, W) in [0, 1] -> Features in the teacher's space."""
        return ask(self.model, images, adaptors=(self.teacher,)).adaptors[self.teacher]

    def answer(self, images: Any, *, blocks: int = 0, adaptors: Sequence[str] = ()) -> Answer:
        """As calling it; an adaptor has no blocks."""
        return Answer(self(images), [], {})
