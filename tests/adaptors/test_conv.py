"""ConvAdaptor: the translator's formula, any grid, reach of its convolutions, upsampling."""

import pytest
import torch
import torch.nn.functional as F

from agglom.adaptors import ConvAdaptor
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

STUDENT, TEACHER = Dims(8, 8), Dims(6, 10)


def features(grid=(7, 9)):
    torch.manual_seed(1)
    return StudentFeatures(torch.randn(2, 1, 8), torch.randn(2, 8, *grid))


def adaptor(**options):
    torch.manual_seed(0)
    return ConvAdaptor(STUDENT, TEACHER, **options)


def test_formula():
    ours, student = adaptor(hidden=12), features()
    norm0, conv1, _, norm1, conv2, _, norm2 = ours.spatial.body

    def norm(x, layer):
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    x = F.conv2d(norm(student.spatial, norm0), conv1.weight, conv1.bias, padding=1).relu()
    x = norm(F.conv2d(norm(x, norm1), conv2.weight, conv2.bias, padding=1).relu(), norm2)
    expected = torch.einsum("bchw,dc->bdhw", x, ours.spatial.last.weight)
    got = ours(student)
    torch.testing.assert_close(got.spatial, expected)
    torch.testing.assert_close(got.summary, student.summary[:, 0] @ ours.summary.weight.T)


@pytest.mark.parametrize("grid", [(1, 1), (7, 9), (16, 16)])
@pytest.mark.parametrize("upsample", [1, 2, 4])
def test_any_grid_with_one_set_of_weights(grid, upsample):
    spatial = adaptor(upsample=upsample, hidden=6)(features(grid)).spatial
    assert spatial.shape == (2, 10, grid[0] * upsample, grid[1] * upsample)


def test_upsampling_keeps_places():
    """A student cell moves the 2 x 2 cells it covers most: nothing is flipped or transposed on the way up."""
    ours, x = adaptor(upsample=2), torch.zeros(1, 8, 5, 7)
    body = ours.spatial.body[1]  # without the norms, whose statistics are global
    moved = x.clone()
    moved[:, :, 1, 4] = 1
    change = (body(moved) - body(x)).abs().sum(1)[0]
    assert set(map(tuple, change.nonzero().tolist())) == {(r, c) for r in (2, 3) for c in (8, 9)}


def test_bad_values_are_named():
    with pytest.raises(UserError, match="upsample: 3; valid: 1, 2, 4"):
        adaptor(upsample=3)
