"""The model card of an export: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from typing import Any, Mapping

import yaml
from huggingface_hub import EvalResult, ModelCardData

from agglom.licences import MEANS, Licence, classify, strictest
from agglom.record import objectives, resolutions
from agglom.standalone import script

TASKS = {  # probe -> the hub's names of its task and metric
    "knn": ("image-classification", "accuracy"),
    "linear": ("image-classification", "accuracy"),
    "zeroshot": ("zero-shot-image-classification", "accuracy"),
    "retrieval": ("image-text-retrieval", "recall"),
    "segmentation": ("image-segmentation", "mean_iou"),
    "detection": ("object-detection", "map"),
}


def model_card(about: Mapping[str, Any], entries: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> str:
    """Markdown for an export.

    Args:
        about: agglom.json.
        entries: adaptors.json.
        report: report.json of exactly these weights, where there is one.
    """
    formats = about.get("formats", {})
    parts = [
        f"---\n{_metadata(about, report)}\n---",
        *_opening(about),
        *_use(about, entries),
        *(
            ["## Other formats", "\n".join(f"- {code(name)}: {said}" for name, said in formats.items())]
            if formats
            else []
        ),
        *_input(about),
        *_teachers(about),
        *_training(about),
        *_kept(report),
        *_limits(about),
        *_recipe(about),
        *_cite(about),
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(about: Mapping[str, Any]) -> Licence | None:
    """The strictest licence among the teachers; None without teachers."""
    return strictest(entry["licence"] for entry in about["teachers"].values())


def _metadata(about: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    licence = licence_of(about)
    options: dict[str, Any] = {}
    if licence is not None:
        options["license"] = licence.hub
        if licence.hub == "other":
            options["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence.name.lower()).strip("-") or "other"
            if licence.name.startswith("https://"):
                options["license_link"] = licence.name
    results = _results(about, report) if report else []
    tags = ["timm", "transformers", "image-feature-extraction", "agglom", "knowledge-distillation"]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=tags,
        model_name=_title(about) if results else None,
        eval_results=results or None,
        **options,
    )
    return data.to_yaml()


def _results(about: Mapping[str, Any], report: Mapping[str, Any]) -> list[EvalResult]:
    """The student's headline metrics of a report."""
    name = report["data"]["source"]
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64] or "data"
    return [
        EvalResult(
            task_type=TASKS[probe][0],
            dataset_type=kind,
            dataset_name=name,
            dataset_split=report["data"]["splits"]["test"]["split"],
            metric_type=TASKS[probe][1],
            metric_name=f"{probe} {entry['metric']}",
            metric_value=round(report["models"][report["student"]][probe][entry["metric"]], 4),
        )
        for probe, entry in report["protocol"].items()
        if probe in TASKS and probe in report["models"].get(report["student"], {})
    ]


def _title(about: Mapping[str, Any]) -> str:
    return f"{about['student']['name']}-agglom"


def _opening(about: Mapping[str, Any]) -> list[str]:
    name, teachers = code(about["student"]["name"]), about["teachers"]
    if not teachers:
        said = f"A {name} backbone, trained for {about['steps']} steps with agglom {about['agglom']}, without teachers."
        return [f"# {name}", said]
    count = "a frozen teacher" if len(teachers) == 1 else f"{len(teachers)} frozen teachers at once"
    return [
        f"# {name}, distilled from {', '.join(map(code, teachers))}",
        f"A {name} backbone, trained for {about['steps']} steps with agglom {about['agglom']} to predict the features "
        f"of {count}.",
    ]


