"""`agglom fit`: LightningCLI over Distiller and ShardDataModule, with a run directory around it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Sequence

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from agglom.cache.check import cached_teachers
from agglom.callbacks import (
    Checkpoints,
    Mixing,
    OnlyFresh,
    RandomState,
    RunCSVLogger,
    RunDirectory,
    Stopped,
    TrainingProgress,
    Unreadable,
    model_differences,
    newest,
    origin_of,
    read_checkpoint,
    remove_checkpoints,
)
from agglom.checks import Invalid, check_config, locate
from agglom.data import ShardDataModule
from agglom.distiller import Distiller
from agglom.errors import RankLost, UserError, brief
from agglom.overrides import CONFIG, stated
from agglom.plan import Stage
from agglom.schema import denied_classes

# What an unconfigured run does; every value can be set in the YAML.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # streams have no end: runs are counted in steps
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 20,
    "gradient_clip_val": 1.0,
    "enable_progress_bar": False,  # ours says more
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the shard streams split themselves
}


class FitCLI(LightningCLI):
    """LightningCLI with the run directory's rules: trainer.default_root_dir is the run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a run directory that is in use."
        )
        parser.add_argument("--checkpoint_every", type=int, default=500, help="Optimiser steps between checkpoints.")
        parser.add_argument(
            "--checkpoint_minutes", type=float | None, default=30, help="The longest time between two; null for none."
        )
        parser.add_argument("--checkpoint_keep", type=int, default=2, help="How many of the last checkpoints are kept.")
        parser.add_argument("--stages", type=list[Stage] | None, default=None, help="Spans of steps; see agglom.plan.")
        parser.link_arguments("stages", "model.stages")
        parser.link_arguments("stages", "data.stages")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Without Lightning's warning that arguments were given from Python: `agglom.cli` is where they come from."""
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, TypeError, ValueError) as err:  # jsonargparse stops at the first problem; we tell all
            raise Invalid(check_config(stated(args[1:])[0]) or [brief(err, 400)]) from err

    def _parse_ckpt_path(self) -> None:
        """Not as Lightning does, which lets a checkpoint change the configuration; see `_find_checkpoint`."""

    def before_instantiate_classes(self) -> None:
        plain = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["fit"]
        problems = check_config(plain)
        if problems:
            raise Invalid(problems)
        self.model_config = plain["model"]
        config = self.config.fit
        for name, entry in cached_teachers(plain).items():  # not built at all: their weights stay where they are
            config.model.teachers[name].encoder = Namespace(
                class_path=entry["class_path"], init_args=Namespace(**entry["init_args"])
            )
        self.root = Path(config.trainer.default_root_dir or "runs/default")
        self.origin: dict[str, Any] | None = None  # what the checkpoint to go on from says of itself
        if config.ckpt_path:
            self._find_checkpoint(config, plain["model"])
        if not config.ckpt_path and (self.root / "config.yaml").exists() and not config.overwrite:
            raise UserError(
                f"trainer.default_root_dir: {self.root} holds a run; resume it with --ckpt_path last, start anew with "
                f"--overwrite true, or choose another directory"
            )
        try:  # the check has looked; a file system may still refuse
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise UserError(
                f"trainer.default_root_dir: {self.root}: {err.strerror}; valid: a folder of yours; choose another"
            ) from err

    def _find_checkpoint(self, config: Namespace, model: dict[str, Any]) -> None:
        """Which file `ckpt_path` means, and whether this run may go on from it."""
        if config.ckpt_path == "last":
            try:
                path, state, lines = newest(self.root)
            except Unreadable as err:
                raise UserError(f"ckpt_path: {err}; remove --ckpt_path to start a new run") from err
            for line in lines:
                print(f"agglom fit: {line}; resuming from {path}, step {state['global_step']}", file=sys.stderr)
        else:
            path = Path(config.ckpt_path)
            if not path.is_file():
                raise UserError(f"ckpt_path: {path} does not exist; remove --ckpt_path to start a new run")
            try:
                state = read_checkpoint(path)
            except Unreadable as err:
                raise UserError(f"ckpt_path: {path} can't be read ({err}); take another checkpoint, or last") from err
        self.origin = origin_of(state)
        if differences := model_differences(self.origin.get("model", model), model):
            raise UserError(
                f"ckpt_path: {path} is of another model: {'; '.join(differences)}; put that back or start a new run"
            )
        config.ckpt_path = str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config.fit
        kwargs["default_root_dir"] = str(self.root)
        own_logger = config.trainer.logger in (None, True)
        if own_logger:
            kwargs["logger"] = [
                RunCSVLogger(str(self.root)),
                TensorBoardLogger(str(self.root), name="tensorboard", version=""),
            ]
        self.checkpoints = Checkpoints(config.checkpoint_every, config.checkpoint_minutes, config.checkpoint_keep)
        self.directory = RunDirectory(size=config.data.size, resumed=self.origin, model=self.model_config)
        self.trainer_defaults["callbacks"] = [
            OnlyFresh(),
            TrainingProgress(),
            RandomState(),
            *([Mixing()] if config.data.sources else []),
            self.checkpoints,
            self.directory,
        ]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as err:  # Lightning's words about its own options
            raise UserError(f"trainer: {brief(err, 400)}; change that") from err
        if not config.ckpt_path:  # not before: what is refused leaves the run that is there
            remove_checkpoints(self.root)
            if own_logger:
                (self.root / "metrics.csv").unlink(missing_ok=True)
        return trainer

    def fit(self, model: Distiller, datamodule: ShardDataModule, **kwargs: Any) -> None:
        try:
            self.trainer.fit(model, datamodule=datamodule, weights_only=True, **kwargs)
        except SIGTERMException as err:
            raise (self.checkpoints.stopped or err) from None
        except MisconfigurationException as err:
            raise UserError(f"trainer: {brief(err, 400)}; change that") from err
        except RuntimeError as err:
            if self.trainer.world_size > 1 and _of_another_rank(err):
                rank, step = self.trainer.global_rank, self.trainer.global_step
                raise RankLost(
                    f"rank {rank} lost another rank after step {step}; what that one said last tells why; --ckpt_path "
                    f"last goes on from the last checkpoint ({brief(err, 120)})"
                ) from err
            if "loading state_dict" not in str(err):
                raise
            raise UserError(
                f"ckpt_path: {kwargs.get('ckpt_path')} is of another model: {brief(err, 400)}; put back what it was "
                "trained with or start a new run"
            ) from err
        if not self.directory.exported:  # a run that was killed after its last step, and has none to make now
            self.directory.export(self.trainer, model)


