"""Text from outside that goes into a prompt, made sure to be text."""

from __future__ import annotations

from pathlib import Path

from mixchat.errors import PromptError
from mixchat.settings import format_size

_LONGEST = 16_000_000  # bytes: more than any context holds


def read_text(path: Path) -> str:
    """The text of a file. Raises `PromptError` where it is empty, not text, or cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise PromptError(f"{path} is longer than {format_size(_LONGEST)}")
        text = decode(data, str(path))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise PromptError(f"{path} is empty")
    return text


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
