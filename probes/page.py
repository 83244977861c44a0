"""The pieces of a report page. Nothing is loaded from anywhere; scripts there are none."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np
from PIL import Image

from agglom.probes.style import STYLE

PHOTO = 96  # pixels; from here on images are photographs for JPEG, below they are enlarged pixel by pixel


class Section(NamedTuple):
    """A part of the page, reached from the contents; `body` is HTML, nothing where there is nothing to show."""

    key: str
    title: str
    body: str


def page(title: str, lead: str, sections: Iterable[Section]) -> str:
    """A whole HTML document: title, lead, contents and the sections that have something to show."""
    shown = [section for section in sections if section.body]
    items = "".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in shown)
    body = "\n".join(
        f'<section aria-labelledby="{s.key}"><h2 id="{s.key}">{escape(s.title)}</h2>{s.body}</section>' for s in shown
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f'<nav aria-label="Contents"><ol>{items}</ol></nav>\n{body}\n</main>\n</body>\n</html>\n'
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, heard: bool = False) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        caption: said above it and to screen readers; two tables of a page need different ones.
        head: of the columns; `<th ...>...</th>` as it is, anything else as text.
        rows: the first cell is text, the row's heading; the others are `<td ...>...</td>`.
        heard: whether only screen readers say the caption, for what stands under a heading of its own.
    """
    rows = list(rows)
    wordy = [bool(rows) and i < len(rows[0]) and rows[0][i].startswith('<td class="text">') for i in range(len(head))]
    top = "".join(
        word if word.startswith("<th ") else f'<th scope="col"{" class=text" if words else ""}>{escape(word)}</th>'
        for word, words in zip(head, wordy, strict=True)
    )
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(row[1:])}</tr>' for row in rows)
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption{' class=heard' if heard else ''}>{label}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def cell(value: str, note: str = "", *, kind: str = "", big: bool = False) -> str:
    """A number with a small note under it; both are escaped."""
    small = f'<span class="ci">{escape(note)}</span>' if note else ""
    shown = f'<span class="big">{escape(value)}</span>' if big else escape(value)
    return f'<td class="{kind}">{shown}{small}</td>' if kind else f"<td>{shown}{small}</td>"


def text(value: Any) -> str:
    """A cell of words."""
    return f'<td class="text">{escape(str(value))}</td>'


def note(words: str) -> str:
    """A paragraph of small print."""
    return f'<p class="dim small">{escape(words)}</p>' if words else ""


def folded(summary: str, body: str, *, long: bool = False) -> str:
    """Details behind a line; printed open, or not at all where they are long."""
    kind = ' class="long"' if long else ""
    return f"<details{kind}><summary>{escape(summary)}</summary>{body}</details>"


def picture(array: np.ndarray, alt: str) -> str:
    """uint8 (H, W, 3) -> an <img> that holds its own file: small images exactly, photographs as JPEG."""
    photo = max(array.shape[:2]) >= PHOTO
    return _img(array, alt, photo=photo, more="" if photo else " class=tiny")


def strip(images: np.ndarray, name: str, alt: str, *, side: int = 64, photo: bool = False) -> str:
    """uint8 (n, H, W, 3) side by side under or beside a name; enlarged by whole pixels to about `side`."""
    grow = max(1, side // images.shape[1])
    joined = np.concatenate(list(images.repeat(grow, 1).repeat(grow, 2)), axis=1)
    drawn = _img(
        joined, alt, photo=photo and images.shape[1] >= PHOTO, more=f' style="max-width:{8.5 * len(images)}rem"'
    )
    return f'<figure class="strip"><figcaption>{escape(name)}</figcaption>{drawn}</figure>'


def _img(array: np.ndarray, alt: str, *, photo: bool, more: str = "") -> str:
    buffer = io.BytesIO()
    if photo:
        Image.fromarray(array).save(buffer, "JPEG", quality=88)
    else:
        Image.fromarray(array).save(buffer, "PNG", optimize=True)
    data = f"image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size = f'width="{array.shape[1]}" height="{array.shape[0]}"'
    return f'<img{more} alt="{escape(alt)}" {size} src="data:{data}">'
