"""The `agglom` command: names, arguments and exit codes. Commands are functions of `agglom.commands`."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import sys
from importlib import import_module
from inspect import signature
from typing import Any, Sequence

import agglom
from agglom.errors import RankLost, UserError, nearest

COMMANDS = {
    "fit": "train a student from a YAML file; --ckpt_path last resumes",
    "check": "validate YAML files without building anything; prints every problem",
    "data": "write shards: agglom data scenes|imagefolder|coco|ade|voc|csv; agglom data verify finds broken ones",
    "cache": "run the teachers over shards once and keep their features",
    "probe": "evaluate frozen backbones on shards",
    "embed": "a model's vectors of a split, with keys and labels, as .npz or .parquet",
    "report": "report.json -> report.md and report.html",
    "export": "checkpoint -> timm-loadable folder with adaptors and model card",
    "finetune": "train a classifier on an export, with layer-wise decay of the learning rate",
    "mmseg": "train or test a segmentation head inside mmsegmentation (extra: agglom[mmseg])",
    "info": "teachers and students by name, or what a run, export or shard folder holds",
    "demo": "the embedded default, end to end",
}

HEAVY = ("fit", "check", "cache", "finetune", "demo")  # commands that need the whole of agglom

DATA = ("scenes", "imagefolder", "coco", "ade", "voc", "csv", "verify")  # agglom data NAME

# What a place on disk can have against being written to. Other OSErrors are ours and keep their traceback.
_PLACE = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def usage() -> str:
    lines = [
        "usage: agglom COMMAND [options]",
        "",
        "Distil several frozen vision teachers into one student.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "agglom COMMAND --help shows a command's options. agglom --version shows versions.",
        "agglom --print_completion bash|zsh|fish prints what makes a shell complete all this.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad input (one line each on stderr), 130 stopped by Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"agglom {agglom.__version__}", *(f"{name} {version(name)}" for name in ("torch", "timm", "lightning")))
        return
    try:
        if args[0].partition("=")[0] == "--print_completion":
            from agglom.completion import script

            print(script("".join(args).partition("completion")[2].lstrip("=")))
            return
        _run(args[0], args[1:])
    except UserError as err:
        _complain(args[0], str(err))
    except RankLost as err:
        print(f"agglom {args[0]}: {err}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"agglom {args[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as err:
        if err.errno not in _PLACE:
            raise
        _complain(args[0], f"{err.filename or 'output'}: {err.strerror}; choose another place or mend this one")


def _complain(command: str, message: str) -> None:
    for line in message.splitlines():
        print(f"agglom {command}: {line}", file=sys.stderr)
    sys.exit(2)


def _run(name: str, args: list[str]) -> None:
    if name not in COMMANDS:
        raise UserError(f"unknown command; {nearest(name, COMMANDS)}; agglom --help says what they do")
    if name in HEAVY:
        _load("agglom.distiller")
    if name == "fit":
        _fit(args)
        return
    if name == "finetune":
        from agglom.finetune import finetune

        finetune(args)
        return
    if name == "mmseg":
        from agglom.mmseg.tools import run

        run(args)
        return
    from agglom import commands

    if name == "check":
        commands.check(args)
        return
    if name == "data":
        from agglom import data_commands

        writers = {name: getattr(data_commands, name) for name in DATA}
        if not args or args[0] not in writers:
            given = args[0] if args else "nothing"
            if given in ("-h", "--help"):
                print(f"usage: agglom data {{{','.join(writers)}}} [options]")
                return
            raise UserError(f"{given!r} is no data set writer; {nearest(given, writers)}")
        _call(writers[args[0]], _named(args[0], args[1:]), f"agglom data {args[0]}")
        return
    _call(getattr(commands, name), _named(name, args), f"agglom {name}")


def _load(module: str) -> None:
    """Import, without the garbage collector: it would look through a million new objects and find nothing.

    It need not look at them later either, which also leaves their memory shared with the loader's forked workers.
    """
    if module in sys.modules:
        return
    gc.disable()
    try:
        import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _named(name: str, args: list[str]) -> list[str]:
    """What users write (`info REF`, `report DIR DIR`, `probe --model A --model B`) as options that functions take."""
    plain = [arg for arg in args if not arg.startswith("-")]
    if name == "info" and args[:1] == plain[:1] and plain:
        return ["--ref", *args]
    if name == "verify" and args[:1] == plain[:1] and plain:
        return ["--data", *args]
    if name == "cache":
        return ["--dry_run=true" if arg == "--dry-run" else arg for arg in args]
    if name == "export":  # flags, and dashes as in other tools
        flags = ("--onnx", "--int8", "--pt2", "--private")
        following = [*args[1:], "--"]
        plain = [
            f"{arg}=true" if arg in flags and after.startswith("-") else arg
            for arg, after in zip(args, following, strict=True)
        ]
        return [
            re.sub("^--(onnx-adaptors|push-to-hub)", lambda m: m[0][:2] + m[1].replace("-", "_"), arg) for arg in plain
        ]
    if name == "probe":  # each is one more, and none replaces another
        return [arg.replace("--model", "--model+", 1) if arg.partition("=")[0] == "--model" else arg for arg in args]
    if name == "report" and len(plain) == len(args):
        return [f"--dirs+={arg}" for arg in args]
    return args


def _fit(args: list[str]) -> None:
    from agglom.fit import fit, stopped_by

    try:
        fit(args)
    except BaseException as err:
        signum = stopped_by(err)
        if signum is None:
            raise
        print(f"agglom fit: {err}; resume with --ckpt_path last", file=sys.stderr)
        sys.exit(130 if signum == signal.SIGINT else 0)


def _call(function: Any, args: list[str], prog: str) -> None:
    """Parse `args` by the function's signature and docstring, then call it."""
    from jsonargparse import ArgumentError

    parser = command_parser(function, prog)
    _bounded(args)
    try:
        values = parser.parse_args(args)
    except (ArgumentError, TypeError, ValueError, RecursionError) as err:
        raise UserError(" ".join(str(err).split()) + f"; {prog} --help lists the options") from err
    if "config" not in signature(function).parameters:
        values.pop("config", None)
    function(**values.as_dict())


def command_parser(function: Any, prog: str) -> Any:
    """jsonargparse's parser of a command's options."""
    from agglom.parsing import parser as create

    parser = create(prog=prog, description=(function.__doc__ or "").split("\n")[0])
    if "config" not in signature(function).parameters:
        parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_function_arguments(function)
    return parser


def _bounded(args: list[str]) -> None:
    """Refuse files of options that a parser would never be done with."""
    from pathlib import Path

    from agglom.yaml_files import parse, read_text

    for place, arg in enumerate(args):
        option, given, path = arg.partition("=")
        path = path if given else (args[place + 1] if place + 1 < len(args) else "")
        if option == "--config" and Path(path).is_file():
            try:
                parse(read_text(Path(path)))
            except UserError as err:
                raise UserError(f"{path}: {err}") from err


if __name__ == "__main__":
    main()
