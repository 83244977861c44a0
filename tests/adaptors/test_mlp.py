"""MLPAdaptor: the v1 and v2 formulas written out by hand, parameter counts, upsampling and default width."""

import pytest
import torch
import torch.nn.functional as F

from agglom.adaptors import MLPAdaptor
from agglom.adaptors.base import to_map, to_tokens
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

STUDENT, TEACHER = Dims(12, 12, tokens=2), Dims(8, 10)


def features(batch=2, grid=(3, 4)) -> StudentFeatures:
    torch.manual_seed(0)
    return StudentFeatures(torch.randn(batch, 2, 12), torch.randn(batch, 12, *grid))


def test_v1_is_linear_norm_gelu_linear():
    adaptor, student = MLPAdaptor(STUDENT, TEACHER, token=1, hidden=16), features()
    head = adaptor.summary
    hidden = student.summary[:, 1] @ head.first.weight.T + head.first.bias
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(adaptor(student).summary, expected)


def test_v2_adds_residual_blocks_before_the_norm():
    adaptor, student = MLPAdaptor(STUDENT, TEACHER, version="v2", blocks=2, pre_norm=True), features()
    head = adaptor.spatial
    x = student.spatial.permute(0, 2, 3, 1)
    x = head.first(F.gelu(F.layer_norm(x, (12,))))
    for _, _, linear in head.blocks:
        x = x + linear(F.gelu(F.layer_norm(x, (10,))))
    expected = head.last(F.gelu(F.layer_norm(x, (10,)))).permute(0, 3, 1, 2)
    torch.testing.assert_close(adaptor(student).spatial, expected)


def test_parameter_count():
    adaptor = MLPAdaptor(STUDENT, TEACHER)
    hidden = 10  # the larger of the teacher's widths
    expected = sum(12 * hidden + hidden + 2 * hidden + hidden * out + out for out in (8, 10))
    assert sum(p.numel() for p in adaptor.parameters()) == expected


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_last_bias_starts_at_zero(version):
    layers = MLPAdaptor(STUDENT, TEACHER, version=version).last_linears()
    assert all(torch.count_nonzero(layer.bias) == 0 for layer in layers.values())


def test_upsample_spreads_each_cell_in_reading_order():
    adaptor, student = MLPAdaptor(STUDENT, TEACHER, upsample=2), features()
    fine = adaptor(student).spatial
    assert fine.shape == (2, 10, 6, 8)
    flat = adaptor.spatial(student.spatial[:, :, 1, 2])  # the head on one cell: 10 channels x 4 places
    torch.testing.assert_close(fine[:, :, 2:4, 4:6], flat.reshape(2, 10, 2, 2))


def test_a_vit_map_is_not_copied():
    tokens = torch.randn(2, 3 + 12, 8)  # three prefix tokens
    spatial = to_map(tokens[:, 3:], (3, 4))
    assert spatial.data_ptr() == to_tokens(spatial).data_ptr() == tokens[:, 3:].data_ptr()


def test_bad_values_are_named():
    with pytest.raises(UserError, match="token: 2; .* valid: 0 to 1"):
        MLPAdaptor(STUDENT, TEACHER, token=2)
    with pytest.raises(UserError, match="version: 'v3'; valid: v1, v2"):
        MLPAdaptor(STUDENT, TEACHER, version="v3")
    with pytest.raises(UserError, match="summary: the teacher's is 8 wide"):
        MLPAdaptor(Dims(None, 12), TEACHER)
