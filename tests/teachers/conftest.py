"""Small open_clip configurations: a CLIP ViT, a SigLIP-like timm tower and a ResNet, registered once."""

from __future__ import annotations

import json

import pytest

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "agglom-vit": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "agglom-coca": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    },
    "agglom-rn": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    "agglom-siglip": {
        "image_size": 160,
        "timm_model_name": "test_vit3",
        "timm_pool": "map",
        "timm_proj": "none",
    },
}


@pytest.fixture(scope="session")
def small_open_clip(tmp_path_factory) -> list[str]:
    """Register the configurations; returns their names."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    for name, vision in VISION.items():
        embed = 96 if name == "agglom-siglip" else 24
        config = {"embed_dim": embed, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": name == "agglom-siglip"}
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return list(VISION)
