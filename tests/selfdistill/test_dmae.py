"""DMAE: the same few patches for both, positions before masking, a teacher that stops where it is read."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models import create_model
from torch import nn
from torch.utils.data import DataLoader

from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Dims, prepare
from agglom.selfdistill import Dmae
from agglom.selfdistill.dmae import encode_visible
from agglom.teachers import SamTeacher, TimmTeacher, TinyTeacher

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 2}


def teacher(seed=3, **kwargs):
    torch.manual_seed(seed)
    return TimmTeacher(name="vit_tiny_patch16_224", pretrained=False, input_size=32, kwargs={**VIT, **kwargs})


def build(tiny_student, **options):
    encoder = options.pop("encoder", None) or teacher()
    torch.manual_seed(0)
    return Distiller(tiny_student(), {}, objectives={"dmae": partial(Dmae, encoder=encoder, **options)}, warmup_steps=0)


def fit(module, trainer, count=3):
    generator = torch.Generator().manual_seed(5)
    batches = [{"image": torch.rand(4, 3, 32, 32, generator=generator), "key": list("abcd")} for _ in range(count)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


@pytest.fixture
def seen(monkeypatch):
    """What `forward` was given and gave, each time."""
    found = []
    plain = Dmae.forward

    def forward(self, scene):
        found.append((scene, plain(self, scene)))
        return found[-1][1]

    monkeypatch.setattr(Dmae, "forward", forward)
    return found


@pytest.mark.parametrize("distance", ["cosine", "l1"])
def test_ratio_0_is_ordinary_feature_distillation(distance, tiny_student, quiet_trainer, seen):
    """Hooks on both whole encoders give the same features, and the written-out loss the same numbers."""
    encoder = teacher()
    module = build(tiny_student, encoder=encoder, ratio=0.0, distance=distance, student_block=1, teacher_block=2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, quiet_trainer(max_steps=1))
    ((scene, loss),) = seen
    module.load_state_dict(before)
    kept = {}
    student, objective = module.student.train(), module.objectives["dmae"]
    student.backbone.blocks[1].register_forward_hook(lambda m, a, out: kept.update(student=out))
    encoder.network.blocks[2].register_forward_hook(lambda m, a, out: kept.update(teacher=out))
    images = scene.batch["image"]
    student(images), encoder(images)
    ours, truth = F.normalize(objective.project(kept["student"]), dim=2), F.normalize(kept["teacher"], dim=2)
    expected = (1 - (ours * truth).sum(2)).mean(1) if distance == "cosine" else (ours - truth).abs().mean((1, 2)) * 48
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_stops_where_it_is_read(tiny_student, quiet_trainer):
    """A hook on the next block never fires, on the student neither; both see a quarter of the patches."""
    encoder, calls = teacher(), []

    def note(name):
        return lambda m, args, out: calls.append((name, args[0].shape[1]))

    module = build(tiny_student, encoder=encoder, ratio=0.75, student_block=0, teacher_block=1)
    for index, block in enumerate(encoder.network.blocks):
        block.register_forward_hook(note(f"teacher {index}"))
    encoder.network.norm.register_forward_hook(note("teacher norm"))
    fit(module, quiet_trainer(max_steps=1))
    assert calls == [("teacher 0", 5), ("teacher 1", 5)]  # a class token and 4 of 16 patches
    again = build(tiny_student, encoder=encoder, student_block=0)
    visible = torch.tensor([[0, 3, 5, 9]])
    out = encode_visible(again.student.backbone, torch.rand(1, 3, 32, 32), visible, 0)
    assert out.shape == (1, 5, 32)


def test_positions_are_added_before_patches_are_left_out():
    """An encoder without blocks shows it: each visible patch has its own position, in rising order."""
    network = create_model("vit_tiny_patch16_224", num_classes=0, **VIT).eval()
    network.blocks = nn.Sequential(nn.Identity())
    pixels, visible = torch.rand(2, 3, 32, 32), torch.tensor([[1, 7, 15], [0, 2, 14]])
    out = encode_visible(network, pixels, visible, 0)
    whole = network.patch_embed(pixels) + network.pos_embed[:, 1:]
    assert torch.equal(out[:, 0], (network.cls_token + network.pos_embed[:, :1])[:, 0].expand(2, -1))
    for image in range(2):
        torch.testing.assert_close(out[image, 1:], whole[image, visible[image]])


def test_both_see_the_same_patches_and_what_is_hidden_does_not_matter(tiny_student, quiet_trainer, seen):
    module = build(tiny_student, ratio=0.5)
    fit(module, quiet_trainer(max_steps=2))
    (first, _), (second, _) = seen
    objective = module.objectives["dmae"]
    visible = objective._visible(4, 16, first.key)
    assert visible.shape == (4, 8) and (visible.diff(dim=1) > 0).all()
    assert torch.equal(visible, objective._visible(4, 16, first.key))
    assert not torch.equal(visible, objective._visible(4, 16, second.key)) and len(visible.unique(dim=0)) == 4
    # paint over every hidden patch: neither encoder can notice
    images = torch.rand(4, 3, 32, 32)
    painted = images.clone().unflatten(2, (4, 8)).unflatten(4, (4, 8))
    for image in range(4):
        for patch in set(range(16)) - set(visible[image].tolist()):
            painted[image, :, patch // 4, :, patch % 4] = 0.0
    painted = painted.flatten(4, 5).flatten(2, 3)
    for network, spec in (
        (module.student.backbone, module.student.input),
        (objective.encoder.network, objective.encoder.input),
    ):
        a, b = (encode_visible(network.eval(), prepare(x, spec), visible, 1) for x in (images, painted))
        torch.testing.assert_close(a, b)
        assert (
            encode_visible(network, prepare(painted, spec), torch.arange(16).expand(4, -1), 1)[:, 1:] - b[:, 1:2]
        ).abs().max() > 0


def test_kept_patches_are_drawn_evenly():
    objective = Dmae(Dims(32, 32, depth=2), encoder=teacher(), ratio=0.75)
    counts = torch.zeros(16)
    for key in range(500):
        counts += torch.bincount(objective._visible(8, 16, (key,)).flatten(), minlength=16)
    shares = counts / counts.sum()
    assert (shares - 1 / 16).abs().max() < 0.004


def test_scale_of_a_token_does_not_matter(tiny_student, quiet_trainer, seen):
    """Of the teacher's, here; the prediction's by the same normalisation."""
    encoder = teacher()
    fit(build(tiny_student, encoder=encoder, teacher_block=2), quiet_trainer(max_steps=1))
    encoder.network.blocks[2].register_forward_hook(lambda m, a, out: out * 7.0)
    fit(build(tiny_student, encoder=encoder, teacher_block=2), quiet_trainer(max_steps=1))
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-6)


def test_it_learns_and_the_teacher_stays_itself(tiny_student, quiet_trainer, seen):
    encoder = teacher()
    frozen = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    module = fit(build(tiny_student, encoder=encoder), quiet_trainer(max_steps=60), count=60)
    values = [loss.mean().item() for _, loss in seen]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    assert all(torch.equal(v, frozen[k]) for k, v in encoder.network.state_dict().items())
    assert not [k for k in module.state_dict() if "encoder" in k or "network" in k]
    assert module.ema.average["objectives"]["dmae"].encoder is encoder, "an average holds no second teacher"
    assert module.frozen == {"dmae": encoder}


def test_a_teacher_with_another_class_token(tiny_student, quiet_trainer, seen):
    """Without one on a side, patches alone are compared."""
    encoder = teacher(class_token=False, global_pool="avg")
    fit(build(tiny_student, encoder=encoder), quiet_trainer(max_steps=1))
    assert seen[0][1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "ratio: 1.0; valid: 0 <= ratio < 1"),
        ({"teacher_block": 4}, "teacher_block: 4; valid: -4 to 3"),
        ({"student_block": -3}, "student_block: -3; valid: -2 to 1"),
        ({"distance": "l2"}, "distance: 'l2'; valid: cosine, l1"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        Dmae(Dims(32, 32, depth=2), encoder=teacher(), **options)


@pytest.mark.parametrize("kind", ["windows", "convolution"])
def test_teachers_that_cannot_leave_patches_out(kind):
    encoder = {
        "windows": lambda: SamTeacher(
            pretrained=False, input_size=64, kwargs={"embed_dim": 24, "depth": 2, "num_heads": 2}
        ),
        "convolution": lambda: TimmTeacher(name="resnet10t", pretrained=False, input_size=64),
    }[kind]()
    with pytest.raises(UserError, match="encoder: .*Teacher is no plain timm ViT with absolute positions"):
        Dmae(Dims(32, 32, depth=2), encoder=encoder)


def test_another_grid_is_refused(tiny_student, quiet_trainer):
    module = build(tiny_student, encoder=TinyTeacher("dino", pretrained=False))
    with pytest.raises(UserError, match=r"encoder: its grid \(8, 8\) is not the student's \(4, 4\)"):
        fit(module, quiet_trainer(max_steps=1))
