"""Text from outside, made sure to be text: what the shell passes, and what comes in on stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mixchat.chat.plain_text import decode
from mixchat.errors import PromptError, UsageError


def read_prompt(argument: str | None, files: Sequence[str] = ()) -> str | None:
    """The prompt: standard input if it is not a terminal, then the texts of files, then `argument`;
    a blank line between them.

    None if there is no input and no argument, so that a chat can begin. Raises `PromptError` if
    what there is is empty or is not text.
    """
    piped = None if stdin_is_terminal() else _read_stdin()
    if argument is not None and not _is_text(argument):
        decode(_bytes_of(argument), "the prompt")
    if piped is None and argument is None:
        return None
    given = [text for text in (piped, *files, argument) if text is not None]
    parts = [text for text in given if text.strip()]
    if not parts:
        raise PromptError(f"{'standard input' if argument is None else 'the prompt'} is empty")
    return "\n\n".join([*(part.rstrip("\n") for part in parts[:-1]), parts[-1]])


def stdin_is_terminal() -> bool:
    """Whether somebody sits at standard input (no one does at a closed one)."""
    return sys.stdin is not None and sys.stdin.isatty()


def checked(argument: str, what: str) -> str:
    """`argument`, if it is text. Raises `UsageError` if it is empty or the shell passed bytes."""
    if not argument:
        raise UsageError(f"{what} is empty")
    if not _is_text(argument):
        raise UsageError(f"{what} is not UTF-8: {argument!r}")
    return argument


def _read_stdin() -> str:
    # Python would decode it by the locale, and let bytes that are no text through in some.
    return decode(sys.stdin.buffer.read(), "standard input") if sys.stdin is not None else ""


def _is_text(argument: str) -> bool:
    """Python hides the bytes of an argument that are no text in lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _bytes_of(argument: str) -> bytes:
    return argument.encode("utf-8", "surrogateescape")
