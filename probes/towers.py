"""What zero-shot classification and retrieval share: whose features a text tower can read, and texts through it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError, brief
from agglom.features import Backbone, TextTower
from agglom.probes.base import Subject
from agglom.probes.features import FeatureSet
from agglom.probes.fingerprint import weights_hash
from agglom.whole import whole

CHUNK = 256  # texts a call of a tower


def readable(subject: Subject) -> dict[str, tuple[FeatureSet, str]]:
    """tower -> the test features in that tower's space, and where they come from.

    A teacher with a text tower answers with its own summary; any other model through its adaptor for such a teacher.
    """
    sides = {}
    for tower in subject.text:
        if tower == subject.name and subject.features["test"].summary is not None:
            sides[tower] = (subject.features["test"], "own summary")
        elif tower in subject.through and subject.through[tower].summary is not None:
            sides[tower] = (subject.through[tower], f"summary through the adaptor for {tower}")
    return sides


def unreadable(subject: Subject) -> str | None:
    """Why no text tower can read the subject, or None."""
    if not subject.text:
        return "no teacher has a text tower"
    if not readable(subject):
        return f"it has no text tower, and no adaptor with a summary for {' or '.join(subject.text)}"
    return None


@torch.inference_mode()
def embed(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """(N, D) float32 L2-normalised embeddings on the CPU, 256 texts at a time."""
    parts = [tower.encode_text(texts[i : i + CHUNK]).float().cpu() for i in range(0, len(texts), CHUNK)]
    return F.normalize(torch.cat(parts), dim=1).clone()


class CachedText:
    """A text tower that keeps what it said in a folder of the feature cache, a file for the texts of each call.

    Args:
        tower: itself.
        cache: folder of the feature cache.
        model: its teacher, whose weights go into the fingerprint where it is at hand.
    """

    def __init__(self, tower: TextTower, cache: Path, model: Backbone | None = None) -> None:
        self.tower = tower
        self.place = cache / f"text-{fingerprint(tower, model)}"

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32, as the tower's own.

        Raises:
            UserError: a file of the cache can't be read.
        """
        file = self.place / f"{_hash(json.dumps(list(texts)))}.npy"
        if not file.is_file():
            found = self.tower.encode_text(texts).float().cpu().numpy()
            with whole(file) as scratch, scratch.open("wb") as stream:
                np.save(stream, found, allow_pickle=False)
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as err:
            raise UserError(f"{file}: broken ({brief(err)}); remove it and run it again") from err


def fingerprint(tower: TextTower, model: Backbone | None) -> str:
    """Hash of the teacher's weights and of what the tower says of an empty text, coarsely rounded."""
    said = embed(tower, [" "])[0]
    coarse = (said / said.std(correction=0).clamp_min(1e-12)).mul(10).round().int().tolist()
    return _hash(f"{'' if model is None else weights_hash(model)} {coarse}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