def _use(about: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    mean, std, size = tuple(about["input"]["mean"]), tuple(about["input"]["std"]), about["input"]["size"][0]
    hub, own = about.get("hub"), about["student"].get("module")
    registering = f"import {own}  # registers this network with timm\n" if own else ""
    importing = "".join(
        f"import {name}\n" for name in sorted({own, *(e.get("module") for e in entries.values())} - {None})
    )
    parts = [
        "## Use",
        f"""\
```python
{registering}import timm
import torch

model = timm.create_model("{f"hf-hub:{hub}" if hub else "local-dir:PATH_OF_THIS_FOLDER"}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)  # {size} px, mean {mean}, std {std}
transform = timm.data.create_transform(**config, is_training=False)  # normalises; don't do it twice
with torch.no_grad():
    features = model.forward_features(transform(image)[None])  # image: a PIL image
```""",
        "`features_only=True`, `forward_intermediates` and `num_classes=10` work as for any timm model. transformers, "
        "where it is installed, loads the same folder: `AutoModel.from_pretrained(PATH)`, "
        "`AutoImageProcessor.from_pretrained(PATH)`.",
        *([f"The folder, for what follows: `huggingface_hub.snapshot_download({hub!r})`."] if hub else []),
        "### In a teacher's space",
    ]
    if not entries:
        return [*parts, "The backbone alone: the adaptors into the teachers' spaces were left out."]
    first = next(iter(entries))
    parts.append(
        f"""\
With agglom installed, for {", ".join(map(code, entries))}:

```python
{importing}import agglom

student = agglom.load("PATH_OF_THIS_FOLDER")
summary, spatial = student.adaptors[{first!r}](images)  # images (B, 3, H, W) in [0, 1]; in the teacher's own units
```"""
    )
    readable = [name for name in entries if about["teachers"][name]["source"].startswith(("tiny:clip", "open_clip:"))]
    if len(readable) == 1:
        parts.append(
            "With the text tower of that teacher (" + code(readable[0]) + '): `student.zero_shot(images, ["a dog", "a '
            'cat"]).softmax(1)`.'
        )
    is_vit = about["student"].get("vit")  # exports of earlier versions don't say
    alone = None if is_vit is None else script(entries, is_vit=is_vit)
    if alone is None:
        parts.append("These adaptors need agglom, and the modules that define their classes.")
    else:
        parts.append(f"The same without agglom:\n\n```python\n{registering}{alone}```")
    return parts


def _input(about: Mapping[str, Any]) -> list[str]:
    given = about["input"]
    mean, std, size = tuple(given["mean"]), tuple(given["std"]), given["size"][0]
    seen = ", ".join(map(str, resolutions(about)))
    return [
        "## Input",
        f"RGB pixels in [0, 1], {size} x {size}, then `(x - mean) / std` with mean {mean} and std {std}, once. Resize: "
        f"{given['interpolation']}. A cell of the map covers {given['stride']} x {given['stride']} pixels. Trained at "
        f"{seen} pixels; at other sizes nothing was measured.",
    ]


def _teachers(about: Mapping[str, Any]) -> list[str]:
    from agglom.probes import clean, grid

    teachers = about["teachers"]
    if not teachers:
        return ["## Teachers", "None: no licence of a teacher bears on these weights."]
    strict = licence_of(about)
    assert strict is not None
    rows = [
        [code(name), clean(t["source"]), f"**{clean(t['licence'])}**" if t["licence"] == strict.name else
         clean(t["licence"]), MEANS[classify(t["licence"]).kind], code(t["sha256"])]
        for name, t in teachers.items()
    ]  # fmt: skip
    return [
        "## Teachers and licences",
        grid(["name", "source", "licence", "which means", "sha256 of the weights"], rows, words=True),
        f"> **The strictest licence among them is {clean(strict.name)}: {MEANS[strict.kind]}.** A student's weights "
        "are made from what its teachers answered, so they may inherit conditions of the teachers' licences, and of "
        "the data that those were trained on. The table repeats what each teacher states; this is no legal advice.",
    ]


def _training(about: Mapping[str, Any]) -> list[str]:
    from agglom.probes import clean, grid

    data, sources, lines = about.get("data", {}), about.get("sources", {}), []
    for name, source in sources.items():
        lines.append(f"- Data {code(name)}: {_said(source)}")
    if data:
        lines.append(f"- {'Validated on' if sources else 'Data'}: {_said(data)}")
    if data.get("classes"):
        shown = ", ".join(map(clean, data["classes"][:20])) + (", ..." if len(data["classes"]) > 20 else "")
        lines.append(f"- Classes of the data (not used as labels): {shown}")
    lines += [f"- {what[0].upper()}{what[1:]}: {code(how)}" for what, how in objectives(about)]
    lines.append(f"- Optimiser steps: {about['steps']}")
    parts = ["## Training", "\n".join(lines)]
    stages = about.get("recipe", {}).get("stages") or []
    if stages:
        rows = []
        for number, stage in enumerate(stages, start=1):
            for part in stage.get("partitions") or [{}]:
                merged = {**stage, **part}
                sizes = merged.get("resolutions") or [merged.get("size") or about["input"]["size"][0]]
                names = merged.get("teachers") or list(about["teachers"])
                rows.append(
                    [str(number), str(stage.get("steps", "to the end")), ", ".join(map(str, sizes)),
                     ", ".join(map(clean, names))]
                )  # fmt: skip
        parts.append(grid(["stage", "steps", "pixels", "teachers"], rows, words=True))
    return parts


def _said(data: Mapping[str, Any]) -> str:
    """Source, licence and number of images of a data set."""
    from agglom.probes import clean

    if "source" not in data:
        return f"{code(data['address'])}, which was not readable any more at the time of the export"
    counts = ", ".join(f"{count} {split}" for split, count in data["counts"].items())
    return f"{clean(data['source'])}; licence {clean(data['licence'])}; images: {clean(counts)}"


def _kept(report: Mapping[str, Any] | None) -> list[str]:
    from agglom.probes import clean, retention_table

    table = retention_table(report) if report else ""
    if report is None or not table:
        return ["## What it keeps", "These weights have not been probed against their teachers (`agglom probe --run`)."]
    seen = report["data"]
    test = seen["splits"]["test"]
    return [
        "## What it keeps",
        f"Frozen backbone; the student's metric divided by a teacher's, in percent, on {test['count']} test images of "
        f"{clean(seen['source'])}.",
        table,
    ]


def _limits(about: Mapping[str, Any]) -> list[str]:
    sizes = resolutions(about)
    return [
        "## Limits",
        f"- Features are claimed for images like those of the training data, at {', '.join(map(str, sizes))} pixels.\n"
        "- A student repeats its teachers' mistakes and biases, and adds its own.\n"
        "- An adaptor's answer is a prediction of its teacher's features, not these features.",
    ]


def _recipe(about: Mapping[str, Any]) -> list[str]:
    recipe = about.get("recipe")
    if not recipe:
        return []
    text = yaml.safe_dump(dict(recipe), sort_keys=False, width=110)
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    said = "<details><summary>The resolved configuration, for `agglom fit --config`</summary>"
    return ["## Recipe", f"{said}\n\n{fence}yaml\n{text}{fence}\n\n</details>"]


def _cite(about: Mapping[str, Any]) -> list[str]:
    return [
        "## Cite",
        f"""\
```bibtex
@software{{agglom,
  title = {{agglom: several frozen vision foundation models in one student backbone}},
  version = {{{about["agglom"]}}},
  year = {{2026}}
}}
```""",
        "And its teachers, whose work this is.",
    ]


def code(value: Any) -> str:
    """Words that may hold anything, as a code span that nothing gets out of, in a table too."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"
