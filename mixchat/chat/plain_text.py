"""Reads untrusted text that goes into a prompt: files, PDFs and web pages."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from mixchat.base.context import Context
from mixchat.base.errors import PromptError
from mixchat.base.progress import Note

_PDF_START = b"%PDF-"


def is_url(source: str) -> bool:
    """Return whether a source is the address of a web page and not the name of a file."""
    return source.lower().startswith(("http://", "https://"))


def read_source(source: str, context: Context, note: Note) -> str:
    """Return the text of a file, or of the page at an address. `note` tells what is left out.

    Raises `PromptError` if it is empty, not text, too long for the context, or cannot be read.
    `web_file.fetch` has the errors of addresses.
    """
    if is_url(source):
        return _read_page(source, context, note)
    return read_text_file(Path(source), context, note)


def read_text_file(path: Path, context: Context, note: Note) -> str:
    """Return the text of a file, which may be a PDF. Raises as `read_source` does."""
    try:
        with open(path, "rb") as file:
            text = read_stream(file, str(path), context, note)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise PromptError(f"{path} is empty", hint="Name a file with text, or leave it out.")
    return text


def read_stream(stream: BinaryIO, source: str, context: Context, note: Note) -> str:
    """Return the text of a stream, which may be endless. Reads no more than the context holds.

    Of a PDF it reads no more than the largest that is taken. Raises `PromptError` if there is more,
    or if it is not text.
    """
    data = stream.read(len(_PDF_START))
    if data == _PDF_START:
        from mixchat.chat.documents.document import MAX_BYTES

        data += stream.read(MAX_BYTES + 1 - len(data))
        return _pdf_text(data, source, context, note)
    if len(data) == len(_PDF_START):  # at its end, a terminal would be asked for more
        data += stream.read(max(context.longest_text + 1 - len(data), 0))
    if len(data) > context.longest_text:
        raise context.text_too_long(source)
    return decode(data, source)


def _pdf_text(data: bytes, source: str, context: Context, note: Note) -> str:
    from mixchat.chat.documents.document import pdf_text

    text, remark = pdf_text(data, source, context.longest_text)
    note(f"{source}: {remark}")
    _check_length(text, source, context)
    return text


def _read_page(url: str, context: Context, note: Note) -> str:
    from mixchat.chat.documents.document import MAX_BYTES, html_text
    from mixchat.chat.documents.web_file import fetch

    file = fetch(url, MAX_BYTES)
    if file.url != url:
        note(f"{url} leads to {file.url}")
    if file.data.startswith(_PDF_START):
        return _pdf_text(file.data, url, context, note)
    if file.is_html:
        text, remark = html_text(file.data, file.charset, url)
        note(f"{url}: {remark}")
    else:
        text = file.text()
    if not text.strip():
        raise PromptError(f"{url} is empty")
    _check_length(text, url, context)
    return text


def _check_length(text: str, source: str, context: Context) -> None:
    if len(text.encode()) > context.longest_text:
        raise context.text_too_long(source)


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
