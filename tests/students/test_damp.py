"""DAMP: noise of the stated deviation in training only, above spectral scales too; none in copies and exports."""

import copy

import pytest
import timm
import torch
from torch import nn

from agglom.callbacks import export_module
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.students import TimmStudent, fold_weights
from agglom.teachers import manifest


def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_noise_has_the_stated_deviation_and_no_bias(tiny_student):
    student = tiny_student(damp=0.1).train()
    layer = student.backbone.blocks[0].mlp.fc1
    plain = layer.parametrizations.weight.original.detach()
    torch.manual_seed(0)
    ratios = torch.stack([layer.weight.detach() / plain for _ in range(200)]) - 1
    assert ratios.mean().abs() < 1e-3 and ratios.std().item() == pytest.approx(0.1, rel=0.01)
    assert not torch.equal(layer.weight, layer.weight), "drawn anew at every use"
    assert torch.equal(student.eval().backbone.blocks[0].mlp.fc1.weight, plain)


@pytest.mark.parametrize("spectral", [False, True])
def test_off_at_evaluation_and_in_averages(spectral, tiny_student):
    """The same seed without noise has the same features; an average is a deep copy in evaluation mode."""
    plain, noisy = tiny_student(spectral_reparam=spectral).eval(), tiny_student(spectral_reparam=spectral, damp=0.3)
    assert torch.equal(plain(pixels()).spatial, noisy.eval()(pixels()).spatial)
    average = copy.deepcopy(noisy.train()).eval()
    assert torch.equal(plain(pixels()).spatial, average(pixels()).spatial)
    assert not torch.allclose(plain(pixels()).spatial, noisy(pixels()).spatial, atol=1e-3)


@pytest.mark.parametrize("spectral", [False, True])
def test_folding_a_training_student_leaves_no_noise(spectral, tiny_student):
    student = tiny_student(spectral_reparam=spectral, damp=0.3).train()
    expected = copy.deepcopy(student).eval()(pixels()).spatial
    folded = copy.deepcopy(student)
    fold_weights(folded.backbone)
    assert set(folded.backbone.state_dict()) == set(tiny_student().backbone.state_dict())
    torch.testing.assert_close(folded.eval()(pixels()).spatial, expected, rtol=1e-5, atol=1e-5)
    assert "parametrizations" in "".join(student.state_dict()), "the student itself stays noisy"


def test_the_weights_learn_and_the_export_is_plain(tiny_student, tiny_teachers, tmp_path):
    module = Distiller(tiny_student(damp=0.1), tiny_teachers("sam")).train()
    module.student(pixels()).spatial.square().mean().backward()
    for name, parameter in module.student.named_parameters():
        if "parametrizations" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    folder = export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 32, 1)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own = module.student.eval().backbone.forward_features(pixels())
    torch.testing.assert_close(plain.forward_features(pixels()), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.0])
def test_refusals(sigma, tiny_student):
    with pytest.raises(UserError, match="student.damp: .*valid: null, or above 0 and below 1"):
        tiny_student(damp=sigma)
    with pytest.raises(UserError, match="student.damp: 0.1, but resnet10t has no linear layers"):
        TimmStudent(name="resnet10t", damp=0.1)
    assert isinstance(tiny_student().backbone.blocks[0].mlp.fc1, nn.Linear)
