"""Reads untrusted text that goes into a prompt, and checks that it is text."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from mixchat.base.context import Context
from mixchat.base.errors import PromptError


def read_text_file(path: Path, context: Context) -> str:
    """Return the text of a file.

    Raises `PromptError` if it is empty, not text, too long for the context, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            text = read_stream(file, str(path), context)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise PromptError(f"{path} is empty", hint="Name a file with text, or leave it out.")
    return text


def read_stream(stream: BinaryIO, source: str, context: Context) -> str:
    """Return the text of a stream, which may be endless. Reads no more than the context holds.

    Raises `PromptError` if there is more, or if it is not text.
    """
    data = stream.read(context.longest_text + 1)
    if len(data) > context.longest_text:
        raise context.text_too_long(source)
    return decode(data, source)


def decode(data: bytes, source: str) -> str:
    """Return UTF-8 as text, without a byte order mark and without the newline that ends a file.

    Raises `PromptError` with the offset of the first byte that is not text.
    """
    if (offset := data.find(b"\0")) >= 0:
        raise PromptError(
            f"{source} is not text: it contains a NUL byte at offset {offset}",
            hint="A prompt must be text in UTF-8.",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8: the byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="Convert it first, for example with iconv -f LATIN1 -t UTF-8.",
        ) from None
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