def fit(args: Sequence[str]) -> FitCLI:
    """Run `agglom fit ARGS`; returns the CLI object with its trainer, model and data module.

    Raises:
        UserError: a problem with the configuration or what it needs; `Invalid`, with a line for each, before anything
            is built.
    """
    quieten()
    args = packaged(args)
    if not any(arg.endswith("help") or arg == "-h" or arg.startswith("--print_") for arg in args):
        # missing files, broken YAML and repeated keys, which a parser doesn't see or tell well
        config, lines = stated(args)
        lines += denied_classes(config)
        if lines:
            raise Invalid(lines)
    return FitCLI(
        Distiller,
        ShardDataModule,
        args=["fit", *args],
        seed_everything_default=0,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
        save_config_kwargs={"overwrite": True},  # before_instantiate_classes has refused what must not be overwritten
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def _of_another_rank(err: RuntimeError) -> bool:
    """Whether a collective failed because a process has gone or hangs. NCCL has classes for that, gloo only words."""
    words = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out waiting")
    return isinstance(err, torch.distributed.DistError) or any(word in str(err) for word in words)


def packaged(args: Sequence[str]) -> list[str]:
    """`--config configs/demo.yaml` finds the packaged file anywhere, as it does for `agglom check`."""
    out: list[str] = []
    for arg in args:
        option, given, path = arg.partition("=")
        if out and out[-1] in CONFIG:
            arg = str(locate(arg))
        elif option in CONFIG and given:
            arg = f"{option}={locate(path)}"
        out.append(arg)
    return out


def quieten() -> None:
    """Silence what Lightning says at the start of every one of our runs although nothing is amiss."""
    ignored = (
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of a torch name that will go
        "Found .* module\\(s\\) in eval mode",  # the frozen teachers, as they should be
        "You have overridden `on_after_batch_transfer`",  # in the module alone, on purpose
        "The `train_dataloader` does not have many workers",  # their number is the user's, see data.num_workers
        "The `val_dataloader` does not have many workers",
    )
    for message in ignored:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if _not_a_tip not in logger.filters:
            logger.addFilter(_not_a_tip)


def _not_a_tip(record: logging.LogRecord) -> bool:
    """No advertisements, and no word of hardware that is not there."""
    text = record.getMessage()
    return "Tip:" not in text and not text.startswith(("TPU available: False", "GPU available: False"))


def stopped_by(err: BaseException) -> int | None:
    """The signal that ended a fit in order, or None."""
    return err.signum if isinstance(err, Stopped) else None
