"""Spectral reparametrisation: no change at first, sigma = softplus(g) + 0.05 after steps, fold, copies, exports."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils import parametrize

import agglom
from agglom.callbacks import export_module
from agglom.callbacks.ema import update_average
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.export import random_like
from agglom.features import prepare
from agglom.runs import build_distiller, export_checkpoint
from agglom.students import TimmStudent, fold_weights
from agglom.students.spectral import Spectral, leading, power_iteration, raw_scale, spectral_layers
from agglom.teachers import manifest

GATED = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}  # of a ViT with a fused SwiGLU


def pixels(count=4, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def gated():
    torch.manual_seed(0)
    return TimmStudent(name="vit_giant_patch14_dinov2", kwargs=GATED, spectral_reparam=True)


def train(student, steps=6, lr=2e-3):
    """A few optimiser steps with a decay that g notices, towards features of another scale; ends after a forward."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.1)
    student.train()
    size = 28 if student.input.stride == 14 else 32
    for _ in range(steps):
        features = student(pixels(size=size))
        loss = (features.spatial - 3).square().mean() + features.summary.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student(pixels(size=size))
    return student


def scales(layer):
    """What a layer's matrices should have as largest singular values."""
    return F.softplus(layer.parametrizations.weight[0].g.detach()).flatten() + 0.05


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture
def spectral(tiny_student):
    return tiny_student(spectral_reparam=True)


@torch.no_grad()
def test_outputs_are_unchanged_at_the_start(tiny_student, spectral):
    plain = tiny_student()
    for mode in (True, False):
        expected, got = plain.train(mode)(pixels()), spectral.train(mode)(pixels())
        torch.testing.assert_close(got.spatial, expected.spatial)
        torch.testing.assert_close(got.summary, expected.summary)


def test_every_linear_layer_of_the_blocks_and_no_other(spectral):
    found = {name: layer for name, layer in spectral.backbone.named_modules() if isinstance(layer, nn.Linear)}
    assert set(spectral_layers(spectral)) == set(found.values()) and len(found) == 8
    assert all(name.startswith("blocks.") for name in found)
    for name, layer in found.items():
        parts, own = 3 if name.endswith("qkv") else 1, layer.parametrizations.weight[0]
        assert own.g.ndim == 2 and own.g.shape == (parts, 1)
        assert own.u.shape == (parts, layer.out_features // parts) and own.v.shape == (parts, layer.in_features)


def test_a_fused_gate_counts_as_two():
    student = gated()
    parts = {
        name: len(layer.parametrizations.weight[0].g)
        for name, layer in student.backbone.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert parts == {"blocks.0.attn.qkv": 3, "blocks.0.attn.proj": 1, "blocks.0.mlp.fc1": 2, "blocks.0.mlp.fc2": 1}


@pytest.mark.parametrize(("kind", "lr", "steps"), [("plain", 1e-3, 30), ("gated", 5e-5, 6)])
def test_each_matrix_has_the_singular_value_it_learnt(kind, lr, steps, tiny_student):
    """q, k and v (gate and value) one by one, against an exact SVD of the folded weights."""
    student = tiny_student(spectral_reparam=True) if kind == "plain" else gated()
    with torch.no_grad():
        for layer in spectral_layers(student):  # three scales that no shared one could be taken for
            g = layer.parametrizations.weight[0].g
            g.add_(torch.linspace(0, 1, len(g)).unsqueeze(1))
    start = [scales(layer) for layer in spectral_layers(student)]
    train(student, lr=lr, steps=steps)
    learnt = {name: scales(layer) for name, layer in student.named_modules() if layer in set(spectral_layers(student))}
    assert all((a != b).all() for a, b in zip(start, learnt.values(), strict=True))
    folded = fold_weights(copy.deepcopy(student))
    for name, expected in learnt.items():
        parts = folded.get_submodule(name).weight.detach().chunk(len(expected))
        got = torch.stack([torch.linalg.svdvals(part)[0] for part in parts])
        torch.testing.assert_close(got, expected, rtol=0.005, atol=0)


def test_power_iteration_finds_the_leading_vectors():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 8)
    u = F.normalize(torch.randn(3, 12), dim=1)
    for _ in range(200):
        u, v = power_iteration(matrices, u)
    sigma = torch.einsum("po,poi,pi->p", u, matrices, v)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrices)[:, 0])


