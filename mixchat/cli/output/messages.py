"""Prints errors and notes on standard error."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from mixchat.base import system
from mixchat.base.errors import MixchatError, ResourceError, UsageError
from mixchat.base.files import DISK_FULL
from mixchat.base.machine import memory_left_by_ulimit
from mixchat.base.settings import data_dir
from mixchat.chat.printing import ERROR, say, show

_OFF = ("", "0", "false", "no", "off")  # values of a variable
# In errors of torch, of the dynamic loader and of C++, in lower case.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "unable to mmap",
    "bad_alloc",
)


def note(text: str) -> None:
    """Print a note in one line."""
    say(f"note: {' '.join(text.split())}")


def print_error(error: Exception) -> int:
    """Print `error` and its hint, in a line each. Return the exit code."""
    known = _as_ours(error)
    if known is None:
        known = MixchatError(
            f"internal error: {type(error).__name__}: {error}",
            hint="Run it again with MIXCHAT_DEBUG=1 to see the traceback.",
        )
    if os.environ.get("MIXCHAT_DEBUG", "").lower() not in _OFF:
        show("".join(traceback.format_exception(error)), sys.stderr)
    _print_line(f"error: {known}", ERROR)
    if known.hint:
        _print_line(f"hint: {known.hint}")
    return known.exit_code


def _as_ours(error: Exception) -> MixchatError | None:
    # First, because one of our errors can have this cause, and only the limit helps then.
    cause: BaseException | None = error
    while cause is not None:
        by_loader = isinstance(cause, ImportError) and os.strerror(errno.EMFILE) in str(cause)
        if by_loader or (isinstance(cause, OSError) and cause.errno == errno.EMFILE):
            limit = system.open_files_limit()
            return ResourceError(
                f"too many open files: a limit allows {limit} of this process (ulimit -n)",
                hint="Start mixchat in a new shell, or have the hard limit raised (ulimit -Hn). "
                "Each layer of a model takes a file.",
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MixchatError):
        return error
    if _is_lack_of_memory(error):
        hint = "Close other programs, or try a smaller --ctx-size or --host-memory."
        if _is_of_gpu(error):
            hint = "Try a smaller --ctx-size or --device-memory."
        elif limits := " and ".join(memory_left_by_ulimit()):
            hint = f"A limit on this process allows no more ({limits}): raise it."
        return ResourceError("there is not enough memory", hint=hint)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        full = error.errno in DISK_FULL
        if isinstance(error, PermissionError) and _is_own_file(error.filename):
            hint = "Set MIXCHAT_HOME to a directory that you can read and write."
            return UsageError(f"{name}{error.strerror}", hint=hint)
        return (ResourceError if full else MixchatError)(f"{name}{error.strerror}")
    # Typer's own errors have this method, but no public class.
    if format_message := getattr(error, "format_message", None):
        ctx = getattr(error, "ctx", None)
        command = ctx.command_path if ctx else "mixchat"
        return UsageError(
            format_message(), hint=f"'{command} --help' shows the arguments and flags."
        )
    return None


def _is_own_file(name: object) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(data_dir())


def _is_of_gpu(error: BaseException) -> bool:
    # By name, because to import torch's class takes 2 s.
    return type(error).__name__ == "OutOfMemoryError"


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _is_of_gpu(error):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, (ImportError, OSError, RuntimeError)):
        text = str(error).lower()
        if any(words in text for words in _NO_MEMORY) and "static tls" not in text:
            return True
    # numpy only says that it cannot be imported. The error before has the reason.
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_lack_of_memory(cause)


def _print_line(text: str, style: str = "") -> None:
    """Print one line, although a file's name in it may hold a newline."""
    # If standard error is closed, the exit code still has to be right.
    with suppress(OSError):
        say(" ".join(text.split()), style=style)
