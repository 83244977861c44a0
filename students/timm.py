"""Any timm model as the student, so that the result loads without agglom."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import timm
import torch
from torch import Tensor, nn

from agglom.errors import UserError, brief, nearest
from agglom.features import Dims, Features, InputSpec, StudentFeatures, prepare

from .base import Student
from .damp import add_noise
from .inherit import inherit, load_state, registers_in
from .positions import crop_positions
from .spectral import iterate_spectral, reparametrize


class TimmStudent(Student):
    """A timm ViT or CNN by name.

    A ViT's summary tokens are its class token followed by registers (timm's own `reg_tokens`), so the export stays a
    plain timm model: token 0 is the class token, tokens 1..K-1 the first registers. A CNN, and a ViT without prefix
    tokens, has one summary, its own pooled features (at inner blocks of such a ViT the mean patch).

    Args:
        name: timm model name, as in `timm.list_models()`.
        summary_tokens: K. 1 (all teachers read the same token, as in UNIC) or one for each teacher that has a summary
            (as in AM-RADIO). CNNs and ViTs without prefix tokens: 1.
        registers: further tokens without a loss of their own (ViTs).
        pretrained: start from timm's weights (needs the hub or a local cache). Summary tokens and registers that they
            lack start anew.
        checkpoint: a local safetensors or PyTorch file to start from; as `pretrained`, and positions are resampled to
            the student's grid.
        kwargs: passed to `timm.create_model`: `img_size`, `patch_size`, `depth`, `drop_path_rate`, ...
        mean: per-channel mean on the [0, 1] scale; default is the model's own.
        std: per-channel standard deviation; default is the model's own.
        grad_checkpointing: recompute activations in the backward pass.
        cropped_positions: while training, each sample's patches get a random window of the learned position grid,
            sampled at the sample's own size, and one sample in ten gets no patch positions: the student learns to
            work at any size and relies less on positions (CPE: RO-ViT, arXiv:2305.07011, as AM-RADIO has it,
            arXiv:2312.06709). ViTs with learned absolute positions; set `img_size` to the largest size to support,
            `dynamic_img_size` is switched on. Evaluation and export use timm's own resize of the whole grid.
        spectral_reparam: every linear layer in the blocks learns its largest singular value as a parameter of its own,
            which keeps attention from collapsing in long trainings of large ViTs (arXiv:2303.06296, in RADIO's form);
            exports hold plain weights. Meant with a weight decay of about 0.02.

        damp: deviation of multiplicative noise on the weights of the blocks' linear layers while training (DAMP,
            2406.16540); averages, validation and export have none. C-RADIOv4 uses it without saying how much.

    Raises:
        UserError: unknown name, more than one summary token on a CNN, a model that timm cannot build or load, or one
            that `cropped_positions`, `spectral_reparam` or `damp` has no meaning for.
    """

    def __init__(
        self,
        *,
        name: str,
        summary_tokens: int = 1,
        registers: int = 0,
        pretrained: bool = False,
        checkpoint: str | None = None,
        kwargs: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        grad_checkpointing: bool = False,
        cropped_positions: bool = False,
        spectral_reparam: bool = False,
        damp: float | None = None,
    ) -> None:
        super().__init__()
        options = dict(kwargs or {})
        prefix = summary_tokens - 1 + registers
        if prefix:
            options.setdefault("reg_tokens", prefix)
        if cropped_positions and _takes_registers(name):  # others don't know the option and are refused below
            options.setdefault("dynamic_img_size", True)
        self.name, self.options = name, options
        if prefix and not _takes_registers(name):
            raise UserError(
                f"student.summary_tokens: {summary_tokens}; valid for the CNN {name}: 1 (its pooled features)"
            )
        self.backbone = _build(name, pretrained=pretrained, checkpoint=checkpoint, options=options)
        if cropped_positions:
            crop_positions(self.backbone, name)
        if spectral_reparam:
            reparametrize(self.backbone, name)
        if damp is not None:
            add_noise(self.backbone, damp, name)
        self.spectral_reparam = spectral_reparam
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        self.tokens, self.registers = summary_tokens, registers
        self.is_vit = hasattr(self.backbone, "num_prefix_tokens") and hasattr(self.backbone, "blocks")
        self.pooled = self.is_vit and self.backbone.num_prefix_tokens == 0 and summary_tokens == 1
        if self.is_vit and self.backbone.num_prefix_tokens < summary_tokens and not self.pooled:
            raise UserError(
                f"student.summary_tokens: {summary_tokens} > {self.backbone.num_prefix_tokens} prefix tokens of "
                f"{name}; set summary_tokens to at most that, or kwargs.class_token: true"
            )
        self.input = self._input(mean, std)
        self._name_taps()

    def _input(self, mean: tuple[float, float, float] | None, std: tuple[float, float, float] | None) -> InputSpec:
        """The model's own contract; a ViT with a fixed grid has a fixed size, others any multiple of the stride."""
        cfg = timm.data.resolve_model_data_config(self.backbone)
        size = None
        if self.is_vit:
            embed = self.backbone.patch_embed
            stride = int(embed.feat_ratio(as_scalar=True))
            if not getattr(self.backbone, "dynamic_img_size", False):
                size = tuple(embed.img_size)
        else:
            stride = int(self.backbone.feature_info[-1]["reduction"])
        interpolation = cfg["interpolation"] if cfg["interpolation"] in ("bilinear", "bicubic") else "bicubic"
        return InputSpec(tuple(mean or cfg["mean"]), tuple(std or cfg["std"]), size, stride, interpolation)

    def _name_taps(self) -> None:
        """Blocks that can be tapped, with the widths of each, first to last."""
        width = self.backbone.num_features
        if self.is_vit:
            self.tap_names = tuple(f"blocks.{i}" for i in range(len(self.backbone.blocks)))
            widths = [width] * len(self.tap_names)
        else:
            info = list(self.backbone.feature_info)
            self.tap_names = tuple(str(level["module"]) for level in info)
            widths = [int(level["num_chs"]) for level in info]
        self.dims = Dims(
            summary=getattr(self.backbone, "head_hidden_size", width) if not self.is_vit else width,
            spatial=width,
            tokens=self.tokens,
            depth=len(self.tap_names),
            taps=tuple((w, w) for w in widths),
        )

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> StudentFeatures:
        """images (B, 3, H, W) in [0, 1] -> StudentFeatures; `taps` are names from `tap_names`."""
        if self.spectral_reparam and self.training and torch.is_grad_enabled():
            iterate_spectral(self.backbone)  # here, once a pass: checkpointed blocks run twice
        pixels = prepare(images, self.input)
        indices = [self.tap_names.index(tap) for tap in taps]
        return self._vit(pixels, taps, indices) if self.is_vit else self._cnn(pixels, taps, indices)

    def _vit(self, pixels: Tensor, taps: Sequence[str], indices: list[int]) -> StudentFeatures:
        prefix = self.backbone.num_prefix_tokens
        grid = self.backbone.patch_embed.dynamic_feat_size(tuple(pixels.shape[-2:]))
        if indices:
            tokens, blocks = self.backbone.forward_intermediates(
                pixels, indices=indices, return_prefix_tokens=True, output_fmt="NLC"
            )
            if not prefix:
                blocks = [(patches, patches.mean(1, keepdim=True)) for patches in blocks]
        else:
            tokens, blocks = self.backbone.forward_features(pixels), []

        def as_map(patches: Tensor) -> Tensor:  # a view: (B, H*W, C) -> (B, C, H, W)
            return patches.transpose(1, 2).unflatten(2, grid)

        tapped = {  # forward_intermediates answers in block order, whatever order was asked for
            self.tap_names[i]: (first[:, : self.tokens], as_map(patches))
            for i, (patches, first) in zip(sorted(indices), blocks, strict=True)
        }
        summary = tokens[:, : self.tokens]
        if self.pooled:
            summary = self.backbone.forward_head(tokens, pre_logits=True)[:, None]
        return StudentFeatures(summary, as_map(tokens[:, prefix:]), {t: tapped[t] for t in taps})

    def _cnn(self, pixels: Tensor, taps: Sequence[str], indices: list[int]) -> StudentFeatures:
        if indices:
            spatial, blocks = self.backbone.forward_intermediates(pixels, indices=indices)
        else:
            spatial, blocks = self.backbone.forward_features(pixels), []
        summary = self.backbone.forward_head(spatial, pre_logits=True)
        if spatial.shape[1] != self.dims.spatial:  # Swin-like models answer channels last
            spatial = spatial.permute(0, 3, 1, 2)
        tapped = {
            self.tap_names[i]: (x.mean((2, 3)).unsqueeze(1), x) for i, x in zip(sorted(indices), blocks, strict=True)
        }
        return StudentFeatures(summary.unsqueeze(1), spatial, {t: tapped[t] for t in taps})

    def normed(self, summary: Tensor, spatial: Tensor) -> Features:
        """A tapped block as the final norm leaves it: (B, K, D), (B, C, H, W) -> (B, K * D), (B, C, H, W)."""
        if self.is_vit:
            norm = self.backbone.norm
            summary, spatial = norm(summary), norm(spatial.movedim(1, -1)).movedim(-1, 1)
        return Features(summary.flatten(1), spatial)

    def no_weight_decay(self) -> set[str]:
        """Names (relative to this module) that weight decay leaves alone: position embeddings and prefix tokens."""
        names = set(self.backbone.no_weight_decay()) if hasattr(self.backbone, "no_weight_decay") else set()
        return {f"backbone.{name}" for name in names | {"pos_embed", "cls_token", "reg_token"}}


