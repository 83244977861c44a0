"""The model card of an export."""

from __future__ import annotations

from typing import Any

_CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [timm, image-feature-extraction, agglom, knowledge-distillation]
---

# {name}, distilled from {teachers}

A `{name}` backbone trained for {steps} steps with agglom {agglom} to predict the features of {count} frozen
teachers at once.

## Use

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)  # {size} px, mean {mean}, std {std}
```

{adaptors}

## Input

Pixels in [0, 1], {size} x {size}, then (x - mean) / std with mean {mean} and std {std}; {interpolation} resize.

## Teachers

{table}

The weights of a student may inherit conditions from its teachers' licences; the table repeats what each teacher states.
"""


def model_card(about: dict[str, Any]) -> str:
    """Markdown for the export that `about` (agglom.json) describes."""
    teachers, kept = about["teachers"], about["adaptors"]
    adaptors = (
        "With agglom installed, `agglom.load(PATH).adaptors[NAME](images)` answers in a teacher's own space\n"
        f"(images in [0, 1]); names: {', '.join(f'`{name}`' for name in kept)}."
        if kept
        else "The backbone alone: the adaptors into the teachers' spaces were left out."
    )
    rows = ["| name | source | licence | sha256 |", "|---|---|---|---|"]
    rows += [f"| {n} | {t['source']} | {t['licence']} | `{t['sha256'][:16]}` |" for n, t in teachers.items()]
    return _CARD.format(
        name=about["student"]["name"],
        teachers=", ".join(teachers),
        count=len(teachers),
        steps=about["steps"],
        agglom=about["agglom"],
        size=about["input"]["size"][0],
        mean=tuple(about["input"]["mean"]),
        std=tuple(about["input"]["std"]),
        interpolation=about["input"]["interpolation"],
        adaptors=adaptors,
        table="\n".join(rows),
    )
