"""transformers' TimmWrapper on an export's folder as it is: the student's features, and the right preprocessing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import agglom
from agglom.callbacks import export_module
from agglom.distiller import Distiller
from agglom.students import TimmStudent
from agglom.teachers import manifest

sys.path.append(str(Path(sys.prefix) / "transformers"))  # `make test` installs it there
transformers = pytest.importorskip("transformers")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STUDENTS = {
    "tokens": {"name": "vit_tiny_patch16_224", "kwargs": VIT, "summary_tokens": 2, "registers": 1},
    "any size": {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "dynamic_img_size": True}},
    "maps": {"name": "resnet10t"},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("kind", STUDENTS)
def test_auto_model_and_processor(kind, tiny_teachers, tmp_path):
    torch.manual_seed(0)
    student = TimmStudent(**STUDENTS[kind], mean=MEAN, std=STD)
    module = Distiller(student, tiny_teachers("clip", "dino")).train()
    student(torch.rand(4, 3, 32, 32))
    folder = export_module(module.eval(), tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prepared = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    raw = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(prepared, (raw - mean) / std, rtol=1e-5, atol=1e-5)
    larger = processor(Image.fromarray(pixels.repeat(3, 0).repeat(2, 1)), return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 32, 32)

    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "TimmWrapperModel" and not model.training
    with torch.no_grad():
        found = model(prepared)
        plain = agglom.load(folder)(raw)
    last = found.last_hidden_state
    if student.is_vit:
        prefix = student.backbone.num_prefix_tokens
        torch.testing.assert_close(last[:, : student.tokens].flatten(1), plain.summary, rtol=1e-5, atol=1e-5)
        last = last[:, prefix:].transpose(1, 2).unflatten(2, plain.spatial.shape[2:])
    else:
        torch.testing.assert_close(found.pooler_output, plain.summary, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, plain.spatial, rtol=1e-5, atol=1e-5)


def test_a_classifier_on_top(tiny_teachers, tmp_path):
    """`num_labels` gives a fresh head on the student's weights, for the Trainer to fine-tune."""
    torch.manual_seed(0)
    module = Distiller(TimmStudent(**STUDENTS["tokens"]), tiny_teachers("clip", "dino")).eval()
    folder = export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    weights, own = module.student.backbone.state_dict(), model.timm_model.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in weights) and len(own) == len(weights) + 2
    out = model(torch.rand(2, 3, 32, 32), labels=torch.tensor([1, 4]))
    out.loss.backward()
    assert out.logits.shape == (2, 5) and model.timm_model.patch_embed.proj.weight.grad.abs().sum() > 0
