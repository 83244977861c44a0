"""OpenClipTeacher: joint-space summary and patch tokens against direct calls; the text tower; preprocessing and
activation that a tag implies; weights from files; errors; the full-size model's dimensions.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch

from agglom.errors import UserError
from agglom.features import TextTower
from agglom.teachers import OpenClipTeacher, from_ref, on_meta
from agglom.teachers import open_clip as module


@pytest.fixture(autouse=True)
def _register(small_open_clip):
    pass


def build(name: str = "agglom-vit", **options) -> OpenClipTeacher:
    torch.manual_seed(0)
    return OpenClipTeacher(name=name, pretrained=False, **options)


def inputs(teacher: OpenClipTeacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the teacher's own size, and the same normalised by hand."""
    images = torch.rand(2, 3, *teacher.input.size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (teacher.input.mean, teacher.input.std))
    return images, (images - mean) / std


@pytest.mark.parametrize("name", ["agglom-vit", "agglom-siglip", "agglom-rn", "agglom-coca"])
def test_summary_is_encode_image(name):
    teacher = build(name)
    images, pixels = inputs(teacher)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).summary, teacher.model.encode_image(pixels))


def test_spatial_is_the_normed_patch_tokens():
    teacher = build()
    images, pixels = inputs(teacher)
    visual = copy.deepcopy(teacher.model.visual)
    visual.output_tokens = True
    with torch.no_grad():
        _, tokens = visual(pixels)  # (2, 16, 32), after ln_post, without the class token
    torch.testing.assert_close(teacher(images).spatial.flatten(2).transpose(1, 2), tokens)


def test_spatial_of_a_timm_tower():
    teacher = build("agglom-siglip")
    images, pixels = inputs(teacher)
    trunk = teacher.model.visual.trunk
    with torch.no_grad():
        tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    torch.testing.assert_close(teacher(images).spatial.flatten(2).transpose(1, 2), tokens)


def test_text_tower():
    teacher = build()
    text = teacher.text
    assert isinstance(text, TextTower)
    words = ["a red sneaker", "a blue bag", "a red sneaker"]
    out = text.encode_text(words)
    assert out.shape == (3, teacher.summary_dim) and not out.requires_grad
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(out[0], out[2])
    with torch.no_grad():
        expected = teacher.model.encode_text(open_clip.tokenize(words, context_length=16), normalize=True)
    torch.testing.assert_close(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text.encode_text(words), out)
    with pytest.raises(TypeError, match="list of strings"):
        text.encode_text("a red sneaker")


@pytest.mark.parametrize("name", ["agglom-vit", "agglom-siglip", "agglom-coca"])
def test_text_network_is_the_text_side_alone(name):
    """The same embeddings from the teacher's own weights, and nothing that a text doesn't use."""
    teacher = build(name)
    tokens = torch.randint(1, 49408, (3, 16))
    before = teacher.model.encode_text(tokens)
    network = teacher.text.network()
    assert torch.equal(network(tokens), before) and torch.equal(teacher.model.encode_text(tokens), before)
    assert not any("visual" in tensor for tensor, _ in teacher.tensors())
    assert {id(p) for p in network.parameters()} <= {id(tensor) for _, tensor in teacher.tensors()}
    network.requires_grad_(True)
    network(tokens).square().sum().backward()
    assert not [parameter for parameter, p in network.named_parameters() if p.grad is None]


def test_text_stays_fp32_beside_a_bf16_image_tower():
    plain, low = build(), build(dtype="bf16")
    assert torch.equal(low.text.encode_text(["a bag"]), plain.text.encode_text(["a bag"]))


def test_another_size_resamples_the_positions():
    teacher = build(input_size=(48, 64))
    images, _ = inputs(teacher)
    assert teacher(images).spatial.shape[-2:] == (6, 8)
    assert build("agglom-siglip", input_size=96).input.grid((1, 1)) == (6, 6)


def test_weights_from_a_file(tmp_path):
    source = build()
    path = tmp_path / "clip.pt"
    torch.save(source.model.state_dict(), path)
    torch.manual_seed(5)
    teacher = OpenClipTeacher(name="agglom-vit", checkpoint=str(path))
    assert teacher.source == str(path)
    images, _ = inputs(teacher)
    torch.testing.assert_close(teacher(images).summary, source(images).summary, rtol=0, atol=0)


def test_a_tag_says_preprocessing_and_activation():
    """Also where its file is not what is loaded."""
    openai = on_meta(OpenClipTeacher, name="ViT-B-16", tag="openai", pretrained=False)
    laion = on_meta(OpenClipTeacher, name="ViT-B-16", tag="laion2b_s34b_b88k", pretrained=False)
    kinds = [
        {type(m).__name__ for m in t.model.visual.modules() if "GELU" in type(m).__name__} for t in (openai, laion)
    ]
    assert kinds == [{"QuickGELU"}, {"GELU"}]
    siglip = on_meta(OpenClipTeacher, name="ViT-B-16-SigLIP", pretrained=False)  # all its tags agree
    assert (siglip.input.mean, siglip.input.std) == ((0.5,) * 3, (0.5,) * 3)


def test_full_size_agrees_with_open_clip():
    teacher = on_meta(OpenClipTeacher, name="ViT-B-16", tag="laion2b_s34b_b88k", pretrained=False)
    config = open_clip.get_model_config("ViT-B-16")
    vision = config["vision_cfg"]
    assert (teacher.input.size, teacher.input.stride) == ((vision["image_size"],) * 2, vision["patch_size"])
    assert (teacher.summary_dim, teacher.spatial_dim) == (config["embed_dim"], vision["width"])
    assert teacher.input.mean == tuple(open_clip.OPENAI_DATASET_MEAN)


def test_tag_and_reference():
    teacher = from_ref("open_clip:ViT-B-16/openai", pretrained=False, kwargs={"device": "meta"})
    assert teacher.input.mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ViT-B-61"}, r"did you mean ViT-B-16\?"),
        ({"name": "ViT-B-16"}, "tag None; valid: .*openai"),
        ({"name": "ViT-B-16", "tag": "opeai"}, r"tag 'opeai'.*did you mean openai\?"),
        ({"name": "ViT-B-16", "checkpoint": "/nowhere.pt"}, "'/nowhere.pt' is not a file"),
        ({"name": "local-dir:/nowhere", "tag": "openai"}, "drop tag and checkpoint"),
        ({"name": "local-dir:/nowhere"}, "can't build or load"),
        (
            {"name": "agglom-vit", "pretrained": False, "input_size": 33},
            r"multiple of the stride 8; nearest: \(32, 32\)",
        ),
        ({"name": "agglom-vit", "pretrained": False, "input_size": "any"}, "one size"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message) as caught:
        OpenClipTeacher(**options)
    assert "\n" not in str(caught.value)


def test_unreachable_hub(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(module.open_clip, "create_model", offline)
    with pytest.raises(UserError, match="no route to host.*checkpoint: PATH.*pretrained: false"):
        OpenClipTeacher(name="ViT-B-16", tag="openai")


def test_local_folder(tmp_path: Path):
    source = build()
    config = {
        "model_cfg": open_clip.get_model_config("agglom-vit"),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(source.model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    teacher = from_ref(f"open_clip:local-dir:{tmp_path}")
    assert teacher.input.mean == (0.1, 0.2, 0.3) and teacher.input.interpolation == "bilinear"
    images, pixels = inputs(teacher)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).summary, source.model.encode_image(pixels))
