"""The sections of the report page that show test images."""

from __future__ import annotations

from html import escape
from typing import Any, Mapping, Sequence

import numpy as np

from agglom.probes import wording as w
from agglom.probes.charts import palette
from agglom.probes.page import Section, folded, picture, strip

BOXES = 5  # of a model and an image: more hide each other
Saved = Mapping[str, Mapping[str, np.ndarray]]


def maps(report: w.Report, saved: Saved) -> Section:
    """Feature maps as colours."""
    found = saved.get("pca", {})
    if not found:
        return Section("maps", "Feature maps", "")
    count = len(next(iter(found.values())))
    parts = [strip(saved["images"]["test"], "image", f"{count} test images", photo=True)]
    for name, colours in found.items():
        model, _, teacher = name.partition(" > ")
        shown = f"{model} through its adaptor for {teacher}" if teacher else name
        parts.append(strip(colours, shown, f"Feature map colours of {shown} on the same {count} images"))
    body = (
        "<p>The first three principal components of each feature map over these test images, as red, green and blue. "
        "Components of different models have no common order or sign, so each model's are rotated (nothing else) to "
        f"agree with {escape(w.spoken(report['student']))} where they can. The student through an adaptor lives in "
        "that teacher's space and shares the teacher's basis and colours exactly: the two rows should look alike.</p>"
    )
    return Section("maps", "Feature maps", body + "".join(parts))


def neighbours(report: w.Report, saved: Saved) -> Section:
    """The train images that each model finds most similar to the shown test images."""
    bank = saved.get("neighbours", {}).get("train")
    if bank is None:
        return Section("neighbours", "Nearest neighbours", "")
    cards = []
    for example, image in _shown(report, saved):
        mine = example["label"] or []
        lists = ""
        for name, near in example.get("neighbours", {}).items():
            items = ""
            for rank, other in enumerate(near, 1):
                same = bool(set(mine) & set(other["label"] or []))
                words = f"{', '.join(other['label'])}{' ✓' if same else ''}" if other["label"] else ""
                alt = f"Neighbour {rank} by {name}: train image {other['key']}"
                items += (
                    f'<li class="{"right" if same else ""}">{picture(bank[other["picture"]], alt)}{escape(words)}'
                    f'<span class="dim">{other["cosine"]:.2f}</span></li>'
                )
            lists += f'<div>{escape(name)}</div><ol class="near">{items}</ol>'
        cards.append(
            f'<div class="card query"><div>{picture(image, _alt(example))}'
            f'<p class="small">{_caption(example)}</p></div><div>{lists}</div></div>'
        )
    body = (
        f"<p>The four most similar of {report['data']['splits']['train']['count']:,} train images by their summary, "
        "with the cosine; a model without a summary answers with the mean over its feature map. ✓ marks a class in "
        "common.</p>"
    )
    return Section("neighbours", "Nearest neighbours", f'{body}<div class="wide">{"".join(cards)}</div>')


def examples(report: w.Report, saved: Saved) -> Section:
    """The nearest classes and captions of the shown images, by text."""
    kinds = [k for k in ("zeroshot", "retrieval") if any(e.get(k) for e in report["examples"])]
    if "images" not in saved or not kinds:
        return Section("examples", "Zero-shot examples", "")
    cards = []
    for example, image in _shown(report, saved):
        guesses = ""
        for kind in kinds:
            right = {"zeroshot": example["label"] or [], "retrieval": [example["caption"]]}[kind]
            lists = ""
            for name, found in example.get(kind, {}).items():
                items = "".join(
                    f'<li class="{"right" if c in right else ""}">{escape(c)} <span class="dim">{s:.2f}</span>'
                    f"{' ✓' if c in right else ''}</li>"
                    for c, s in found
                )
                lists += f"<div>{escape(w.shown_name(report, name))}</div><ol>{items}</ol>"
            guesses += folded("Nearest captions", lists) if kind == "retrieval" and len(kinds) > 1 else lists
        cards.append(f'<div class="card">{picture(image, _alt(example))}<p>{_caption(example)}</p>{guesses}</div>')
    body = "<p>The three nearest classes (and captions), with their cosine; ✓ is what the image is labelled with.</p>"
    return Section("examples", "Zero-shot examples", f'{body}<div class="cards">{"".join(cards)}</div>')


