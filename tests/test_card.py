"""The model card: metadata that the hub's library takes, licences, a recipe that runs again, names that stay text."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt

from agglom.card import model_card
from agglom.checks import check_config
from agglom.cli import main
from agglom.export import write_card
from agglom.licences import MEANS, classify, strictest
from agglom.record import resolutions

# the hub's list (huggingface.co/docs/hub/repositories-licenses), as far as cards here can name it
HUB = {
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "isc",
    "unlicense",
    "openrail",
    "other",
    "unknown",
}
HUB |= {"creativeml-openrail-m", "bigscience-openrail-m", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "agpl-3.0"}
HUB |= {f"cc-by-{v}" for v in ("2.0", "3.0", "4.0", "sa-3.0", "sa-4.0", "nd-4.0", "nc-2.0", "nc-3.0", "nc-4.0")}
HUB |= {"cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"}


def teacher(licence="Apache-2.0", source="timm:some_vit"):
    return {"source": source, "licence": licence, "sha256": "ab" * 32}


def about(**teachers):
    return {
        "agglom": "0.1.0",
        "student": {"name": "vit_tiny_patch16_224", "vit": True},
        "input": {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [64, 64], "stride": 8, "interpolation": "bicubic"},
        "steps": 300,
        "teachers": teachers,
        "adaptors": [],
    }


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])


@pytest.mark.parametrize(
    ("names", "expected", "kind"),
    [
        (["Apache-2.0", "MIT"], "Apache-2.0", "permissive"),
        (["MIT", "CC-BY-4.0"], "CC-BY-4.0", "attribution"),
        (["CC-BY-NC-4.0", "AGPL-3.0"], "CC-BY-NC-4.0", "non-commercial"),
        (["dinov3-license", "apache-2.0"], "dinov3-license", "terms of its own"),
        (["dinov3-license", "NVIDIA Source Code License-NC"], "NVIDIA Source Code License-NC", "non-commercial"),
        (["cc-by-nc-4.0", "unknown"], "unknown", "unknown"),
        (["", "mit"], "unknown", "unknown"),
    ],
)
def test_the_strictest_licence_is_found_and_highlighted(names, expected, kind):
    found = strictest(names)
    assert (found.name, found.kind) == (expected, kind) and strictest([]) is None
    card = model_card(about(**{f"t{i}": teacher(name) for i, name in enumerate(names)}), {})
    assert f"**The strictest licence among them is {expected}: {MEANS[kind]}.**" in card
    assert "may inherit conditions" in card
    assert metadata(card)["license"] in HUB
    for name in names:
        assert classify(name).hub in HUB


def test_metadata_of_foreign_and_of_no_licences():
    url = "https://example.org/licence"
    own = metadata(model_card(about(a=teacher("MIT"), b=teacher(url)), {}))
    assert (own["license"], own["license_link"]) == ("other", url) and re.fullmatch(r"[a-z0-9.-]+", own["license_name"])
    assert "license" not in metadata(model_card(about(), {}))


HOSTILE = [
    "</details><script>alert(1)</script>",
    "a | b |\n|---|---|",
    "`x` <img src=x onerror=alert(1)> ```",
    "\n---\nlicense: mit\n---\n# [title](javascript:alert(1))",
]


def test_what_others_named_stays_text():
    """Rendered as the hub does, with HTML allowed: no element, link, heading or table row comes out of a name."""
    plain = about(clip=teacher())
    plain["data"] = {"address": "data", "source": "s", "licence": "l", "classes": ["c"], "counts": {"train": 1}}
    plain["recipe"] = {
        "model": {"summary_loss": {"class_path": "a.B", "init_args": {"x": 1}}},
        "stages": [{"steps": 1}],
    }
    odd = about(**{text: teacher(text, text) for text in HOSTILE[:3]})
    odd["student"]["name"] = HOSTILE[3]
    odd["data"] = {"address": "data", "source": HOSTILE[0], "licence": HOSTILE[1], "classes": HOSTILE, "counts": {}}
    odd["recipe"] = {
        "model": {"summary_loss": {"class_path": f"a.{HOSTILE[2]}", "init_args": {"x": HOSTILE[0]}}},
        "stages": [{"steps": 1, "teachers": HOSTILE}],
    }
    render = MarkdownIt("commonmark", {"html": True}).enable("table")

    def structure(card):
        body = card.split("\n---\n", 1)[1]
        flat = [t for token in render.parse(body) for t in (token, *(token.children or []))]
        return [
            (t.type, t.content) if "html" in t.type else t.type for t in flat if t.type not in ("text", "code_inline")
        ]

    kinds = {kind if isinstance(kind, str) else kind[0] for kind in structure(model_card(odd, {}))}
    html = [kind for kind in structure(model_card(odd, {})) if not isinstance(kind, str)]
    assert html == [kind for kind in structure(model_card(plain, {})) if not isinstance(kind, str)] and len(html) == 2
    assert "link_open" not in kinds and "image" not in kinds
    for kind, extra in (("heading_open", 0), ("fence", 0), ("tr_open", 2), ("hr", 0)):  # two more teachers, two rows
        count = [structure(model_card(x, {})).count(kind) for x in (plain, odd)]
        assert count[1] == count[0] + extra, kind
    assert metadata(model_card(odd, {}))["license"] == "other"


def test_resolutions_are_those_of_stages_and_partitions():
    card = about(clip=teacher(), sam=teacher())
    assert resolutions(card) == [64]
    card["recipe"] = {
        "stages": [
            {"steps": 10, "resolutions": [96, 32]},
            {"partitions": [{"teachers": ["sam"], "resolutions": [128], "size": 256}, {"size": 64}]},
        ]
    }
    assert resolutions(card) == [32, 64, 96, 128]
    text = model_card(card, {})
    assert "| 1 | 10 | 96, 32 | clip, sam |" in text and "| 2 | to the end | 128 | sam |" in text
    assert "Trained at 32, 64, 96, 128 pixels" in text


@pytest.mark.slow
def test_the_card_of_a_run(scenes, tmp_path, capsys):
    """Valid for huggingface_hub offline, its recipe is the run's, and the probe table is of exactly these weights."""
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip"}}
    vit = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    student = {
        "class_path": "agglom.students.TimmStudent",
        "init_args": {"name": "vit_tiny_patch16_224", "kwargs": vit},
    }
    config = {
        "model": {"student": student, "teachers": {"clip": {"encoder": tiny}}, "warmup_steps": 1, "ema_decay": None},
        "data": {"data": str(scenes), "batch_size": 4, "size": 48, "val_split": None, "num_workers": 0},
        "trainer": {"max_steps": 4, "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu"},
        "checkpoint_every": 2,
        "checkpoint_keep": 5,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    run, folder = tmp_path / "run", tmp_path / "run" / "export"
    assert "have not been probed" in (folder / "README.md").read_text()
    main(["probe", "--run", str(run), "--probes", "knn,zeroshot"])
    text = (folder / "README.md").read_text()

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == metadata(text) == metadata_load(folder / "README.md")
    again = ModelCardData(**metadata(text))  # strict: a model-index that it can't read raises
    report = json.loads((run / "probes" / "report.json").read_text())
    found = {r.metric_name: r.metric_value for r in again.eval_results}
    student = report["models"]["student"]
    assert found == {f"{p} top1": round(student[p]["top1"], 4) for p in ("knn", "zeroshot")}
    assert (again.license, again.library_name, again.pipeline_tag) == ("apache-2.0", "timm", "image-feature-extraction")
    assert f"**{100 * report['retention']['knn']['value']:.1f}**" in text and "fashion scenes" in text
    assert (
        "t-shirt, trouser" in text
        and json.loads((folder / "agglom.json").read_text())["teachers"]["clip"]["sha256"] in text
    )

    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        recipe["model"] == resolved["model"] and recipe["data"] == resolved["data"] and "ema_decay" in recipe["model"]
    )
    assert str(run) not in yaml.safe_dump(recipe)
    assert check_config({**recipe, "trainer": {**recipe["trainer"], "default_root_dir": str(tmp_path / "again")}}) == []

    main(["export", "--ckpt", str(run), "--out", str(tmp_path / "same")])
    assert "**The strictest" in text and "## What it keeps\n\nFrozen" in (tmp_path / "same" / "README.md").read_text()
    earlier = sorted((run / "checkpoints").glob("*.ckpt"))
    other = next(path for path in earlier if "2" in path.stem)
    main(["export", "--ckpt", str(other), "--out", str(tmp_path / "earlier")])
    assert "have not been probed" in (tmp_path / "earlier" / "README.md").read_text()
    state = json.loads((run / "probes" / "report.json").read_text())
    state["provenance"]["models"]["student"]["fingerprint"] = "0" * 16
    (run / "probes" / "report.json").write_text(json.dumps(state))
    write_card(folder, run)
    assert "have not been probed" in (folder / "README.md").read_text()


def test_every_source_of_data_is_named(scenes, tmp_path):
    from agglom.record import training_record

    several = {"plain": {"data": str(scenes)}, "gone": {"data": str(tmp_path / "gone"), "weight": 2.0}}
    config = {"data": {"data": str(scenes), "sources": several}, "model": {}, "trainer": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card({**about(), **training_record(tmp_path)}, {})
    assert "- Data `plain`: fashion scenes" in text and "images: 96 train" in text and "- Validated on: fashion" in text
    assert f"- Data `gone`: `{tmp_path / 'gone'}`, which was not readable" in text


def test_addresses_lose_their_passwords(tmp_path):
    from agglom.record import training_record

    config = {
        "data": {"data": "https://me:secret@host/shards"},
        "model": {"teachers": {}},
        "trainer": {"logger": "key"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    record = training_record(tmp_path)
    assert "secret" not in json.dumps(record) and record["recipe"]["data"]["data"] == "https://***@host/shards"
    assert "logger" not in record["recipe"]["trainer"]
