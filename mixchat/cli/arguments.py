"""Text from outside, made sure to be text: what the shell passes, and what comes in on stdin."""

from __future__ import annotations

import sys

from mixchat.errors import PromptError, UsageError


def read_prompt(argument: str | None) -> str | None:
    """The prompt: standard input if it is not a terminal, a blank line, then `argument`.

    None if there is neither, so that a chat can begin. Raises `PromptError` if what there is
    is empty or is not text.
    """
    piped = None if stdin_is_terminal() else _read_stdin()
    if argument is not None and not _is_text(argument):
        decode(_bytes_of(argument), "the prompt")
    given = [text for text in (piped, argument) if text is not None]
    if not given:
        return None
    parts = [text for text in given if text.strip()]
    if not parts:
        raise PromptError(f"{'standard input' if argument is None else 'the prompt'} is empty")
    return "\n\n".join([*(part.rstrip("\n") for part in parts[:-1]), parts[-1]])


def stdin_is_terminal() -> bool:
    """Whether somebody sits at standard input (no one does at a closed one)."""
    return sys.stdin is not None and sys.stdin.isatty()


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark and without the newline that ends a file.

    Raises `PromptError` with the offset of the first byte that is not text.
    """
    if (offset := data.find(b"\0")) >= 0:
        raise PromptError(
            f"{where} is not text: it has a NUL byte at offset {offset}",
            hint="Only text in UTF-8 can be a prompt.",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8: the byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="Convert it first, for example with iconv -f LATIN1 -t UTF-8.",
        ) from None
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


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