def masks(report: w.Report, saved: Saved) -> Section:
    """Predicted masks under the images and the truth."""
    kinds = {kind.partition(":")[2]: by for kind, by in saved.items() if kind.startswith("masks:")}
    if not kinds:
        return Section("masks", "Masks", "")
    truth = saved["masks"]["truth"]
    names = report["data"]["seg_classes"]
    every = [truth, *(array for by in kinds.values() for array in by.values())]
    seen = sorted({int(v) for array in every for v in np.unique(array)} - {255})
    colours = palette(max([*seen, len(names) - 1]) + 1)
    lookup = np.full((256, 3), 255, np.uint8)
    lookup[: len(colours)] = colours
    count = len(truth)
    parts = []
    for probe, by in kinds.items():
        parts += [f"<h3>{escape(w.title(probe))}</h3>"] if len(kinds) > 1 else []
        parts.append(strip(saved["images"]["test"], "image", f"{count} test images", photo=True))
        parts.append(strip(lookup[truth], "ground truth", f"True masks of the same {count} images"))
        rows = {
            name: strip(lookup[array], w.shown_name(report, name), f"Masks by {w.shown_name(report, name)}")
            for name, array in by.items()
        }
        through = report.get("through", {})
        parts += [drawn for name, drawn in rows.items() if name not in through]
        folds = "".join(drawn for name, drawn in rows.items() if name in through)
        parts += [folded("Through the adaptors", folds)] if folds else []
    legend = "".join(
        f'<li><span class="swatch" style="background:rgb{colours[v]}"></span>'
        f"{escape(names[v] if v < len(names) else str(v))}</li>"
        for v in seen
    )
    body = "<p>What a linear head reads from each frozen feature map, beside the truth (white: ignored).</p>"
    return Section("masks", "Masks", f'{body}<ul class="legend">{legend}</ul>{"".join(parts)}')


def boxes(report: w.Report, saved: Saved) -> Section:
    """Predicted boxes over the images, beside the truth."""
    photos = saved.get("photos", {})
    rows = []
    classes = report["data"]["classes"]
    for i, example in enumerate(report["examples"]):
        for by in example.get("boxes", {}).values():
            if str(i) not in photos or not by:
                continue
            first = next(iter(by.values()))
            truth = [(box, label) for box, label, *_ in first["truth"]]
            figures = [_framed(photos[str(i)], first["size"], truth, "ground truth", "truth", classes)]
            for name, found in by.items():
                best = sorted(found["found"], key=lambda entry: -entry[2])[:BOXES]
                shown, tone = w.shown_name(report, name), w.tone(report, name)
                figures.append(_framed(photos[str(i)], found["size"], best, shown, tone, classes))
            rows.append(f'<h3>{_said(example)}</h3><div class="boxes">{"".join(figures)}</div>')
    body = (
        f"<p>What a detector on each frozen backbone finds, beside the truth: its {BOXES} best boxes at most, with "
        "their scores.</p>"
    )
    return Section("boxes", "Boxes", body + "".join(rows) if rows else "")


def _framed(
    photo: np.ndarray, size: Sequence[int], found: Sequence[Sequence[Any]], name: str, tone: str, classes: Sequence[str]
) -> str:
    """An image with ((x0, y0, x1, y1), label, maybe score) in stored pixels (`size`: height, width) over it."""
    drawn, said = [], []
    for (x1, y1, x2, y2), label, *score in found:
        place = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(0, x2 - x1):.1f}" height="{max(0, y2 - y1):.1f}"'
        drawn.append(f'<rect class="under" {place}/><rect class="curve {tone}" {place}/>')
        known = classes[label] if isinstance(label, int) and 0 <= label < len(classes) else str(label)
        said.append(f"{known} {score[0]:.2f}" if score else known)
    words = ", ".join(said) or "nothing"
    return (
        f'<figure><div class="frame">{picture(photo, f"{name}: {words}")}'
        f'<svg viewBox="0 0 {size[1]} {size[0]}" aria-hidden="true">{"".join(drawn)}</svg></div>'
        f'<figcaption>{escape(name)}<br><span class="dim small">{escape(words)}</span></figcaption></figure>'
    )


def _shown(report: w.Report, saved: Saved) -> list[tuple[Mapping[str, Any], np.ndarray]]:
    return list(zip(report["examples"], saved["images"]["test"], strict=True))


def _caption(example: Mapping[str, Any]) -> str:
    label = f'<br><span class="dim">label: {escape(", ".join(example["label"]))}</span>' if example["label"] else ""
    return _said(example) + label


def _said(example: Mapping[str, Any]) -> str:
    return f"“{escape(example['caption'])}”" if example["caption"] else f"<code>{escape(example['key'])}</code>"


def _alt(example: Mapping[str, Any]) -> str:
    return f"Test image {example['key']}" + (f": {example['caption']}" if example["caption"] else "")
