"""Prompt templates by name and file, embeddings kept on disk, and zero-shot against open_clip's own classifier."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from agglom.data import write_index, write_shard
from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes import TEMPLATES, run_probes
from agglom.probes.templates import read_templates
from agglom.probes.towers import CachedText, embed
from agglom.teachers import OpenClipTeacher

CLASSES = ("dog", "red car", "oak tree", "cup", "house", "bicycle", "violin")


def test_the_sets_are_sound():
    assert set(TEMPLATES) == {"simple", "full"} and len(TEMPLATES["full"]) == len(set(TEMPLATES["full"])) == 80
    for name, templates in TEMPLATES.items():
        assert read_templates(name) == read_templates(templates) == templates


def test_a_file_has_one_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {}\n\n  the {} here\n", encoding="utf-8")
    assert read_templates(str(file)) == ("a {}", "the {} here")
    file.write_text("a {}\nnothing\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts.txt: 'nothing'; valid: at least one, each with one \{\}"):
        read_templates(str(file))
    file.write_text("\n")
    with pytest.raises(UserError, match="valid: at least one"):
        read_templates(str(file))
    with pytest.raises(UserError, match="templates: ful'; valid: simple, full, or a text file"):
        read_templates("ful")


class Counting:
    """Texts by their length; counts what it is asked."""

    def __init__(self, seed=0):
        self.seed, self.asked = seed, []

    def encode_text(self, texts):
        self.asked += texts
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(self.seed + len(t))) for t in texts]
        return F.normalize(torch.stack(rows), dim=1)


def test_embeddings_are_kept_for_the_same_tower_and_texts(tmp_path):
    texts = ["x" * i for i in range(1, 301)]
    first, second, other = Counting(), Counting(), Counting(seed=5)
    a = embed(CachedText(first, tmp_path), texts)
    torch.testing.assert_close(a, embed(Counting(), texts))
    again = CachedText(second, tmp_path)
    asked = len(second.asked)
    assert torch.equal(embed(again, texts), a) and len(second.asked) == asked, "read, not computed"
    assert torch.equal(embed(again, texts[255::-1]), a[:256].flip(0)) and len(second.asked) == asked + 256
    asked += 256
    assert not torch.equal(embed(again, texts[::-1]), a) and len(second.asked) == asked + 300
    assert CachedText(other, tmp_path).place != again.place
    model = torch.nn.Linear(2, 2)
    before = CachedText(Counting(), tmp_path, model).place
    with torch.no_grad():
        model.weight += 1
    assert len({before, CachedText(Counting(), tmp_path, model).place, again.place}) == 3
    file = next(again.place.iterdir())
    file.write_bytes(b"")
    with pytest.raises(UserError, match="broken .* remove it"):
        [embed(again, some) for some in (texts, texts[255::-1], texts[::-1])]


def shards(root, classes=CLASSES, label=lambda i: i % len(CLASSES)):
    splits, rng = {}, np.random.default_rng(0)
    for split, count in {"train": 8, "val": 4, "test": 35}.items():
        rows = [
            {"key": f"{i:03d}", "image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), "cls": label(i)}
            for i in range(count)
        ]
        splits[split] = [write_shard(root / f"{split}-000000.tar", rows)]
    write_index(root, splits, classes=classes)
    return root


class Mean:
    input = InputSpec(size=(32, 32), stride=8)
    sha256 = "mean"

    def __call__(self, images):
        maps = F.avg_pool2d(images, 8)
        return Features(F.pad(maps.mean((2, 3)), (0, 5)), maps)


def test_a_report_keeps_embeddings_in_the_feature_cache(tmp_path):
    data, options = shards(tmp_path / "data"), {"student": "clip", "out": tmp_path / "out", "show": 1}
    counts = []
    for templates in ("simple", "simple", "full"):
        tower = Counting()
        report = run_probes({"clip": Mean()}, data, ["zeroshot"], text={"clip": tower}, templates=templates, **options)
        counts.append(len(tower.asked))
        assert report["protocol"]["zeroshot"]["models"]["clip"]["templates"] == list(TEMPLATES[templates])
    assert counts == [1 + 7 * 5, 1, 1 + 7 * 80]  # one text tells the tower
    assert len(list((tmp_path / "out" / "cache").glob("text-*"))) == 1


def test_labels_that_are_lists_are_refused(tmp_path):
    data = shards(tmp_path / "data", label=lambda i: [i % 7, (i + 1) % 7])
    with pytest.raises(UserError, match="zero-shot classification wants one class an image"):
        run_probes({"clip": Mean()}, data, ["zeroshot"], tmp_path, student="clip", text={"clip": Counting()}, show=0)


def test_zeroshot_is_open_clips(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "agglom-zeroshot.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    teacher = OpenClipTeacher(name="agglom-zeroshot", pretrained=False)
    data = shards(tmp_path / "data")
    report = run_probes(
        {"clip": teacher},
        data,
        ["zeroshot"],
        tmp_path / "out",
        student="clip",
        text={"clip": teacher.text},
        templates="full",
        show=35,
    )
    tokenizer = open_clip.get_tokenizer("agglom-zeroshot")
    weights = open_clip.build_zero_shot_classifier(
        teacher.model, tokenizer, CLASSES, [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES["full"]]
    )  # (D, K)
    rng = np.random.default_rng(0)
    drawn = [np.stack([rng.integers(0, 256, (32, 32, 3)) for _ in range(count)]) for count in (8, 4, 35)]
    pixels = torch.from_numpy(drawn[2].astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (teacher.input.mean, teacher.input.std))
    with torch.no_grad():
        scores = teacher.model.encode_image((pixels - mean) / std, normalize=True) @ weights
    labels = torch.arange(35)[:, None] % 7
    found = report["models"]["clip"]["zeroshot"]
    for top in (1, 5):
        assert found[f"top{top}"] == pytest.approx((scores.topk(top).indices == labels).any(1).float().mean().item())
    best = [example["zeroshot"]["clip"][0] for example in report["examples"]]
    assert [name for name, _ in best] == [CLASSES[i] for i in scores.argmax(1).tolist()]
    assert [score for _, score in best] == pytest.approx(scores.amax(1).tolist(), abs=2e-4)
