"""Adaptors without agglom: the code that a model card prints, as far as an export needs it.

Each function stands for itself on torch and timm, since its source is copied; `script` puts those together that belong
to an export's student and adaptors. Weights `w` are those of one adaptor, and `entry` is what adaptors.json says of it.
"""

from __future__ import annotations

import inspect
from typing import Any, Mapping

import torch
import torch.nn.functional as F

BEGIN = """\
import json

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

folder = "PATH_OF_THIS_FOLDER"
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
weights, entries = load_file(f"{folder}/adaptors.safetensors"), json.load(open(f"{folder}/adaptors.json"))
"""

END = """\
@torch.no_grad()
def through(name, images):  # (B, 3, H, W) in [0, 1] -> summary (B, D), map (B, C, h, w), in the teacher's own units
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    w = {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}.")}
    return {adaptor}(model, (images - mean) / std, entries[name], w)
"""


def vit(model, pixels, entry):
    x = model.forward_features(pixels)
    n, grid = model.num_prefix_tokens, model.patch_embed.dynamic_feat_size(tuple(pixels.shape[-2:]))
    summary = x[:, entry["token"]] if n else model.forward_head(x, pre_logits=True)
    return summary, x[:, n:].transpose(1, 2).unflatten(2, grid)


def cnn(model, pixels, entry):
    x = model.forward_features(pixels)
    return model.forward_head(x, pre_logits=True), x if x.shape[1] == model.num_features else x.permute(0, 3, 1, 2)


def linear(w, x):
    return F.linear(x, w["weight"], w["bias"])


def orthogonal(w, x):
    return F.linear(x, w["linear.weight"], w["linear.bias"])


def perceptron(w, x):
    def norm(x, key):
        return F.gelu(F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"]))

    x = F.linear(norm(x, "pre.0") if "pre.0.weight" in w else x, w["first.weight"], w["first.bias"])
    for i in range(sum(key.startswith("blocks.") for key in w) // 4):
        x = x + F.linear(norm(x, f"blocks.{i}.0"), w[f"blocks.{i}.2.weight"], w[f"blocks.{i}.2.bias"])
    return F.linear(norm(x, "norm"), w["last.weight"], w["last.bias"])


def on_tokens(features, head, model, pixels, entry, w):
    summary, spatial = features(model, pixels, entry)
    own = [{k[8:]: v for k, v in w.items() if k.startswith(kind)} for kind in ("summary.", "spatial.")]
    summary = head(own[0], summary) if own[0] else None
    spatial = head(own[1], spatial.movedim(1, -1)).movedim(-1, 1) if own[1] else None
    return summary, spatial if spatial is None else F.pixel_shuffle(spatial, entry["options"].get("upsample", 1))


def conv(features, model, pixels, entry, w):
    summary, x = features(model, pixels, entry)
    summary = F.linear(summary, w["summary.weight"], w["summary.bias"]) if "summary.weight" in w else None
    if "spatial.last.weight" not in w:
        return summary, None
    doublings = entry["options"].get("upsample", 1).bit_length() - 1
    for i in range(doublings + 3):  # norm, [x2, ReLU, norm,]* conv, ReLU, norm, conv, ReLU, norm
        x = F.group_norm(x, 1, w[f"spatial.body.{3 * i}.weight"], w[f"spatial.body.{3 * i}.bias"])
        if i < doublings + 2:
            kernel, bias = (w[f"spatial.body.{3 * i + 1}.{part}"] for part in ("weight", "bias"))
            x = F.conv_transpose2d(x, kernel, bias, 2) if i < doublings else F.conv2d(x, kernel, bias, padding=1)
            x = F.relu(x)
    return summary, F.linear(x.movedim(1, -1), w["spatial.last.weight"], w["spatial.last.bias"]).movedim(-1, 1)


def attention(features, model, pixels, entry, w):
    def layer(x, key):
        return F.linear(x, w[f"{key}.weight"], w[f"{key}.bias"]) if f"{key}.weight" in w else None

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], w[f"block.{key}.weight"], w[f"block.{key}.bias"], 1e-6)

    summary, spatial = features(model, pixels, entry)
    first = layer(summary, "enter") if "enter.weight" in w else summary
    x = torch.cat([first[:, None], spatial.flatten(2).transpose(1, 2)], 1)
    width = x.shape[-1]
    heads = entry["options"].get("heads") or next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    q, k, v = layer(norm(x, "norm1"), "block.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + w["block.scale1"] * layer(mixed, "block.proj")
    x = x + w["block.scale2"] * layer(F.gelu(layer(norm(x, "norm2"), "block.mlp.0")), "block.mlp.2")
    tokens = layer(x[:, 1:], "spatial")
    return layer(x[:, 0], "summary"), None if tokens is None else tokens.mT.unflatten(2, spatial.shape[-2:])


def ladder(features, model, pixels, entry, w):
    last, options = len(entry["tap_names"]) - 1, entry["options"]
    rungs = sorted(r % (last + 1) for r in options.get("rungs") or range(last + 1))
    more = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
    maps = model.forward_intermediates(pixels, indices=rungs, output_fmt="NCHW", intermediates_only=True, **more)
    read = [(x[1][:, entry["token"]], x[0]) if more else (x.mean((2, 3)), x) for x in maps]
    summary, spatial = features(model, pixels, entry)
    if rungs[-1] == last and not options.get("raw_last"):
        read[-1] = summary, spatial

    def total(kind, rungs):
        if f"{kind}.last.weight" not in w:
            return None
        columns, out = w[f"{kind}.last.weight"], w[f"{kind}.last.bias"].view(-1, *[1] * (rungs[0].ndim - 2))
        for r, x in enumerate(rungs):
            x = F.gelu(F.linear(x.movedim(1, -1), w[f"{kind}.first.{r}.weight"], w[f"{kind}.first.{r}.bias"]))
            part, columns = columns[:, : x.shape[-1]], columns[:, x.shape[-1] :]
            x = F.linear(x, part).movedim(-1, 1)
            if x.ndim == 4 and x.shape[2:] != spatial.shape[2:]:
                x = F.interpolate(x, spatial.shape[2:], mode="bilinear", antialias=x.shape[2] > spatial.shape[2])
            out = out + x
        return out

    return total("summary", [x for x, _ in read]), total("spatial", [x for _, x in read])


HEADS = {"LinearAdaptor": linear, "OrthogonalAdaptor": orthogonal, "MLPAdaptor": perceptron}  # work on single tokens
WHOLE = {"ConvAdaptor": conv, "AttentionAdaptor": attention, "LadderAdaptor": ladder}


def script(entries: Mapping[str, Any], *, is_vit: bool) -> str | None:
    """Python that gives `through(name, images)` where only torch, timm and safetensors are installed.

    Args:
        entries: adaptors.json.
        is_vit: whether the student has tokens (else maps).

    Returns:
        None without adaptors, with adaptors of several classes, or of one that is not agglom's own.
    """
    classes = {entry["class"] for entry in entries.values()}
    if len(classes) != 1 or not classes <= {*HEADS, *WHOLE}:
        return None
    (name,) = classes
    features = vit if is_vit else cnn
    parts: list[Any] = [features, HEADS[name], on_tokens] if name in HEADS else [features, WHOLE[name]]
    call = f"on_tokens({features.__name__}, {HEADS[name].__name__}, " if name in HEADS else (
        f"{WHOLE[name].__name__}({features.__name__}, "
    )  # fmt: skip
    end = END.replace("{adaptor}(", call)
    return "\n\n".join([BEGIN, *(inspect.getsource(part) for part in parts), end])
