"""What a configuration may name: the rules that every parser of ours keeps.

jsonargparse imports what a configuration names to see what it is. Out of the box it warns of modules that run commands
and builds any class that an option of plain values (`kwargs`) describes; importing this module forbids both for good.
"""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

# Nothing that a configuration needs lies there: what runs programs, opens files or unpickles does.
DENIED = (
    *sorted(name for name in sys.stdlib_module_names if name.isidentifier()),
    *("fsspec", "jsonargparse", "mmengine", "pip", "pkg_resources", "setuptools", "webdataset", "yaml"),
    *("numpy.f2py", "numpy.load", "torch.hub", "torch.jit", "torch.load", "torch.package", "torch.serialization"),
)

set_parsing_settings(
    instantiate_subclass_spec_in_any=False,
    import_path_denylist=[name for name in DENIED if name != "jsonargparse"],  # which it denies itself
)


def parser(**options: Any) -> ArgumentParser:
    """A parser that raises instead of exiting.

    Args:
        options: of jsonargparse's ArgumentParser.
    """
    return ArgumentParser(exit_on_error=False, **options)


def denied(path: str) -> bool:
    """Whether a dotted path lies where a configuration may not import from."""
    return any(path == name or path.startswith(f"{name}.") for name in DENIED)