def _takes_registers(name: str) -> bool:
    """Whether timm's model of this name is a VisionTransformer, the family that `reg_tokens` belongs to."""
    if name.startswith(("local-dir:", "hf-hub:")) or not timm.is_model(name.split(".")[0]):
        return True  # known only once it is built; unknown names get their own message
    return timm.models.is_model_in_modules(
        name.split(".")[0], ["vision_transformer", "vision_transformer_hybrid", "deit", "eva"]
    )


def _build(name: str, *, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> nn.Module:
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        raise UserError(f"student.name: {name!r}; {nearest(name, timm.list_models())}")
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"student.checkpoint: {checkpoint} does not exist; give a local safetensors or PyTorch file")
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True) if checkpoint else None
    except Exception as err:  # safetensors', zip's and pickle's own
        raise UserError(f"student.checkpoint: {checkpoint} can't be read ({brief(err)}); give weights alone") from err
    try:
        if not (pretrained or state) or "reg_tokens" not in options:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
            return load_state(model, state, str(checkpoint)) if state else model
        # The source as it was published, to be loaded strictly; then its weights for as many registers as are wanted.
        published = {key: value for key, value in options.items() if key != "reg_tokens"}
        if state and registers_in(state):
            published["reg_tokens"] = registers_in(state)
        source = timm.create_model(name, pretrained=pretrained, num_classes=0, **published)
        if state:
            load_state(source, state, str(checkpoint))
        if getattr(source, "num_reg_tokens", 0) == options["reg_tokens"]:
            return source
        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        inherit(model, source)
    except (TypeError, FileNotFoundError, RuntimeError, OSError, AssertionError) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UserError(f"student {name} with kwargs {options}: {reason}") from err
    return model


