"""`agglom mmseg train|test CONFIG ...`: mmseg's own command-line tools, with our parts registered."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Sequence

import mmseg

from agglom.errors import UserError, nearest

TOOLS = ("train", "test")
USAGE = "usage: agglom mmseg train CONFIG [options] | test CONFIG CHECKPOINT [options]; agglom mmseg train --help"


def run(args: Sequence[str]) -> None:
    """Run one of mmseg's tools in this process.

    Args:
        args: "train" or "test", then what the tool takes: a config, options.

    Raises:
        UserError: no such tool, a config that doesn't exist.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    if args[0] not in TOOLS:
        raise UserError(f"{args[0]!r} is no tool; {nearest(args[0], TOOLS)}")
    config = next((arg for arg in args[1:] if arg.endswith(".py")), None)
    if config is not None and not Path(config).is_file():
        raise UserError(f"{config}: no such config; agglom has configs/mmseg/linear_scenes.py")
    tool = Path(mmseg.__file__).parent / ".mim" / "tools" / f"{args[0]}.py"
    before, sys.argv = sys.argv, [f"agglom mmseg {args[0]}", *args[1:]]
    try:
        runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.argv = before
