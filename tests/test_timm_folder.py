"""What plain timm does with an export: what its configuration says, and every way that timm has of building it."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F

from agglom.callbacks import export_module
from agglom.distiller import Distiller
from agglom.students import TimmStudent
from agglom.teachers import manifest

FIXED = {"name": "vit_tiny_patch16_224", "summary_tokens": 2, "registers": 1}
STUDENTS = {
    "fixed": {"kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}, **FIXED},
    "any size": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {
            "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True,
        },
    },
    "cnn": {"name": "resnet10t"},
}  # fmt: skip


@pytest.fixture(params=STUDENTS)
def exported(request, tiny_teachers, tmp_path):
    """A distiller whose weights are no initial ones, and its export."""
    torch.manual_seed(0)
    student = TimmStudent(**STUDENTS[request.param], mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    module = Distiller(student, tiny_teachers("clip", "dino")).train()
    module.student(torch.rand(4, 3, 32, 32))  # statistics of batch norms move
    folder = export_module(module.eval(), tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)
    return module.student, f"local-dir:{folder}"


def normalised(student, images):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (student.input.mean, student.input.std))
    return (images - mean) / std


def test_the_configuration_is_the_students_and_nobody_elses(exported):
    student, name = exported
    model = timm.create_model(name, pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1.0
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert config["interpolation"] == student.input.interpolation
    said = json.loads((open(name.removeprefix("local-dir:") + "/config.json")).read())["pretrained_cfg"]
    # the architecture's own published weights have another tag, licence and origin
    assert said["tag"] == "agglom" and said["license"] == "unknown" and model.pretrained_cfg["license"] == "unknown"
    assert not {"hf_hub_id", "url", "origin_url", "paper_ids"} & set(said)


@torch.no_grad()
def test_features_only_and_intermediates_are_the_students(exported):
    student, name = exported
    images = torch.rand(2, 3, 32, 32)
    pixels = normalised(student, images)
    taps = student(images, student.tap_names).taps
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(pixels)
    assert [x.shape[1] for x in maps] == [width for width, _ in student.dims.taps][-len(maps) :]
    model = timm.create_model(name, pretrained=True).eval()
    last, blocks = model.forward_intermediates(pixels, output_fmt="NCHW")
    for found, (_, spatial) in zip(blocks, taps.values(), strict=True):
        torch.testing.assert_close(found, spatial, rtol=1e-5, atol=1e-5)
    for found, (_, spatial) in zip(maps, list(taps.values())[-len(maps) :], strict=True):
        if not student.is_vit or found is not maps[-1]:  # timm may norm a ViT's last map
            torch.testing.assert_close(found, spatial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, model.forward_features(pixels), rtol=1e-5, atol=1e-5)


def test_a_new_head_is_fine_tuned_on_the_students_features(exported):
    student, name = exported
    model = timm.create_model(name, pretrained=True, num_classes=10)
    weights = student.backbone.state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in weights) and len(own) == len(weights) + 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pixels, labels = normalised(student, torch.rand(8, 3, 32, 32)), torch.arange(8) % 10
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(
        model.state_dict()[next(iter(weights))], weights[next(iter(weights))]
    )


@torch.no_grad()
def test_other_sizes(exported):
    """A size of its own for a ViT with a fixed one is timm's option; the same positions, resampled."""
    student, name = exported
    pixels = normalised(student, torch.rand(2, 3, 32, 32))
    plain = timm.create_model(name, pretrained=True).eval()
    if student.is_vit:
        free = timm.create_model(name, pretrained=True, dynamic_img_size=True).eval()
        torch.testing.assert_close(free.forward_features(pixels), plain.forward_features(pixels), rtol=1e-5, atol=1e-5)
        tokens = free.forward_features(torch.rand(1, 3, 48, 64))
        assert tokens.shape[1] == free.num_prefix_tokens + 6 * 8
        resized = timm.create_model(name, pretrained=True, img_size=48).eval()
        larger = torch.rand(1, 3, 48, 48)
        torch.testing.assert_close(
            resized.forward_features(larger), free.forward_features(larger), rtol=1e-4, atol=1e-4
        )
    else:
        assert plain.forward_features(torch.rand(1, 3, 64, 96)).shape[2:] == (2, 3)