@contextmanager
def masked_patches(student: Student, mask: Tensor, token: Tensor) -> Iterator[None]:
    """While it lasts, the student sees `token` in place of the patches under the mask (BEiT, iBOT).

    Args:
        student: a ViT.
        mask: (B, H, W) bool, of the images that it will see.
        token: (1, 1, D), what stands for a masked patch, before positions are added.

    Raises:
        UserError: the student has no patches (a CNN).
    """
    embed = getattr(student.backbone, "patch_embed", None)
    if embed is None:
        raise UserError(f"{type(student.backbone).__name__} has no patches to mask; valid: a ViT; take another student")

    def replace(module: nn.Module, args: Any, patches: Tensor) -> Tensor:
        here = mask if patches.ndim == 4 else mask.flatten(1)  # (B, H, W, D) where the size is free, else (B, N, D)
        return torch.where(here.unsqueeze(-1), token.to(patches.dtype), patches)

    hook = embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def attend_plainly(module: nn.Module) -> None:
    """Use the matmul-softmax-matmul form of attention in every timm block below `module`.

    For training on a CPU: the fused kernel's backward is up to 5 times slower there in bf16, and its forward is no
    faster at the lengths where a CPU is used.
    """
    for child in module.modules():
        if getattr(child, "fused_attn", False) is True:
            child.fused_attn = False  # type: ignore[assignment]
