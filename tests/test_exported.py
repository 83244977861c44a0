"""Using an export: images that it refuses, maps for its teachers' decoders, and detectors on top of one."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

import agglom
from agglom.adaptors import MLPAdaptor
from agglom.callbacks import export_module
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.export import Exported
from agglom.students import TimmStudent
from agglom.teachers import SamTeacher, manifest, on_meta
from agglom.teachers.tiny.train_sam import Prompted


@pytest.fixture
def folder(tiny_student, tiny_teachers, tmp_path):
    """A student of any size, and three adaptors."""
    module = Distiller(tiny_student(kwargs={"dynamic_img_size": True}), tiny_teachers("clip", "dino", "sam")).eval()
    return export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.rand(1, 3, 36, 32), "images of 36 x 32 pixels; valid: multiples of 8"),
        (torch.rand(3, 32, 32), r"images of shape \(3, 32, 32\); valid: \(B, 3, H, W\)"),
        (torch.rand(1, 4, 32, 32), r"images of shape \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images are uint8; valid: floats.*divide by 255"),
        (torch.rand(1, 3, 32, 32).half(), "float16 on the CPU"),
        (torch.rand(1, 3, 32, 32).bfloat16(), "images are bfloat16 and the weights float32"),
    ],
)
def test_images_that_it_can_not_take_are_one_line(folder, images, match):
    model = agglom.load(folder)
    for call in (model, model.forward_features, model.adaptors["clip"]):
        with pytest.raises(UserError, match=match) as err:
            call(images)
        assert "\n" not in str(err.value) and isinstance(err.value, ValueError)


def test_half_precision_where_the_cpu_has_it(folder):
    images, model = torch.rand(2, 3, 32, 48), agglom.load(folder)
    with torch.no_grad():
        plain = model.adaptors["clip"](images).spatial
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.adaptors["clip"](images).spatial
        half = model.bfloat16().adaptors["clip"](images.bfloat16()).spatial
    assert half.dtype == torch.bfloat16 and plain.shape == (2, 192, 4, 6)
    for found in (mixed, half):
        assert torch.nn.functional.cosine_similarity(found.float(), plain).min() > 0.99
    with pytest.raises(UserError, match=r"float16 on the CPU.*call \.float\(\)"):
        agglom.load(folder).half()(images)


def test_the_map_fits_sams_decoder():
    """Segment Anything's own: 256 channels on 64 x 64 cells of an image of 1,024 pixels; shapes alone."""
    teacher = on_meta(SamTeacher, name="samvit_base_patch16", pretrained=False)
    assert teacher.input.size == (1024, 1024) and teacher.input.grid(teacher.input.size) == (64, 64)
    with torch.device("meta"):
        student = TimmStudent(name="vit_small_patch16_224", kwargs={"dynamic_img_size": True, "depth": 1})
        model = Exported(student, {"sam": MLPAdaptor(student.dims, teacher.dims)}, {})
    through = model.adaptors["sam"]
    assert through(torch.empty(2, 3, 1024, 1024, device="meta")).spatial.shape == (2, 256, 64, 64)
    smaller = torch.empty(2, 3, 512, 512, device="meta")
    assert through(smaller).spatial.shape == (2, 256, 32, 32)
    assert through(smaller, grid=(64, 64)).spatial.shape == (2, 256, 64, 64)


@torch.no_grad()
def test_the_map_goes_through_tiny_sams_decoder(folder):
    """The decoder that tiny:sam was trained with reads the student's map at the place of its own image encoder's."""
    model, images = agglom.load(folder), torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    decoder = Prompted().eval()
    seen = []

    class Student(nn.Module):
        def tokens(self, images):
            seen.append(model.adaptors["sam"](images).spatial)
            return seen[-1].flatten(2).transpose(1, 2)

    decoder.vision = Student()
    weights, where = torch.rand(2, 5, 64).softmax(-1), torch.rand(2, 5, 5) * 2 - 1
    logits = decoder(images, weights, where)
    assert logits.shape == (2, 5, 32, 32) and seen[0].shape == (2, 192, 8, 8)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3), "the map of each image counts"


@pytest.mark.parametrize("options", [{}, {"output_stride": 8}, {"output_stride": 16}])
def test_torchvisions_own_anchors_fit_any_cnn(options, tiny_teachers, tmp_path):
    """A student that keeps a fine grid has two or three maps of its own; the others are pooled."""
    student = TimmStudent(name="resnet10t", kwargs={"channels": [8, 16, 24, 32], **options})
    module = Distiller(student, tiny_teachers("clip")).eval()
    export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 64, 7)
    backbone = agglom.detection_backbone(tmp_path / "export", channels=32)
    assert backbone.strides == [4, 8, 16, 32, 64]
    images, shared = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)], {"min_size": 64, "max_size": 64}
    for kind in (FasterRCNN, FCOS, RetinaNet):
        detector = kind(backbone, 3, image_mean=[0.0] * 3, image_std=[1.0] * 3, **shared).eval()
        assert set(detector(images)[0]) == {"boxes", "labels", "scores"}
    sizes = [x.shape[-1] for x in backbone(torch.rand(1, 3, 64, 64)).values()]
    assert sizes == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_detector_on_top_learns(folder, frozen):
    backbone = agglom.detection_backbone(folder, channels=32, frozen=frozen)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    torch.manual_seed(0)
    detector = FasterRCNN(backbone, 3, image_mean=[0.0] * 3, image_std=[1.0] * 3, min_size=64, max_size=64).train()
    params = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.01)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}] * 2
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(detector(images, targets).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    after = backbone.model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set() if frozen else {"student"})
    assert any(name.startswith("backbone.model.student") for name in detector.state_dict()) != frozen
    assert set(detector.eval()(images)[0]) == {"boxes", "labels", "scores"}