@pytest.mark.parametrize("shape", [(2, 40, 12), (1, 12, 40), (3, 16, 16)])
def test_leading_vectors_at_the_start(shape):
    """A tenth of a percent is enough, see there; its three outputs belong together exactly."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    u, sigma, v = leading(matrices)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrices)[:, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.einsum("po,poi,pi->p", u, matrices, v), sigma)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(shape[0]))


def test_scale_is_inverted_for_any_sigma():
    sigma = torch.tensor([0.051, 0.06, 0.5, 1.0, 20.0, 1e4])
    torch.testing.assert_close(F.softplus(raw_scale(sigma)) + 0.05, sigma)
    torch.testing.assert_close(raw_scale(torch.tensor([0.0, 0.01, 0.05])), raw_scale(torch.tensor([0.051] * 3)))


@pytest.mark.parametrize("factor", [0.0, 1e-7, 0.01])
def test_a_weak_matrix_starts_at_the_floor_with_a_gradient_of_normal_size(factor, tiny_student, tmp_path):
    from safetensors.torch import save_file

    state = tiny_student().backbone.state_dict()
    key = "blocks.0.attn.proj.weight"
    torch.manual_seed(0)
    state[key] = factor * torch.randn(32, 32) / 10
    save_file(state, tmp_path / "weights.safetensors")
    student = tiny_student(spectral_reparam=True, checkpoint=str(tmp_path / "weights.safetensors")).train()
    layer = student.backbone.blocks[0].attn.proj
    expected = 0.051 if factor else 0.0
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight.detach(), 2).item(), expected)
    student(pixels()).spatial.square().mean().backward()
    gradients = [p.grad.norm() for p in student.parameters()]
    assert all(g.isfinite() for g in gradients)
    if factor:
        assert layer.parametrizations.weight.original.grad.norm() < 10 * max(gradients[:3])


def test_gradient_reaches_scale_and_weight(spectral):
    spectral.train()(pixels()).spatial.square().mean().backward()
    for layer in spectral_layers(spectral):
        weights = layer.parametrizations.weight
        assert (weights[0].g.grad != 0).all()
        assert weights.original.grad.abs().sum() > 0
        # W' doesn't change with the size of W, so that the gradient has no part along W: sigma has its share in it.
        count = len(weights[0].g)
        for w, grad in zip(weights.original.detach().chunk(count), weights.original.grad.chunk(count), strict=True):
            assert abs((w * grad).sum()) < 1e-4 * w.norm() * grad.norm()


def test_vectors_move_only_in_training_with_gradient(spectral):
    layer = spectral.backbone.blocks[0].attn.qkv.parametrizations.weight
    with torch.no_grad():
        layer.original.add_(torch.randn(96, 32))

    def moved():
        before = snapshot(layer)
        spectral(pixels())
        return not torch.equal(before["0.u"], layer[0].u), not torch.equal(before["0.v"], layer[0].v)

    spectral.eval()
    assert moved() == (False, False)
    spectral.train()
    with torch.no_grad():
        assert moved() == (False, False)
    assert moved() == (True, True)
    assert not layer[0].u.requires_grad and not layer[0].v.requires_grad


def test_one_iteration_a_pass_even_with_recomputed_blocks(tiny_student):
    """Gradients with and without checkpointing agree only if the recomputed weights are those of the forward pass."""
    grads, vectors = [], []
    for flag in (False, True):
        student = tiny_student(spectral_reparam=True, grad_checkpointing=flag).train()
        torch.manual_seed(1)
        for layer in spectral_layers(student):  # far from converged
            own = layer.parametrizations.weight[0]
            own.u.copy_(F.normalize(torch.randn_like(own.u), dim=1))
            own.v.copy_(F.normalize(torch.randn_like(own.v), dim=1))
        student(pixels(), ("blocks.0",)).spatial.square().mean().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
        vectors.append(dict(student.named_buffers()))
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_two_passes_before_one_backward(spectral):
    spectral.train()
    with torch.no_grad():
        spectral.backbone.blocks[0].mlp.fc1.parametrizations.weight.original.mul_(torch.rand(128, 1))
    (spectral(pixels()).spatial + spectral(1 - pixels()).spatial).square().mean().backward()


def test_full_precision_under_autocast(spectral):
    other = copy.deepcopy(spectral).train()
    spectral.train()(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        other(pixels())
        cast = [layer.weight.detach() for layer in spectral_layers(other)]
    assert all(torch.equal(a, b) for a, b in zip(spectral.buffers(), other.buffers(), strict=True))
    for expected, got in zip(spectral_layers(spectral), cast, strict=True):
        assert got.dtype == torch.float32 and torch.equal(expected.weight, got)


@pytest.mark.parametrize("options", [{}, {"registers": 2, "cropped_positions": True}])
@torch.no_grad()
def test_a_folded_copy_answers_the_same_with_timms_own_keys(tiny_student, options):
    with torch.enable_grad():
        student = train(tiny_student(spectral_reparam=True, **options)).eval()
    before, expected = snapshot(student), student(pixels())
    folded = copy.deepcopy(student)
    assert fold_weights(folded.backbone) is folded.backbone
    torch.testing.assert_close(folded(pixels()).spatial, expected.spatial, rtol=1e-5, atol=1e-5)
    plain = tiny_student(**options).backbone
    assert set(folded.backbone.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(folded.backbone.state_dict())
    assert {type(m) for m in folded.modules()} == {type(m) for m in tiny_student(**options).modules()}
    assert all(p.requires_grad for p in folded.parameters())
    # The student that was copied from lives on.
    after = student.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(student(pixels()).spatial, expected.spatial)


def test_a_module_without_such_layers_folds_to_itself(tiny_student):
    student = tiny_student()
    other = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Identity())
    before = snapshot(student)
    assert fold_weights(student) is student and before.keys() == student.state_dict().keys()
    assert parametrize.is_parametrized(fold_weights(other), "weight")  # somebody else's


def test_state_dict_round_trip(tiny_student):
    trained = train(tiny_student(spectral_reparam=True)).eval()
    other = tiny_student(seed=5, spectral_reparam=True).eval()
    other.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(other(pixels()).spatial, trained(pixels()).spatial)
    for key in ("original", "0.g", "0.u", "0.v"):
        assert f"backbone.blocks.0.attn.qkv.parametrizations.weight.{key}" in trained.state_dict()


def test_a_copy_for_the_average_has_its_own_weights(tiny_student):
    student = tiny_student(spectral_reparam=True)
    average = copy.deepcopy(student).requires_grad_(False)
    start = snapshot(student)
    train(student)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), average.state_dict().values(), strict=True))
    with torch.no_grad():
        first = average.eval()(pixels()).spatial
        update_average(average, student, decay=0.0)
        torch.testing.assert_close(average(pixels()).spatial, student.eval()(pixels()).spatial)
    assert not torch.allclose(first, average(pixels()).spatial, atol=1e-3)


def test_weight_decay_acts_on_the_scale(spectral):
    exempt = spectral.no_weight_decay()
    for name, parameter in spectral.named_parameters():
        if "parametrizations" in name:
            assert parameter.ndim >= 2 and name not in exempt


def test_on_the_meta_device(spectral):
    with torch.device("meta"):
        student = TimmStudent(
            name="vit_tiny_patch16_224",
            spectral_reparam=True,
            kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        )
    shapes = {key: value.shape for key, value in spectral.state_dict().items()}
    assert {key: value.shape for key, value in student.state_dict().items()} == shapes
    assert all(value.is_meta for value in student.state_dict().values())


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_refused_where_blocks_have_no_linear_layers(name):
    with pytest.raises(UserError) as err:
        TimmStudent(name=name, spectral_reparam=True)
    message = str(err.value)
    assert message.startswith("student.spectral_reparam: true") and name in message and "valid: false" in message
    assert "\n" not in message


@pytest.fixture
def module(tiny_student, tiny_teachers):
    """A distiller around a trained student with both options."""
    student = train(tiny_student(spectral_reparam=True, cropped_positions=True, summary_tokens=2))
    return Distiller(student, tiny_teachers("clip", "dino"), warmup_steps=1).eval()


@torch.no_grad()
def test_the_export_is_plain_and_the_run_goes_on(module, tmp_path):
    before, expected = snapshot(module), module.student(pixels())
    folder = export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert not any("parametrizations" in key for key in plain.state_dict())
    got = plain.forward_features(prepare(pixels(), module.student.input))
    torch.testing.assert_close(got[:, :2], expected.summary, rtol=1e-5, atol=1e-5)
    loaded = agglom.load(folder)
    torch.testing.assert_close(loaded(pixels()).spatial, expected.spatial, rtol=1e-5, atol=1e-5)
    assert loaded(torch.rand(1, 3, 48, 40)).spatial.shape[-2:] == (6, 5)
    fresh = random_like(loaded)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(module.student(pixels()).spatial, expected.spatial)


def test_a_checkpoint_with_an_average_is_exported(tmp_path):
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    options = {"name": "vit_tiny_patch16_224", "spectral_reparam": True, "cropped_positions": True, "kwargs": vit}
    encoder = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip", "pretrained": False}}
    config = {
        "model": {
            "student": {"class_path": "agglom.students.TimmStudent", "init_args": options},
            "teachers": {"clip": {"encoder": encoder}},
        },
        "data": {"size": 32},
    }
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = build_distiller(config)
    train(module.student)
    average = copy.deepcopy(module.trained)
    with torch.no_grad():
        for layer in spectral_layers(average):
            layer.parametrizations.weight[0].g.add_(0.5)
    state = {
        "state_dict": module.state_dict(),
        "optimizer_states": [],
        "loops": {},
        "callbacks": {"WeightEMA": {"average": average.state_dict()}},
        "global_step": 3,
    }
    torch.save(state, tmp_path / "checkpoints" / "last.ckpt")
    folder = export_checkpoint(tmp_path, tmp_path / "export")
    assert json.loads((folder / "agglom.json").read_text())["steps"] == 3
    with torch.no_grad():
        expected = average["student"].eval()(pixels()).spatial
        torch.testing.assert_close(agglom.load(folder)(pixels()).spatial, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(module.student.eval()(pixels()).spatial, expected, atol=1e-2)


def test_a_parametrisation_on_its_own():
    """By hand: diag(3, 1) with g for sigma 3; doubled scale doubles the weight, a doubled weight doesn't."""
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    own = Spectral(weight, 1)
    torch.testing.assert_close(own(weight), weight)
    torch.testing.assert_close(own(2 * weight), weight)
    own.g.data = raw_scale(torch.tensor([[6.0]]))
    torch.testing.assert_close(own(weight), 2 * weight)
