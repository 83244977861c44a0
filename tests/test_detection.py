"""Maps for detectors: what is where stays there, whatever the model's stride and size; strides and gradients are right.

The models' features are the pixels themselves, averaged over cells.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.image_list import ImageList

from agglom.detection import Anchors, DetectionBackbone, SimpleFeaturePyramid
from agglom.errors import UserError
from agglom.features import Answer, Features, InputSpec, resize
from agglom.teachers import TimmTeacher


class Pixels:
    """Means of cells; with `stages`, at these many times finer grids too."""

    def __init__(self, stride, size=None, stages=()):
        self.input, self.stages = InputSpec(size=size, stride=stride, interpolation="bilinear"), stages

    def __call__(self, images):
        return self.answer(images).features

    def answer(self, images, *, blocks=0, adaptors=()):
        size, stride = self.input.size, self.input.stride
        images = images if size is None else resize(images, size, "bilinear")
        assert images.shape[-1] % stride == 0
        maps = [F.avg_pool2d(images, stride // finer).repeat(1, 4, 1, 1) for finer in (*self.stages, 1)]
        return Answer(Features(None, maps[-1]), [Features(None, x) for x in maps][-blocks:] if blocks else [], {})


def spot(side, x0, y0, x1, y1):
    image = torch.zeros(1, 3, side, side)
    image[..., y0:y1, x0:x1] = 1
    return image


def centre(spatial, stride):
    """Centre of mass of a map (1, C, H, W), (x, y) in pixels of the image."""
    weights = spatial[0].mean(0)
    at = (torch.arange(len(weights)) + 0.5) * stride
    return [(weights.sum(dim) * at).sum().item() / weights.sum().item() for dim in (0, 1)]


@pytest.mark.parametrize(
    ("stride", "size", "stages", "side", "grids"),
    [
        (8, None, (), 64, [8]),
        (8, (48, 48), (), 48, [6]),
        (14, None, (), 96, [6]),  # shown images of 84 pixels
        (14, (56, 56), (), 64, [4]),
        (16, (64, 64), (), 128, [8]),  # twice as large as the model's own: interpolated
        (32, (64, 64), (8, 4, 2), 64, [16, 8, 4, 2]),
        (32, None, (8, 4, 2), 96, [24, 12, 6, 3]),
    ],
)
def test_what_is_drawn_somewhere_is_found_there(stride, size, stages, side, grids):
    backbone = DetectionBackbone(Pixels(stride, size, stages), channels=8)
    box = [side // 2, side // 8, side // 2 + side // 4, side // 8 + side // 2]
    maps = backbone.maps(spot(side, *box))
    assert [x.shape[-1] for x in maps] == grids
    for x, s in zip(maps, backbone.map_strides, strict=True):
        assert s == side // x.shape[-1]
        found = centre(x, s)
        assert found == pytest.approx([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], abs=s / 4)
    assert backbone.canvas(side) == ((side, side) if size is None or side < 128 else (64, 64))


@pytest.mark.parametrize(("stride", "strides"), [(4, [4, 8, 16, 32]), (16, [4, 8, 16, 32]), (32, [8, 16, 32, 64])])
def test_grids_and_widths_of_the_simple_pyramid(stride, strides):
    pyramid = SimpleFeaturePyramid(width=24, stride=stride, channels=16)
    assert pyramid.strides == strides
    out = pyramid([torch.randn(2, 24, 96 // stride, 160 // stride)])
    assert [x.shape for x in out] == [(2, 16, -(-96 // s), -(-160 // s)) for s in strides]
    for x in out:  # the LayerNorm is over channels, at each cell
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.var(1, correction=0), torch.ones_like(x[:, 0]), atol=1e-2, rtol=0)


def test_levels_stay_where_they_are():
    """A level without weights of its own kind left: every layer passes channel 0 on, so each map is a blurred image."""
    pyramid = SimpleFeaturePyramid(width=4, stride=16, channels=4).requires_grad_(False)
    for layer in pyramid.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.weight.fill_(0)[0, 0] = 1
            layer.bias.zero_()
        elif isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
            layer.weight[0, 0, layer.kernel_size[0] // 2, layer.kernel_size[0] // 2] = 1
    for level in pyramid.levels:
        for name, layer in [*level.named_children()]:
            if type(layer).__name__ == "LayerNorm2d":
                setattr(level, name, nn.Identity())
    image = torch.zeros(1, 4, 8, 8)
    image[0, 0, 2, 5] = 1  # pixels 80 to 96, 32 to 48
    for x, stride in zip(pyramid([image]), pyramid.strides, strict=True):
        assert centre(x[:, :1], stride) == pytest.approx([88, 40], abs=stride / 2 if stride > 16 else 1e-3)


def test_anchors_are_in_the_middle_of_cells():
    anchors = Anchors([8, 16], scale=2)
    images = ImageList(torch.zeros(2, 3, 24, 32), [(24, 32)] * 2)
    boxes = anchors(images, [torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 2, 2)])  # 24 = 1.5 cells of 16, rounded up
    assert len(boxes) == 2 and boxes[0].shape == (16, 4)
    assert boxes[0][1].tolist() == [12 - 8, 4 - 8, 12 + 8, 4 + 8]
    assert boxes[0][14].tolist() == [8 - 16, 24 - 16, 8 + 16, 24 + 16]


def test_torchvisions_own_detectors_take_it():
    """With their own anchors, sizes and padding; only the pyramid learns."""
    teacher = TimmTeacher(
        name="vit_tiny_patch16_224", pretrained=False, input_size="any", kwargs={"depth": 1, "embed_dim": 48}
    )
    before = {name: tensor.clone() for name, tensor in teacher.tensors()}
    backbone = DetectionBackbone(teacher, channels=32)
    assert not any("model" in name for name in backbone.state_dict())
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 64, "max_size": 128}
    for kind in (FCOS, FasterRCNN):
        detector = kind(backbone, 3, **plain).train()
        images = [torch.rand(3, 50, 70), torch.rand(3, 64, 64)]
        targets = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}] * 2
        sum(detector(images, targets).values()).backward()
        assert all(p.grad is not None for p in backbone.pyramid.parameters())
        assert set(detector.eval()(images)[0]) == {"boxes", "labels", "scores"}
    assert all(torch.equal(tensor, before[name]) and tensor.grad is None for name, tensor in teacher.tensors())


def test_the_model_moves_along_but_keeps_its_mode_and_learns_nothing():
    class Model(nn.Module):
        input = InputSpec(stride=8)

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 8)

        def forward(self, images):
            return Features(None, self.conv(images))

    model = Model().eval()
    backbone = DetectionBackbone(model, channels=8).train()
    assert not model.training and backbone.training and model.conv.weight.requires_grad
    backbone(torch.rand(2, 3, 32, 32))["0"].square().sum().backward()
    assert model.conv.weight.grad is None, "asked without gradient"
    assert backbone.to(torch.float64).model.conv.weight.dtype == torch.float64


def test_refusals():
    with pytest.raises(ValueError, match=r"\(60, 64\) is not divisible by 8"):
        DetectionBackbone(Pixels(8), channels=8)(torch.zeros(1, 3, 60, 64))

    class Blind:
        input = InputSpec(stride=8)

        def __call__(self, images):
            return Features(torch.zeros(len(images), 2), None)

    with pytest.raises(UserError, match="no feature map"):
        DetectionBackbone(Blind())
