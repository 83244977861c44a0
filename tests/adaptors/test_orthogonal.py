"""OrthogonalAdaptor: orthogonal through training, half precision and reload; preserves inner products; settles."""

import copy

import pytest
import torch

from agglom.adaptors import OrthogonalAdaptor
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

MAPS = ["matrix_exp", "cayley"]
every_map = pytest.mark.parametrize("orthogonal_map", MAPS)


def features(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return StudentFeatures(
        torch.randn(4, 1, 12, generator=generator).to(dtype), torch.randn(4, 12, 3, 3, generator=generator).to(dtype)
    )


WIDER = Dims(20, 12)


def trained(orthogonal_map, teacher=WIDER, steps=50, autocast=False):
    torch.manual_seed(0)
    adaptor = OrthogonalAdaptor(Dims(12, 12), teacher, orthogonal_map=orthogonal_map)
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=0.1, weight_decay=0.1)
    target = torch.randn(4, teacher.summary), torch.randn(4, teacher.spatial, 3, 3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            summary, spatial = adaptor(features())
        loss = (summary.float() - target[0]).square().mean() + (spatial.float() - target[1]).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] * 0.95  # it did move
    return adaptor


def error(weight):
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    assert weight.dtype == torch.float32
    return (gram - torch.eye(len(gram))).abs().max().item()


@every_map
@pytest.mark.parametrize("autocast", [False, True])
def test_orthogonal_after_optimiser_steps(orthogonal_map, autocast):
    adaptor = trained(orthogonal_map, autocast=autocast)
    assert max(error(adaptor.summary.weight), error(adaptor.spatial.weight)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        weight = adaptor.summary.weight
    assert error(weight) < 1e-5


@every_map
def test_orthogonal_after_reload_and_in_half_precision(orthogonal_map):
    adaptor = trained(orthogonal_map)
    other = OrthogonalAdaptor(Dims(12, 12), Dims(20, 12), orthogonal_map=orthogonal_map)
    other.load_state_dict(adaptor.state_dict())
    torch.testing.assert_close(other.summary.weight, adaptor.summary.weight, rtol=0, atol=0)
    half = copy.deepcopy(adaptor).to(torch.bfloat16)
    assert error(half.summary.weight) < 1e-5


@every_map
def test_inner_products_survive_a_wider_teacher(orthogonal_map):
    student, (summary, spatial) = features(), trained(orthogonal_map)(features())
    tokens, before = summary, student.summary[:, 0]
    torch.testing.assert_close(tokens @ tokens.T, before @ before.T, rtol=1e-4, atol=1e-4)
    tokens, before = spatial.flatten(2), student.spatial.flatten(2)
    torch.testing.assert_close(tokens.mT @ tokens, before.mT @ before, rtol=1e-4, atol=1e-4)


def test_a_narrower_teacher_gets_orthonormal_rows_and_a_warning():
    with pytest.warns(UserWarning, match="summary 8 wide at the teacher < 12 at the student: .* use MLPAdaptor"):
        adaptor = trained("matrix_exp", Dims(8, 12))
    assert adaptor.summary.weight.shape == (8, 12) and error(adaptor.summary.weight) < 1e-5


def test_settles_into_plain_linears_that_a_fresh_adaptor_loads():
    adaptor = trained("matrix_exp")
    expected = adaptor(features())
    plain = copy.deepcopy(adaptor)
    layers = plain.last_linears()
    with torch.no_grad():
        layers["summary"].bias += 1
    assert layers == plain.last_linears()  # the same layers again
    other = OrthogonalAdaptor(Dims(12, 12), Dims(20, 12))
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(features()).summary, expected.summary + 1)
    torch.testing.assert_close(other(features()).spatial, expected.spatial)
    torch.testing.assert_close(
        adaptor(features()).summary, expected.summary, rtol=0, atol=0
    )  # the original is untouched


def test_weight_decay_is_told_to_stay_away():
    adaptor = OrthogonalAdaptor(Dims(12, 12), Dims(12, 12))
    assert (
        adaptor.no_weight_decay() == {name for name, _ in adaptor.named_parameters()}
        and len(list(adaptor.parameters())) == 2
    )


def test_bad_map_is_named():
    with pytest.raises(UserError, match="orthogonal_map: 'householder'; valid: cayley, matrix_exp"):
        OrthogonalAdaptor(Dims(12, 12), Dims(12, 12), orthogonal_map="householder")
