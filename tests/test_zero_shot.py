"""Zero-shot through an export: the training's own predictions against the teacher's words, and the probe's accuracy."""

import csv
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml

import agglom
from agglom.callbacks import export_module
from agglom.cli import main
from agglom.data import read_index
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.heads import TeacherConfig
from agglom.probes.source import Source
from agglom.runs import build_distiller, read_config
from agglom.teachers import TinyTeacher, from_ref, manifest
from agglom.zero_shot import text_tower

TEXTS = ["a red dress", "a blue bag", "a green t-shirt"]


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A short training on two pretrained teachers, with the zero-shot probe after its last step."""
    root = tmp_path_factory.mktemp("zero") / "run"
    vit = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    probes = {"every": 40, "probes": ["zeroshot"], "train": 8, "val": 8, "test": 32}
    config = {
        "seed_everything": 0,
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": vit},
            },
            "teachers": {
                name: {"encoder": {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": name}}}
                for name in ("clip", "dino")
            },
            "lr": 2e-3,
            "warmup_steps": 1,
            "ema_decay": None,
        },
        "data": {"data": str(scenes), "batch_size": 16, "size": 48, "val_split": None, "num_workers": 0},
        "trainer": {
            "max_steps": 40,
            "default_root_dir": str(root),
            "accelerator": "cpu",
            "precision": "32-true",
            "callbacks": [{"class_path": "agglom.callbacks.OnlineProbes", "init_args": probes}],
        },
    }
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    return root


def images(scenes, count=32):
    rows = list(Source.open(scenes, fields=("cls",), limits={"test": count}).samples("test"))
    return torch.stack([torch.as_tensor(row["image"]) for row in rows]) / 255, torch.tensor(
        [row["cls"] for row in rows]
    )


@pytest.mark.slow
def test_the_accuracy_is_the_one_that_training_measured(run, scenes):
    index = read_index(scenes)
    pictures, labels = images(scenes)
    model = agglom.load(run)
    with torch.no_grad():
        logits = model.zero_shot(pictures, index.classes, templates=index.extra["templates"])
    assert logits.shape == (32, len(index.classes))
    (row,) = (row for row in csv.DictReader((run / "metrics.csv").open()) if row.get("probe/zeroshot_top1"))
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(float(row["probe/zeroshot_top1"]))
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert top5 == pytest.approx(float(row["probe/zeroshot_top5"]))
    assert logits.argmax(1).unique().numel() > 1


@pytest.mark.slow
def test_logits_are_those_of_the_training_head(run, scenes):
    """Written out: the head of the checkpoint, denormalised, against the teacher's own words and temperature."""
    module = build_distiller(read_config(run / "config.yaml"))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state)
    module.eval()
    pictures, teacher = images(scenes, 6)[0], TinyTeacher("clip")
    with torch.no_grad():
        head = module.heads["clip"]
        summary = head.normalizers["summary"].denormalize(head.adaptor(module.student(pictures, module.taps)).summary)
        words = teacher.text.encode_text(TEXTS)
        expected = teacher.network.logit_scale.exp() * F.cosine_similarity(summary[:, None], words[None], dim=2)
        got = agglom.load(run).zero_shot(pictures, TEXTS)
        several = agglom.load(run).zero_shot(pictures, ["dress", "bag"], templates=["a red {}", "photo of a blue {}"])
        prompts = teacher.text.encode_text(["a red dress", "photo of a blue dress", "a red bag", "photo of a blue bag"])
        mean = F.normalize(prompts, dim=1).view(2, 2, -1).mean(1)
    found = F.cosine_similarity(summary[:, None], mean[None], dim=2)
    torch.testing.assert_close(several, teacher.network.logit_scale.exp() * found, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    assert expected.abs().max() > 1 and expected.std() > 0.05


@pytest.mark.slow
def test_towers_and_words_are_kept_and_can_be_given(run, scenes, monkeypatch):
    model, pictures = agglom.load(run), images(scenes, 2)[0]
    first = model.zero_shot(pictures, TEXTS)
    monkeypatch.setattr("agglom.teachers.from_ref", None)
    monkeypatch.setattr("agglom.probes.classifier", None)
    assert torch.equal(model.zero_shot(pictures, TEXTS), first)

    class Axes:
        """Each text is a direction of the teacher's space."""

        def encode_text(self, texts):
            return torch.eye(128)[[int(text) for text in texts]]

    monkeypatch.undo()
    got = model.zero_shot(pictures, ["0", "7"], tower=Axes())
    torch.testing.assert_close(got, F.normalize(model.adaptors["clip"](pictures).summary, dim=1)[:, [0, 7]])


@pytest.mark.slow
def test_what_can_not_be_read_is_one_line(run, scenes):
    pictures = images(scenes, 1)[0]

    def refused(match, texts=TEXTS, about=(), **options):
        model = agglom.load(run)
        model.about["teachers"]["clip"].update(about)
        with pytest.raises(UserError, match=match) as err:
            model.zero_shot(pictures, texts, **options)
        assert "\n" not in str(err.value)

    refused(r"0 of the adaptors \(clip, dino\)", about={"source": "/weights/clip.pt"})
    refused("'/weights/clip.pt', which names no text tower", about={"source": "/weights/clip.pt"}, adaptor="clip")
    refused("adaptor 'clop'.*did you mean clip", adaptor="clop")
    refused("has other weights now", about={"sha256": "0" * 64})
    refused("templates: 'a photo'", templates=["a photo"])
    refused("valid: a list", texts="a dog")
    refused(
        "source 'timm|'timm:resnet18', which names no text tower", about={"source": "timm:resnet18"}, adaptor="clip"
    )


def test_an_unknown_open_clip_tower_is_one_line():
    record = {"source": "open_clip:ViT-B-16/nobody", "dtype": "fp32", "sha256": "", "input": {}}
    with pytest.raises(UserError, match="tag 'nobody'") as err:
        text_tower("clip", json.loads(json.dumps(record)))
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("bias", [None, -3.0])
@torch.no_grad()
def test_an_open_clip_teacher_by_its_reference(bias, tiny_student, tmp_path):
    """The tower comes from the recorded reference alone; temperature and SigLIP's bias are the model's own."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config |= {} if bias is None else {"custom_text": True, "init_logit_bias": bias}
    name, folder = f"agglom-words-{bias}", tmp_path / "clip"
    folder.mkdir()
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    source = open_clip.create_model(name, load_weights=False)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": about}))
    torch.save(source.state_dict(), folder / "open_clip_pytorch_model.bin")

    teacher = from_ref(f"open_clip:local-dir:{folder}")
    module = Distiller(tiny_student(), {"clip": TeacherConfig(teacher)}).eval()
    model = agglom.load(export_module(module, tmp_path / "export", manifest({"clip": teacher}), 32, 1))
    pictures = torch.rand(2, 3, 32, 32)
    got = model.zero_shot(pictures, TEXTS)
    words = source.encode_text(open_clip.tokenize(TEXTS, context_length=16), normalize=True)
    summary = F.normalize(model.adaptors["clip"](pictures).summary, dim=1)
    torch.testing.assert_close(got, source.logit_scale.exp() * summary @ words.T + (bias or 0.0), rtol=1e-5, atol=1e-5)
