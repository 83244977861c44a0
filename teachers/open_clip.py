"""Any open_clip model as a teacher, with its text tower for the probes."""

from __future__ import annotations

import difflib
import os
from typing import Any, Sequence

import open_clip
import torch
from torch import Tensor, nn

from agglom.errors import UserError, brief, nearest
from agglom.features import Features, InputSpec
from agglom.teachers.base import Dtype, Teacher
from agglom.teachers.sizes import Size, legal_interpolation, legal_size


class OpenClipTeacher(Teacher):
    """A frozen open_clip model: CLIP ViTs, SigLIP and other timm towers, ResNets.

    Summary is the projected image embedding of the joint image-text space, (B, embed_dim), not normalised. Spatial is
    the image tower's last map: patch tokens after the tower's last norm, before the projection, without class token;
    the last convolutional map of a ResNet. (CoCa norms only after its attention pooling, so its tokens stay unnormed.)

    `text` is the language side; it computes in fp32.

    Args:
        name: open_clip's name ("ViT-B-16"), "hf-hub:ORG/NAME" or "local-dir:PATH".
        tag: the weights' tag ("openai", "laion2b_s34b_b88k"), which also says their mean, std and activation; hf-hub:
            and local-dir: names need none.
        pretrained: False: random weights.
        checkpoint: a local file of the weights, instead of the download. Give the tag too where the model has tags that
            disagree about mean and std.
        input_size: pixels, one side or (height, width). None: the model's own. The position embedding is resampled.
        kwargs: more arguments for `open_clip.create_model`.
        dtype: "fp32" or "bf16" (image tower; norms stay in fp32).

    Raises:
        UserError: unknown name or tag, no tag, unreadable weights, a size that the model can't take.
    """

    def __init__(
        self,
        *,
        name: str,
        tag: str | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        input_size: Size = None,
        kwargs: dict[str, Any] | None = None,
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        self.name, who = name, f"OpenClipTeacher {name}"
        if input_size == "any":
            raise UserError(
                f"{who}: input_size 'any': open_clip towers have one size; valid: a number, (height, width)"
            )
        _check(name, tag, pretrained, checkpoint, who)
        model = _create(name, tag, pretrained, checkpoint, input_size, dict(kwargs or {}), who)
        self.model = model
        label = name if tag is None else f"{name}/{tag}"
        self.source = checkpoint or (f"open_clip:{label}" if pretrained else "random")
        self._tokenizer: Any = None
        self._norm = _norms_tokens(model.visual)
        self._discover(input_size, who)
        self.freeze(model.visual, dtype=dtype)

    @property
    def text(self) -> OpenClipText:
        """The language side of the same space."""
        return OpenClipText(self)

    def encode(self, pixels: Tensor) -> Features:
        return self.encode_blocks(pixels, 1)[0]

    def encode_blocks(self, pixels: Tensor, count: int) -> tuple[Features, list[Features]]:
        """See Teacher. A block's summary is its class token where the tower shows it, else the mean of its map."""
        visual = self.model.visual
        depth = getattr(getattr(visual, "transformer", None), "layers", None)
        out = visual.forward_intermediates(
            pixels,
            indices=count if depth is None else min(count, depth),
            normalize_intermediates=self._norm,
            output_fmt="NCHW",
            output_extra_tokens=True,
        )
        maps = out["image_intermediates"]
        first = out.get("image_intermediates_prefix") or [None] * len(maps)
        last = [
            Features(x.mean((2, 3)) if prefix is None else prefix[:, 0], x)
            for x, prefix in zip(maps, first, strict=True)
        ]
        return Features(out["image_features"], maps[-1]), last

    def _discover(self, asked: Size, who: str) -> None:
        """Input contract from open_clip's own preprocessing, widths and stride from a dry run."""
        data = self.model.visual.preprocess_cfg
        trunk = getattr(self.model.visual, "trunk", None)
        size, stride = self.model.visual.image_size, 1
        if trunk is not None:
            stride = int(trunk.feature_info[-1]["reduction"])
        elif (patch := getattr(self.model.visual, "patch_size", None)) is not None:
            stride = int(patch[0])
        size = legal_size(asked, size, stride, who)
        if trunk is not None and hasattr(trunk, "set_input_size") and size != tuple(trunk.patch_embed.img_size):
            trunk.set_input_size(img_size=size)
        try:
            summary, spatial = self.dry_run(size)
        except Exception as error:
            raise UserError(f"{who}: can't run at {size} pixels ({brief(error)}); set another input_size") from error
        assert summary is not None and spatial is not None
        self.summary_dim, self.spatial_dim = summary.shape[1], spatial.shape[1]
        self.input = InputSpec(
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            size=size,
            stride=size[0] // spatial.shape[-2],
            interpolation=legal_interpolation(data["interpolation"], who),
        )


class OpenClipText:
    """The text tower of an `OpenClipTeacher`, with its tokenizer; frozen and placed with the teacher."""

    def __init__(self, teacher: OpenClipTeacher) -> None:
        self.teacher = teacher

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, D) L2-normalised fp32 embeddings, computed 256 texts at a time.

        Raises:
            UserError: the tokenizer is not part of open_clip and can't be fetched.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; pass a list of strings")
        tokens, device = self.tokenize(texts), self.teacher.device
        with torch.autocast(device.type, enabled=False):
            parts = [self.teacher.model.encode_text(part.to(device), normalize=True) for part in tokens.split(256)]
        return torch.cat(parts).float()

    @property
    def scale_and_bias(self) -> tuple[float, float]:
        """Cosine -> logit, as in the model's training: the inverse temperature, and SigLIP's bias (0 for others)."""
        bias = getattr(self.teacher.model, "logit_bias", None)
        return float(self.teacher.model.logit_scale.exp()), 0.0 if bias is None else float(bias)

    def network(self) -> nn.Module:
        """The tower as a module, token ids (N, context length) -> (N, D), not normalised; it shares its weights.

        The teacher lets go of all else that its model has, and can't see images any more.
        """
        model = self.teacher.model
        for name in ("visual", "text_decoder", "logit_scale", "logit_bias"):
            if hasattr(model, name):
                setattr(model, name, None)
        return _TextNetwork(model)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(N, context length) token ids."""
        if self.teacher._tokenizer is None:
            try:
                self.teacher._tokenizer = open_clip.get_tokenizer(self.teacher.name)
            except Exception as error:
                raise UserError(
                    f"OpenClipTeacher {self.teacher.name}: no tokenizer ({brief(error)}); it comes from the Hugging "
                    "Face hub through `pip install transformers`"
                ) from error
        return self.teacher._tokenizer(list(texts))


class _TextNetwork(nn.Module):
    """What is left of a model, called with token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def _check(name: str, tag: str | None, pretrained: bool, checkpoint: str | None, who: str) -> None:
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise UserError(f"{who}: checkpoint {checkpoint!r} is not a file; give a .safetensors or .pt of this model")
    if name.startswith((open_clip.factory.HF_HUB_PREFIX, open_clip.factory.LOCAL_DIR_PREFIX)):
        if tag is not None or checkpoint is not None:
            raise UserError(f"{who}: the name says where the weights are; drop tag and checkpoint")
        return
    models = open_clip.list_models()
    if name.replace("/", "-") not in models:
        raise UserError(
            f"{who}: no open_clip model of that name; "
            f"{nearest(name, difflib.get_close_matches(name, models, n=8, cutoff=0.4) or models)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if (tag is not None or (pretrained and checkpoint is None)) and tag not in tags:
        raise UserError(f"{who}: tag {tag!r}; {nearest(str(tag), tags)}; or checkpoint: PATH, or pretrained: false")


def _create(
    name: str, tag: str | None, pretrained: bool, checkpoint: str | None, size: Size, kwargs: dict[str, Any], who: str
) -> Any:
    """`open_clip.create_model` with everything that the tag says, whether or not its file is what is loaded."""
    load, cfg = pretrained or checkpoint is not None, _tag_config(name, tag)
    arguments: dict[str, Any] = {
        "force_preprocess_cfg": {key: cfg[key] for key in ("mean", "std", "interpolation") if key in cfg},
        # open_clip only warns when weights trained with QuickGELU meet a config without it
        "force_quick_gelu": bool(cfg.get("quick_gelu", False)),
        "device": torch.get_default_device(),  # so that `on_meta` works
        **kwargs,
    }
    try:
        return open_clip.create_model(
            name,
            pretrained=(checkpoint or tag) if load else None,
            load_weights=load,
            require_pretrained=load,
            pretrained_text=False,
            force_image_size=size,
            **arguments,
        )
    except Exception as error:
        if checkpoint is not None:
            fix = "give a file of this very model"
            raise UserError(f"{who}: can't load {checkpoint!r} ({brief(error)}); {fix}") from error
        raise UserError(
            f"{who}: can't build or load ({brief(error)}); is the hub reachable? Else set checkpoint: PATH to a local "
            "file, or pretrained: false"
        ) from error


def _tag_config(name: str, tag: str | None) -> dict[str, Any]:
    """Preprocessing and activation of a tag; without a tag, what all tags of the model agree on."""
    cleaned = name.replace("/", "-")
    if tag is not None:
        return open_clip.get_pretrained_cfg(cleaned, tag)
    configs = [
        open_clip.get_pretrained_cfg(cleaned, known) for known in open_clip.list_pretrained_tags_by_model(cleaned)
    ]
    first = configs[0] if configs else {}
    return {key: value for key, value in first.items() if all(cfg.get(key) == value for cfg in configs)}


def _norms_tokens(visual: Any) -> bool:
    """Whether the tower's last norm fits its tokens (CoCa's fits only what was pooled)."""
    norm = getattr(visual, "ln_post", None)
    if norm is None:
        return True
    return getattr(visual, "attn_pool", None) is None or tuple(norm.normalized_shape) == (visual.conv1.out_channels,)
