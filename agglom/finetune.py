"""`agglom finetune`: a classifier on top of an export, with layer-wise decay of the learning rate.

An ordinary LightningModule over plain timm: `Classifier.backbone` and `Classifier.head` are what Lightning's
`BackboneFinetuning` expects, and the result is a folder that timm loads as a classifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from agglom.callbacks import RunCSVLogger, TrainingProgress
from agglom.data import ShardDataModule
from agglom.errors import UserError, brief, nearest
from agglom.features import InputSpec, prepare
from agglom.fit import TRAINER_DEFAULTS, packaged, quieten
from agglom.schedules import multiplier


class Classifier(pl.LightningModule):
    """Classes of images by the pooled features of a backbone, all of it trained.

    The learning rate of a block is `layer_decay` times the one of the block above it (BEiT, arXiv:2106.08254), as timm
    counts blocks. Works with Lightning's `BackboneFinetuning`, which trains the head alone at first: what is frozen
    when the optimiser is built is left to the callback.

    Args:
        backbone: an export's folder, a run directory with one, or a name of timm ("hf-hub:..." too).
        pretrained: False starts the same architecture from random weights, for comparison.
        lr: peak learning rate of the head.
        weight_decay: on matrices only.
        layer_decay: 1 for the same rate everywhere.
        warmup_steps: optimiser steps of linear warm-up; a half cosine to 0 follows.
        label_smoothing: of the cross-entropy.
        drop_path: rate of the last block, for models that have it; null leaves it.

    Raises:
        UserError: no such backbone, or a number out of its range.
    """

    def __init__(
        self,
        backbone: str,
        *,
        pretrained: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 0.75,
        warmup_steps: int = 50,
        label_smoothing: float = 0.1,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"layer_decay": layer_decay, "lr": lr}.items():
            if not 0 < value <= 1:
                raise UserError(f"model.{name}: {value}; valid: above 0, up to 1; change it")
        self.source = timm_name(backbone)
        self.options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
        self.backbone = self._build(pretrained, num_classes=0)
        self.spec = _contract(self.backbone)
        self.lr, self.weight_decay, self.layer_decay, self.warmup_steps = lr, weight_decay, layer_decay, warmup_steps
        self.label_smoothing = label_smoothing
        self.classes: Sequence[str] = ()
        self.head: nn.Module = nn.Identity()  # until the classes are known

    def _build(self, pretrained: bool, num_classes: int) -> Any:
        try:
            return timm.create_model(self.source, pretrained=pretrained, num_classes=num_classes, **self.options)
        except (RuntimeError, TypeError, OSError) as err:
            raise UserError(
                f"model.backbone: {self.source}: {brief(err)}; give an export, a run or a name of timm"
            ) from err

    def setup(self, stage: str) -> None:
        """Build the head once the data have said their classes.

        Raises:
            UserError: they have none.
        """
        index = self.trainer.datamodule.index  # type: ignore[attr-defined]
        if not index.classes:
            raise UserError(f"data.data: {index.root}: no classes in its index; valid: data with classes; take another")
        if self.classes:
            return
        self.classes = list(index.classes)
        width = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        self.head = nn.Linear(width, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.accuracy = MulticlassAccuracy(len(self.classes), average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), floats in [0, 1] -> logits (B, K)."""
        return self.head(self.backbone(prepare(images, self.spec)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(_pixels(batch)), _labels(batch), label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.accuracy.update(self(_pixels(batch)), _labels(batch))
        self.log("val/top1", self.accuracy, on_epoch=True, batch_size=len(batch["image"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        skipped = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        groups = param_groups_layer_decay(
            self.backbone, self.weight_decay, no_weight_decay_list=skipped, layer_decay=self.layer_decay
        )
        for group in groups:
            group["lr_scale"] *= self.layer_decay  # the head is a layer above the last block
        groups = [
            {"params": list(self.head.parameters()), "weight_decay": self.weight_decay, "lr_scale": 1.0},
            *groups,
        ]
        for group in groups:
            group["lr"] = self.lr * group["lr_scale"]
        return torch.optim.AdamW(groups, lr=self.lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The rates of this step; groups that a callback has added are the callback's."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(self.warmup_steps, total // 2)
        share = multiplier(
            self.trainer.global_step, schedule="cosine", warmup_steps=warmup, total_steps=total, final=0.0
        )
        for group in self.trainer.optimizers[0].param_groups:
            if "lr_scale" in group:
                group["lr"] = self.lr * group["lr_scale"] * share

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.save(Path(self.trainer.default_root_dir) / "model")

    def save(self, folder: Path) -> Path:
        """Write the classifier as a timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
        whole = self._build(False, num_classes=len(self.classes))
        whole.load_state_dict(self.backbone.state_dict(), strict=False)
        whole.get_classifier().load_state_dict(self.head.state_dict())
        size = self.trainer.datamodule.val_view.size  # type: ignore[attr-defined]
        spec = self.spec
        save_for_hf(
            whole,
            str(folder),
            model_config={"label_names": list(self.classes)},
            data_config={"input_size": (3, size, size), "mean": spec.mean, "std": spec.std, "crop_pct": 1.0},
            safe_serialization=True,
        )
        return folder


def timm_name(backbone: str) -> str:
    """What timm calls an export's folder, a run directory, or one of its own models.

    Raises:
        UserError: none of these.
    """
    path = Path(backbone)
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return f"local-dir:{folder}"
    name = backbone.removeprefix("timm:")
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name.split(".")[0]):
        return name
    if path.exists():
        raise UserError(f"model.backbone: {backbone} holds no export; a run has one at its end, or by `agglom export`")
    raise UserError(f"model.backbone: {backbone!r} is no folder and no model; {nearest(name, timm.list_models())}")


def _contract(model: nn.Module) -> InputSpec:
    """What the model wants: its mean and std, and its size where that is fixed."""
    config = timm.data.resolve_model_data_config(model)
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    how = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    size = tuple(config["input_size"][1:]) if fixed else None
    return InputSpec(tuple(config["mean"]), tuple(config["std"]), size, 1, how)


def _pixels(batch: dict[str, Any]) -> Tensor:
    return batch["image"].float() / 255


def _labels(batch: dict[str, Any]) -> Tensor:
    labels = batch.get("cls")
    if labels is None:
        raise UserError("data.fields: no cls; valid: with image and cls; add it")
    if not isinstance(labels, Tensor):
        raise UserError("data.data: the .cls are lists; valid: one class an image; take other data")
    return labels


class FinetuneCLI(LightningCLI):
    """LightningCLI whose run directory is trainer.default_root_dir; see `finetune`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a run directory that is in use."
        )
        parser.set_defaults({"data.fields": ["image", "cls"]})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """One line instead of a usage text."""
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, TypeError, ValueError) as err:
            raise UserError(f"{brief(err, 400)}; agglom finetune --help lists the options") from err

    def before_instantiate_classes(self) -> None:
        self.root = Path(self.config.fit.trainer.default_root_dir or "runs/finetune")
        if (self.root / "config.yaml").exists() and not self.config.fit.overwrite:
            raise UserError(
                f"trainer.default_root_dir: {self.root} holds a run; start anew with --overwrite true, or choose "
                f"another directory"
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        root = str(self.root)
        kwargs["default_root_dir"] = root
        if self.config.fit.trainer.logger in (None, True):
            (self.root / "metrics.csv").unlink(missing_ok=True)
            kwargs["logger"] = [RunCSVLogger(root), TensorBoardLogger(root, name="tensorboard", version="")]
        self.trainer_defaults["callbacks"] = [TrainingProgress()]
        return super().instantiate_trainer(**kwargs)


def finetune(args: Sequence[str]) -> FinetuneCLI:
    """Run `agglom finetune ARGS`; prints the accuracy on `data.val_split` and where the classifier is.

    Raises:
        UserError: a problem with the configuration or what it needs.
    """
    quieten()
    cli = FinetuneCLI(
        Classifier,
        ShardDataModule,
        args=["fit", *packaged(args)],
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "enable_checkpointing": False},
        parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    found = cli.trainer.callback_metrics.get("val/top1")
    if found is not None:
        print(f"top-1 on {cli.datamodule.val_split}: {100 * float(found):.1f} %")
    print(cli.root / "model")
    return cli
