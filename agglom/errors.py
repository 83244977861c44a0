"""Errors that end in one line without a traceback: what a user can mend (exit code 2), and a lost rank (1)."""

from __future__ import annotations

import difflib
from typing import Iterable


class UserError(Exception):
    """Bad input. The message names the key or path, the value, the valid set and the fix, on one line."""


class RankLost(Exception):
    """Another process of the job is gone, and this one can't go on. It isn't what a user has given: exit code 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`valid: a, b, c (did you mean b?)`, for the end of a message."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"valid: {shown or 'none'}" + (f" (did you mean {close[0]}?)" if close else "")


def brief(error: BaseException, width: int = 200) -> str:
    """The first words of a library's message, on one line, for the inside of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."
