"""Where data may lie, and how it is opened: paths, addresses of a few schemes, commands only where they are enabled."""

from __future__ import annotations

import io
import os
import shlex
from typing import IO

from agglom.data.remote import RemoteFile
from agglom.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "hf")
ALLOW_PIPE = "AGGLOM_ALLOW_PIPE"  # an environment variable: no file that comes with data can set it
VALID = f"a path, file://PATH, {', '.join(f'{scheme}://...' for scheme in SCHEMES)}"


def is_remote(address: str) -> bool:
    """True for `pipe:COMMAND` and `scheme://...`, false for a path on this machine."""
    return address.startswith("pipe:") or ("://" in address and not address.startswith("file://"))


def refuse_address(address: str) -> None:
    """Nothing is opened at an address that this refuses.

    Raises:
        UserError: a scheme that isn't in `SCHEMES` (fsspec knows more, such as chains of them), or a command where
            `AGGLOM_ALLOW_PIPE` isn't 1.
    """
    if address.startswith("pipe:"):
        if os.environ.get(ALLOW_PIPE) != "1":
            raise UserError(
                f"{address!r:.200}: runs a command, which is not enabled; valid: {VALID}; or set {ALLOW_PIPE}=1"
            )
    elif is_remote(address) and address.partition("://")[0] not in SCHEMES:
        raise UserError(f"{address!r:.200}: no scheme that is read; valid: {VALID}; copy the data to one of them")


def refuse_listed(file: str, root: str) -> None:
    """What an index may call a shard: it comes with the data, and only whoever names the data may name commands.

    Args:
        file: as the index has it.
        root: where the index is.

    Raises:
        ValueError: a command or what a shell would take for more than a name, another scheme, or a path that leads out
            of the index's folder.
    """
    name = f"{file!r:.80}"
    if not file.isprintable() or not file:
        raise ValueError(f"file {name}; valid: a path inside of the folder, or an address")
    if is_remote(file):
        if file.partition("://")[0] not in SCHEMES:
            raise ValueError(f"file {name}; valid: a path, {', '.join(f'{scheme}://...' for scheme in SCHEMES)}")
    elif root.startswith("pipe:") and shlex.quote(file) != file:
        raise ValueError(f"file {name}; valid in a command: letters, digits and @%+=:,./-_")
    elif "://" in file or os.path.isabs(file) or ".." in file.split("/"):
        raise ValueError(f"file {name}; valid: a path inside of the folder, without ..")


def join(root: str, file: str) -> str:
    """The address of `file` under `root`. A `pipe:` root has `{}` for the file: `pipe:aws s3 cp s3://b/d/{} -`."""
    if is_remote(file):
        return file
    if root.startswith("pipe:"):
        return root.replace("{}", file)
    return f"{root.rstrip('/')}/{file}" if is_remote(root) else os.path.join(root.removeprefix("file://"), file)


def open_read(address: str) -> IO[bytes]:
    """Open a local path, a `pipe:` command (webdataset) or a remote address for reading bytes from its beginning.

    Raises:
        UserError: see `refuse_address`.
        OSError: it can't be opened; of remote ones, after some tries (see `agglom.data.remote`).
    """
    refuse_address(address)
    if address.startswith("pipe:"):
        from webdataset.gopen import gopen  # reads the exit status of the command, which a bare Popen forgets

        return gopen(address)
    if not is_remote(address):
        return open(address.removeprefix("file://"), "rb")
    return io.BufferedReader(RemoteFile(address), 1 << 18)
