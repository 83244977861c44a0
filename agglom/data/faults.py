"""What can be wrong with shards and samples: one list of kinds, for streams that count and for `agglom data verify`."""

from __future__ import annotations

from typing import NamedTuple

KINDS: dict[str, str] = {
    # of a whole shard
    "missing shard": "the index names a file that isn't there",
    "empty shard": "a file of no bytes",
    "unreadable shard": "it can't be opened or read: rights, network, a broken compression",
    "truncated tar": "the file ends before the tar does",
    "bad tar header": "no tar, or a damaged header: nothing after it can be found",
    "wrong count": "another number of samples than the index says",
    "listed twice": "the index names the shard twice in one split",
    # of a sample, as it lies in its tar
    "unsafe member": "an absolute name, one with `..`, a link or a device",
    "duplicate key": "the key was there before, in this shard or in another one of the split",
    "missing field": "the sample lacks a field that the index promises, such as its image",
    "too large": "a picture of more pixels, or a file of more bytes, than is ever decoded",
    # of a field
    "bad image": "a picture that can't be decoded",
    "bad class": "neither a whole number nor a JSON list of them",
    "class value": "a label that isn't one of the index's classes",
    "bad caption": "not UTF-8",
    "bad mask": "it can't be decoded, or isn't 8-bit grey or palette",
    "mask size": "not the size of its picture",
    "mask value": "neither one of the index's seg_classes nor 255",
    "bad JSON": "not JSON",
    "bad box": "no [x, y, width, height], without area, or beyond its picture",
}


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
        kind: one of `KINDS`.
        detail: value and what would be valid, in words, on one line.
    """

    kind: str
    detail: str


class BadSample(Exception):
    """A sample that nothing may be trained or evaluated on."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail)


def printable(text: str) -> str:
    """Names and messages out of files for a terminal: on one line, without control characters and lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
