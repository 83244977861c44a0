"""TimmStudent: what its features are in timm's own words, tokens, taps, sizes, and refusals."""

import pytest
import torch

from agglom.errors import UserError
from agglom.features import prepare
from agglom.students import TimmStudent

HYBRID = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def pixels(size=(32, 32)):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_vit_tokens_are_class_then_registers_then_patches(tiny_student):
    student = tiny_student(summary_tokens=2, registers=3).eval()
    tokens = student.backbone.forward_features(prepare(pixels(), student.input))
    got = student(pixels())
    assert tokens.shape == (2, 1 + 1 + 3 + 16, 32)
    torch.testing.assert_close(got.summary, tokens[:, :2])
    torch.testing.assert_close(got.spatial.flatten(2).transpose(1, 2), tokens[:, 5:])
    assert (student.dims.summary, student.dims.spatial, student.dims.tokens, student.dims.depth) == (32, 32, 2, 2)


@torch.no_grad()
def test_taps_are_the_blocks_outputs_before_the_norm_in_the_order_asked(tiny_student):
    student = tiny_student().eval()
    seen = {}
    for name, block in zip(student.tap_names, student.backbone.blocks, strict=True):
        block.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    got = student(pixels(), ("blocks.1", "blocks.0"))
    assert list(got.taps) == ["blocks.1", "blocks.0"]
    for name, (summary, spatial) in got.taps.items():
        torch.testing.assert_close(summary, seen[name][:, :1])
        torch.testing.assert_close(spatial.flatten(2).transpose(1, 2), seen[name][:, 1:])
    plain = student(pixels())
    torch.testing.assert_close(got.summary, plain.summary)
    torch.testing.assert_close(got.spatial, plain.spatial)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet10t", {}), ("efficientnet_lite0", {}), ("mobilenetv3_small_050", {}), ("convnext_atto", {})],
)
@torch.no_grad()
def test_cnns(name, kwargs):
    torch.manual_seed(0)
    student = TimmStudent(name=name, kwargs=kwargs).eval()
    got = student(pixels((64, 96)), student.tap_names)
    grid = student.input.grid((64, 96))
    assert got.summary.shape == (2, 1, student.dims.summary)
    assert got.spatial.shape == (2, student.dims.spatial, *grid) and student.input.size is None
    assert [summary.shape[-1] for summary, _ in got.taps.values()] == [width for width, _ in student.dims.taps]
    assert [spatial.shape[1] for _, spatial in got.taps.values()] == [width for _, width in student.dims.taps]
    map_ = student.backbone.forward_features(prepare(pixels((64, 96)), student.input))
    torch.testing.assert_close(got.spatial, map_)
    torch.testing.assert_close(got.summary[:, 0], student.backbone.forward_head(map_, pre_logits=True))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])  # the mean, attention pooling
@torch.no_grad()
def test_a_vit_without_prefix_tokens_has_its_pooled_features(name):
    torch.manual_seed(0)
    options = {} if "siglip" in name else {"class_token": False, "global_pool": "avg"}
    student = TimmStudent(name=name, kwargs={"img_size": 32, "patch_size": 8, "depth": 2, **options}).eval()
    got = student(pixels(), student.tap_names)
    images = prepare(pixels(), student.input)
    patches = student.backbone.forward_features(images)
    torch.testing.assert_close(got.summary[:, 0], student.backbone(images))
    torch.testing.assert_close(got.spatial.flatten(2).transpose(1, 2), patches)
    for summary, spatial in got.taps.values():
        torch.testing.assert_close(summary[:, 0], spatial.mean((2, 3)))
    torch.testing.assert_close(student(pixels()).summary, got.summary)


@torch.no_grad()
def test_hybrid():
    torch.manual_seed(0)
    student = TimmStudent(name="vit_tiny_r_s16_p8_224", summary_tokens=2, kwargs=HYBRID).eval()
    got = student(pixels(), student.tap_names)
    assert student.input.size == (32, 32) and student.input.stride * got.spatial.shape[-1] == 32
    assert all(x.shape == got.spatial.shape for _, x in got.taps.values())


@torch.no_grad()
def test_sizes(tiny_student):
    fixed, free = tiny_student().eval(), tiny_student(kwargs={"dynamic_img_size": True}).eval()
    assert fixed.input.size == (32, 32) and free.input.size is None
    assert fixed(pixels((48, 64))).spatial.shape[-2:] == (4, 4)  # resized to its own size
    assert free(pixels((48, 64))).spatial.shape[-2:] == (6, 8)
    with pytest.raises(ValueError, match="not divisible"):
        free(pixels((30, 32)))
    torch.testing.assert_close(fixed(pixels()).spatial, free(pixels()).spatial)


@torch.no_grad()
def test_own_mean_and_std_are_applied(tiny_student):
    student, other = tiny_student().eval(), tiny_student(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25)).eval()
    shifted = torch.stack(
        [(x - m) / s for x, m, s in zip(pixels().unbind(1), (0.1, 0.2, 0.3), (1, 0.5, 0.25), strict=True)], 1
    )
    torch.testing.assert_close(other(pixels()).summary[:, 0], student.backbone.forward_features(shifted)[:, 0])


def test_checkpointed_gradients_are_the_same(tiny_student):
    grads = []
    for flag in (False, True):
        student = tiny_student(grad_checkpointing=flag)
        student(pixels()).spatial.square().mean().backward()
        grads.append(student.backbone.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_starts_from_a_local_file(tiny_student, tmp_path):
    from safetensors.torch import save_file

    first = tiny_student(seed=1)
    save_file(first.backbone.state_dict(), tmp_path / "w.safetensors")
    second = tiny_student(seed=2, checkpoint=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    save_file({"blocks.0.norm1.weight": torch.ones(32)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="part.safetensors lacks") as err:
        tiny_student(checkpoint=str(tmp_path / "part.safetensors"))
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "vit_tinny_patch16_224"}, ["student.name: 'vit_tinny_patch16_224'", "did you mean vit_tiny"]),
        ({"name": "resnet10t", "summary_tokens": 2}, ["summary_tokens: 2", "CNN resnet10t: 1"]),
        ({"name": "vit_tiny_patch16_224", "kwargs": {"no_such": 1}}, ["vit_tiny_patch16_224", "no_such"]),
        ({"name": "vit_tiny_patch16_224", "checkpoint": "/nowhere.safetensors"}, ["/nowhere.safetensors"]),
        (
            {"name": "vit_tiny_patch16_224", "summary_tokens": 2, "kwargs": {"reg_tokens": 0}},
            ["summary_tokens: 2 > 1 prefix tokens"],
        ),
    ],
)
def test_refusals_in_one_line(options, words):
    with pytest.raises(UserError) as err:
        TimmStudent(**options)
    assert "\n" not in str(err.value) and all(word in str(err.value) for word in words)
