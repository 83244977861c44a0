"""The code blocks of the documentation, as its tests read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" where it has none), title ("" where it has none) and text."""

    language: str
    title: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page in order, of one language or of all."""
    found = [Block(lang, title or "", text) for _, lang, title, text in FENCE.findall(page.read_text())]
    return [block for block in found if language in (None, block.language)]
