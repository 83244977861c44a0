"""SamTeacher: the map after the neck, at any multiple of the patch; no summary; the real encoder's dimensions."""

from __future__ import annotations

import pytest
import timm
import torch

from agglom.errors import UserError
from agglom.teachers import SamTeacher, from_ref, on_meta

SMALL = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "neck_chans": 16,
    "window_size": 3,
    "img_size": 64,
    "global_attn_indexes": (1,),
}


def small(**options) -> SamTeacher:
    torch.manual_seed(0)
    teacher = SamTeacher(pretrained=False, kwargs=SMALL, **options)
    for name, tensor in teacher.tensors():  # timm starts these tables at zero, where nothing could go wrong
        if "pos" in name:
            tensor.normal_(0, 0.5)
    return teacher


def test_is_the_neck_of_the_timm_model():
    teacher = small()
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (teacher.input.mean, teacher.input.std))
    with torch.no_grad():
        expected, _ = teacher.network.forward_intermediates((images - mean) / std)
    out = teacher(images)
    assert out.summary is None and teacher.summary_dim is None
    torch.testing.assert_close(out.spatial, expected)


@pytest.mark.parametrize("size", [(32, 32), (80, 80), (48, 112)])
def test_any_multiple_of_the_patch(size):
    """Larger, smaller and oblong, with padded windows."""
    fixed, free = small(input_size=size), small(input_size="any")
    images = torch.rand(1, 3, *size)
    out = fixed(images).spatial
    assert out.shape == (1, 16, size[0] // 16, size[1] // 16) and out.isfinite().all()
    torch.testing.assert_close(free(images).spatial, out)


def test_no_multiple_of_the_patch():
    with pytest.raises(UserError, match=r"\(72, 72\) is not a multiple of the stride 16; nearest: \(80, 80\)"):
        small(input_size=72)


def test_full_size_agrees_with_timm():
    teacher = on_meta(SamTeacher, name="samvit_base_patch16.sa1b", pretrained=False)
    config = timm.get_pretrained_cfg("samvit_base_patch16.sa1b")
    assert teacher.input.size == config.input_size[1:] == (1024, 1024)
    assert (teacher.input.mean, teacher.input.std) == (config.mean, config.std)
    assert (teacher.input.stride, teacher.summary_dim, teacher.spatial_dim) == (16, None, 256)


def test_reference():
    assert isinstance(from_ref("sam:samvit_base_patch16", pretrained=False, kwargs=SMALL), SamTeacher)
