"""Licences of weights: which is the strictest, and how the Hugging Face hub spells them."""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple

# SPDX name in lower case, as the hub spells it, by how much it asks of those who use the weights
KINDS = (
    ("permissive", ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "unlicense")),
    ("attribution", ("cc-by-2.0", "cc-by-3.0", "cc-by-4.0")),
    ("share-alike", ("cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "agpl-3.0")),
    ("terms of its own", ("openrail", "creativeml-openrail-m", "bigscience-openrail-m")),
    ("no derivatives", ("cc-by-nd-4.0",)),
    ("non-commercial", ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0")),
    ("unknown", ("unknown",)),
)
MEANS = {
    "permissive": "it asks for a notice",
    "attribution": "it asks for attribution",
    "share-alike": "it may ask that derived weights carry the same licence",
    "terms of its own": "its terms are its own: read them",
    "no derivatives": "it doesn't allow derived works",
    "non-commercial": "it doesn't allow commercial use",
    "unknown": "nobody has stated it, so nothing is granted until it is cleared",
}


class Licence(NamedTuple):
    """A licence and what it asks for.

    Attributes:
        name: as stated.
        kind: a key of `MEANS`, least strict first.
        hub: how the hub's metadata spells it; "other" where it doesn't.
    """

    name: str
    kind: str
    hub: str


def classify(name: str) -> Licence:
    """What kind of licence a stated name is."""
    plain = name.strip().lower() or "unknown"
    for kind, names in KINDS:
        if plain in names:
            return Licence(name.strip() or "unknown", kind, plain)
    words = re.split(r"[^a-z0-9]+", plain)
    closed = "nc" in words or "noncommercial" in plain or "non-commercial" in plain or "research" in words
    return Licence(name.strip(), "non-commercial" if closed else "terms of its own", "other")


def strictest(names: Iterable[str]) -> Licence | None:
    """The licence that asks for most; the first of equals, None of none."""
    order = list(MEANS)
    return max(map(classify, names), key=lambda licence: order.index(licence.kind), default=None)
