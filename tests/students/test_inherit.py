"""Weights of a model for a student with other prefix tokens or another size."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from agglom.errors import UserError
from agglom.students import TimmStudent

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(params=["positions for all", "positions for patches"])
def published(request, tmp_path):
    """A folder with a ViT's weights, its model, and a file with its state dict."""
    torch.manual_seed(0)
    options = {**VIT, "no_embed_class": request.param == "positions for patches", "reg_tokens": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_for_hf(model, str(tmp_path / "hub"), model_args=options, safe_serialization=True)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path, model, {key: value for key, value in options.items() if key != "reg_tokens"}


@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("source", ["pretrained", "checkpoint"])
def test_as_many_tokens_and_more(published, tokens, source):
    """Everything but registers is the source's; of the registers as many as both have."""
    folder, model, options = published
    torch.manual_seed(7)
    given = (
        {"name": f"local-dir:{folder / 'hub'}", "pretrained": True}
        if source == "pretrained"
        else {"name": "vit_tiny_patch16_224", "kwargs": options, "checkpoint": str(folder / "weights.safetensors")}
    )
    backbone = TimmStudent(summary_tokens=tokens, **given).backbone
    assert backbone.num_prefix_tokens == tokens
    state, own = model.state_dict(), backbone.state_dict()
    for key, value in own.items():
        if key not in ("reg_token", "pos_embed"):
            assert torch.equal(value, state[key]), key
    kept = min(backbone.num_prefix_tokens, model.num_prefix_tokens)
    if not backbone.no_embed_class:
        assert torch.equal(own["pos_embed"][:, :kept], state["pos_embed"][:, :kept])
    assert torch.equal(own["pos_embed"][:, -16:], state["pos_embed"][:, -16:])
    assert torch.equal(own["reg_token"][:, :1], state["reg_token"])
    if tokens == 4:
        assert own["reg_token"].shape[1] == 3 and own["reg_token"][:, 1:].abs().max() < 1e-3, "the rest is new"


def test_a_file_of_another_size_is_resampled(published):
    folder, model, options = published
    kwargs = {**options, "img_size": 48}
    student = TimmStudent(
        name="vit_tiny_patch16_224", kwargs=kwargs, summary_tokens=2, checkpoint=str(folder / "weights.safetensors")
    )
    expected = timm.layers.resample_abs_pos_embed(
        model.pos_embed.detach(), (6, 6), num_prefix_tokens=0 if model.no_embed_class else 2
    )
    torch.testing.assert_close(student.backbone.pos_embed.detach(), expected)


def test_the_same_tokens_give_the_same_features(published):
    folder, model, _ = published
    student = TimmStudent(name=f"local-dir:{folder / 'hub'}", pretrained=True, summary_tokens=2).eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (student.input.mean, student.input.std))
    tokens = model.forward_features((images - mean) / std)
    torch.testing.assert_close(student(images).summary, tokens[:, :2])


def test_foreign_weights_are_one_line(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="student vit_tiny_patch16_224 with kwargs.*lacks") as err:
        TimmStudent(
            name="vit_tiny_patch16_224", kwargs=VIT, summary_tokens=2, checkpoint=str(tmp_path / "weights.safetensors")
        )
    assert "\n" not in str(err.value)
