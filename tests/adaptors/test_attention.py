"""AttentionAdaptor: equals timm's own block with the same weights; fused = plain; near identity at the start."""

import pytest
import torch
from timm.models.vision_transformer import Block

from agglom.adaptors import AttentionAdaptor
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

STUDENT, TEACHER = Dims(16, 16, 2), Dims(10, 12)


def features():
    torch.manual_seed(1)
    return StudentFeatures(torch.randn(2, 2, 16), torch.randn(2, 16, 3, 4))


def adaptor(**options):
    torch.manual_seed(0)
    return AttentionAdaptor(STUDENT, TEACHER, 1, heads=4, **options)


def test_equals_timms_block():
    ours, student = adaptor(layer_scale=0.5), features()
    block = Block(16, 4, mlp_ratio=4, qkv_bias=True, init_values=0.5)
    names = {"qkv": "attn.qkv", "proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    state = {}
    for key, value in ours.block.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        renamed = {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}
        state[renamed[key] if key in renamed else f"{names.get(layer, layer)}.{leaf}"] = value
    block.load_state_dict(state)
    x = block(torch.cat([student.summary[:, 1:2], student.spatial.flatten(2).mT], 1))
    got = ours(student)
    torch.testing.assert_close(got.summary, ours.summary(x[:, 0]))
    torch.testing.assert_close(got.spatial, ours.spatial(x[:, 1:]).mT.unflatten(2, (3, 4)))


def test_plain_attention_equals_fused():
    for a, b in zip(
        adaptor(layer_scale=1.0)(features()), adaptor(layer_scale=1.0, attention="plain")(features()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_starts_as_two_linears():
    ours, student = adaptor(), features()
    torch.testing.assert_close(ours(student).summary, ours.summary(student.summary[:, 1]), rtol=0, atol=1e-3)


def test_summary_sees_the_map_and_the_map_the_summary():
    ours, student = adaptor(layer_scale=1.0), features()
    before = ours(student)
    assert not torch.allclose(before.summary, ours(student._replace(spatial=student.spatial.roll(1, 0))).summary)
    assert not torch.allclose(before.spatial, ours(student._replace(summary=student.summary.roll(1, 0))).spatial)


def test_a_summary_of_another_width_and_a_student_without_one():
    student = StudentFeatures(torch.randn(2, 1, 24), torch.randn(2, 16, 3, 4))
    assert AttentionAdaptor(Dims(24, 16), TEACHER)(student).summary.shape == (2, 10)
    assert AttentionAdaptor(Dims(None, 16), Dims(None, 12))(student).spatial.shape == (2, 12, 3, 4)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (768, 12), (40, 1), (200, 2)])
def test_default_heads(width, heads):
    with torch.device("meta"):
        assert AttentionAdaptor(Dims(width, width), TEACHER).block.heads == heads


def test_bad_values_are_named():
    with pytest.raises(UserError, match=r"heads: 3 .* width 16; valid: \[1, 2, 4, 8, 16\]"):
        AttentionAdaptor(STUDENT, TEACHER, heads=3)
    with pytest.raises(UserError, match="attention: 'flash'; valid: fused, plain"):
        AttentionAdaptor(STUDENT, TEACHER, attention="flash")
