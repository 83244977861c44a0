"""Weights of a published model for a student with more prefix tokens than it has."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn


def registers_in(state: dict[str, Any]) -> int:
    """How many registers a timm ViT's state dict has."""
    return state["reg_token"].shape[1] if "reg_token" in state else 0


def load_state(model: nn.Module, state: dict[str, Any], path: str) -> nn.Module:
    """Load a state dict in timm's layout, in place; a ViT's positions are resampled to its grid.

    Raises:
        RuntimeError: keys that are missing, or unknown and no classifier's.
    """
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [key for key in unexpected if not key.startswith(("head", "classifier", "fc"))]
    if missing or left:
        raise RuntimeError(f"{path} lacks {missing[:3]} and has unknown {left[:3]}")
    return model


@torch.no_grad()
def inherit(model: Any, source: Any) -> None:
    """Copy a ViT's weights into one of the same kind that differs in its number of registers, in place.

    Class token, patches and their positions are taken over. Registers that the source lacks, and their positions where
    the model has any, keep their initial values.

    Raises:
        RuntimeError: the two differ in anything else.
    """
    own, theirs = model.state_dict(), source.state_dict()
    shared = min(model.num_prefix_tokens, source.num_prefix_tokens)
    for key, value in own.items():
        if key == "reg_token":
            kept = 0 if theirs.get(key) is None else min(value.shape[1], theirs[key].shape[1])
            if kept:
                value[:, :kept] = theirs[key][:, :kept]
        elif key == "pos_embed" and not model.no_embed_class:
            value[:, :shared] = theirs[key][:, :shared]
            value[:, model.num_prefix_tokens :] = theirs[key][:, source.num_prefix_tokens :]
        elif key not in theirs or theirs[key].shape != value.shape:
            raise RuntimeError(f"{key} doesn't fit the weights")
        else:
            value.copy_(theirs[key])
