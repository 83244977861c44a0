"""The code that a card prints gives the adaptors' answers without agglom: every adaptor class, tokens and maps."""

import re

import pytest
import torch

import agglom
from agglom.adaptors import (
    AttentionAdaptor,
    ConvAdaptor,
    LadderAdaptor,
    LinearAdaptor,
    MLPAdaptor,
    OrthogonalAdaptor,
)
from agglom.callbacks import export_module
from agglom.distiller import Distiller
from agglom.standalone import script
from agglom.students import TimmStudent
from agglom.teachers import manifest

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
STUDENTS = {
    "tokens": {"name": "vit_tiny_patch16_224", "kwargs": VIT, "summary_tokens": 2, "registers": 1},
    "pooled": {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "class_token": False, "global_pool": "avg"}},
    "maps": {"name": "resnet10t"},
}
ADAPTORS = {
    "mlp": (MLPAdaptor, {}),
    "mlp v2": (MLPAdaptor, {"version": "v2", "blocks": 2, "pre_norm": True}),
    "mlp upsampling": (MLPAdaptor, {"upsample": 2}),
    "ladder": (LadderAdaptor, {}),
    "ladder raw": (LadderAdaptor, {"raw_last": True}),
    "ladder of two": (LadderAdaptor, {"rungs": [-1, 0]}),
    "linear": (LinearAdaptor, {}),
    "orthogonal": (OrthogonalAdaptor, {}),
    "attention": (AttentionAdaptor, {}),
    "attention of two heads": (AttentionAdaptor, {"heads": 2, "layer_scale": 1.0}),
    "conv": (ConvAdaptor, {}),
    "conv upsampling": (ConvAdaptor, {"upsample": 4, "hidden": 24}),
}


def export(kind, adaptor, tiny_teachers, folder):
    torch.manual_seed(0)
    module = Distiller(TimmStudent(**STUDENTS[kind]), tiny_teachers("clip", "dino", "sam"), adaptor=adaptor).train()
    for _ in range(2):  # statistics that differ from channel to channel, to be folded
        images = torch.rand(4, 3, 32, 32)
        module.targets(module.frames(images), module.names)
        module.student(images)
    return export_module(module.eval(), folder, manifest(dict(module.encoders.items())), 32, 7)


def printed(folder):
    """The Python block of the card that defines `through`."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (found,) = (block for block in blocks if "def through" in block)
    return found


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("name", ADAPTORS)
@torch.no_grad()
def test_every_adaptor(name, kind, tiny_teachers, tmp_path):
    cls, options = ADAPTORS[name]
    folder = export(kind, lambda *dims: cls(*dims, **options), tiny_teachers, tmp_path)
    source, space = printed(folder), {}
    assert "agglom" not in source and source.count("\n") < 60
    exec(source.replace("PATH_OF_THIS_FOLDER", str(folder)), space)
    images, model = torch.rand(3, 3, 32, 32), agglom.load(folder)
    for teacher in ("clip", "dino", "sam"):
        expected = model.adaptors[teacher](images)
        for got, wanted in zip(space["through"](teacher, images), expected, strict=True):
            if wanted is None:
                assert got is None
            else:
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                assert wanted.std() > 1e-3


def test_what_it_has_no_words_for():
    def entries(*classes):
        return {str(i): {"class": name} for i, name in enumerate(classes)}

    assert script(entries("MLPAdaptor", "MLPAdaptor"), is_vit=True) is not None
    for classes in ((), ("MLPAdaptor", "LinearAdaptor"), ("MyAdaptor",)):
        assert script(entries(*classes), is_vit=True) is None
