"""Heads: what weight 0 leaves out, the order target -> update, alignment after the head, the sum over kinds."""

import torch
from torch import nn

from agglom.adaptors import MLPAdaptor
from agglom.features import Dims, Features, StudentFeatures, align
from agglom.heads import Head
from agglom.objectives import MSE, Cosine
from agglom.targets import Identity, Standardize

STUDENT = Dims(16, 16, 2, 0)


def head(summary=1.0, spatial=1.0, **options):
    torch.manual_seed(0)
    given = {
        "student": STUDENT,
        "teacher": Dims(10, 12),
        "token": 1,
        "tap_names": (),
        "weights": {"summary": summary, "spatial": spatial},
        "adaptor": MLPAdaptor,
        "normalizers": {"summary": Standardize, "spatial": Standardize},
        "losses": {"summary": Cosine, "spatial": MSE},
    }
    return Head(**{**given, **options})


def student():
    generator = torch.Generator().manual_seed(1)
    return StudentFeatures(torch.randn(3, 2, 16, generator=generator), torch.randn(3, 16, 4, 4, generator=generator))


def teacher(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return Features(
        5 + 3 * torch.randn(3, 10, generator=generator), 7 + 2 * torch.randn(3, 12, 6, 6, generator=generator)
    )


def test_weight_0_is_neither_built_nor_run():
    calls = []

    class Counting(MSE):
        def forward(self, prediction, target, mask=None):
            calls.append(prediction.ndim)
            return super().forward(prediction, target, mask)

    only = head(summary=0, losses={"summary": Counting, "spatial": Counting})
    assert list(only.losses) == list(only.normalizers) == ["spatial"]
    assert only.adaptor.summary is None and not any("summary" in name for name, _ in only.named_parameters())
    target = only.targets(Features(None, teacher().spatial))  # the summary isn't even looked at
    assert target.summary is None
    assert list(only(student(), target)) == ["spatial"] and calls == [4]


def test_targets_rest_on_the_steps_before():
    module = head().train()
    first, second = teacher(2), teacher(3)
    module.targets(first)
    mean, std = first.spatial.mean((0, 2, 3)), first.spatial.movedim(1, 0).flatten(1).std(1)
    got = module.targets(second)
    expected = (second.spatial - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(got.spatial, expected, rtol=1e-4, atol=1e-5)
    assert not got.spatial.requires_grad


def test_validation_moves_no_statistics():
    module = head().train()
    module.targets(teacher(2))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.eval().targets(teacher(3))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_the_head_runs_before_its_output_is_aligned():
    module = head()
    features, target = student(), module.targets(teacher())
    grids = []
    module.adaptor.spatial.register_forward_hook(lambda _, inputs, __: grids.append(inputs[0].shape[1]))
    losses = module(features, target)
    assert grids == [16]  # the student's 4 x 4 cells, not the teacher's 36
    tokens = module.adaptor.spatial(features.spatial.flatten(2).transpose(1, 2))
    prediction = align(tokens.transpose(1, 2).unflatten(2, (4, 4)), (6, 6))
    torch.testing.assert_close(losses["spatial"], (prediction - target.spatial).square().mean((1, 2, 3)))


def test_losses_are_per_image_and_weighted_when_combined():
    module = head(summary=0.5, spatial=2.0)
    losses = module(student(), module.targets(teacher()))
    assert {kind: tuple(loss.shape) for kind, loss in losses.items()} == {"summary": (3,), "spatial": (3,)}
    torch.testing.assert_close(module.combine(losses), 0.5 * losses["summary"] + 2 * losses["spatial"])


def test_everything_but_the_encoder_is_here():
    assert {name.split(".")[0] for name, _ in head().named_parameters()} == {"adaptor"}
    assert isinstance(head(), nn.Module) and "normalizers.summary.mean" in head().state_dict()


def test_summaries_may_have_a_normaliser_of_their_own():
    """PHI-S for the map and raw summaries, which is what an angle's dispersion is measured on."""
    module = head(normalizers={"summary": Identity, "spatial": Standardize}).train()
    features = teacher()
    targets = module.targets(features)
    assert torch.equal(targets.summary, features.summary)
    assert abs(targets.spatial.std() - 1) < 0.05 and not torch.allclose(targets.spatial, features.spatial)
