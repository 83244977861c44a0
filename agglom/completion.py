"""`agglom --print_completion SHELL`: a completion script out of the commands' own parsers, written by shtab."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from agglom import commands, data_commands
from agglom.cli import COMMANDS, DATA, command_parser
from agglom.errors import UserError, nearest

SHELLS = ("bash", "zsh", "fish")
FIT = {  # what Lightning's own command line adds
    "config": "YAML file of the run",
    "ckpt_path": "a checkpoint to go on from, or last",
    "seed_everything": "seed of everything that is drawn",
    "print_config": "print the whole configuration and exit",
}


def script(shell: str) -> str:
    """The script that makes a shell complete commands, options, choices and files.

    Raises:
        UserError: an unknown shell.
    """
    if shell not in SHELLS:
        raise UserError(f"{shell!r} is no shell; {nearest(shell, SHELLS)}; agglom --print_completion bash")
    import shtab

    return shtab.complete(tree(), shell=shell)


def tree() -> argparse.ArgumentParser:
    """All commands in one plain argparse parser: what shtab reads."""
    root = argparse.ArgumentParser(prog="agglom")
    root.add_argument("--version", action="store_true", help="versions of agglom, torch, timm and lightning")
    root.add_argument("--print_completion", choices=SHELLS, help="a completion script")
    branches = root.add_subparsers()
    for name, text in COMMANDS.items():
        branch = branches.add_parser(name, help=text.split(";")[0].split(":")[0])
        if name == "data":
            leaves = branch.add_subparsers()
            for writer in DATA:
                function = getattr(data_commands, writer)
                leaf = leaves.add_parser(writer, help=function.__doc__.split(".")[0].split(":")[0])
                _copy(command_parser(function, f"agglom data {writer}"), leaf)
        elif name in ("fit", "finetune"):
            _copy(_fit_parser() if name == "fit" else _finetune_parser(), branch)
        elif name in ("check", "mmseg"):
            _files(branch.add_argument("files", nargs="*"))
        else:
            _copy(command_parser(getattr(commands, name), f"agglom {name}"), branch)
    return root


def _finetune_parser() -> Any:
    from agglom.data import ShardDataModule
    from agglom.finetune import Classifier, FinetuneCLI

    return _lightning_parser(FinetuneCLI, Classifier, ShardDataModule)


def _fit_parser() -> Any:
    from agglom.data import ShardDataModule
    from agglom.distiller import Distiller
    from agglom.fit import FitCLI

    return _lightning_parser(FitCLI, Distiller, ShardDataModule)


def _lightning_parser(cli: Any, model: type, data: type) -> Any:
    """Of a command that is Lightning's CLI."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    for key, text in FIT.items():
        parser.add_argument(f"--{key}", help=text)
    for section, cls in (("model", model), ("data", data), ("trainer", Trainer)):
        parser.add_class_arguments(cls, section)
    cli.add_arguments_to_parser(cli.__new__(cli), parser)
    return parser


def _copy(source: Any, target: argparse.ArgumentParser) -> None:
    """The options of a jsonargparse parser, with their choices; values are completed as files."""
    for action in source._actions:
        names = [
            name for name in action.option_strings if name.startswith("--") and name not in ("--help", "--print_shtab")
        ]
        if not names:
            continue
        choices = action.choices if isinstance(action.choices, (list, tuple)) else _literals(action)
        text = (action.help if isinstance(action.help, str) else "").split(". ")[0].replace("%", "%%")
        _files(target.add_argument(*names, choices=choices, help=text if text != argparse.SUPPRESS else ""))


def _literals(action: Any) -> list[str] | None:
    """The values of an option that takes a Literal or a bool."""
    kind = getattr(action, "_typehint", None)
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else None


def _files(action: Any) -> None:
    if action.choices is None:
        import shtab

        action.complete = shtab.FILE
