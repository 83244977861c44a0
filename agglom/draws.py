"""Random numbers that follow from a key alone: the same on every device, in every run, and after a resume."""

from __future__ import annotations

import hashlib

import torch


def keyed(*key: object) -> int:
    """64 bits that any change of the key changes altogether (near keys give unrelated numbers)."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little")


def generator(*key: object) -> torch.Generator:
    """A CPU generator for a key such as (seed, step, rank).

    Hashed, because torch's generator looks at 32 bits only and near seeds would give near streams.
    """
    return torch.Generator().manual_seed(keyed(*key))
