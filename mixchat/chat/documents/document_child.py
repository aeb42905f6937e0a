"""The inside of the sandbox in which PDFs and web pages are taken apart.

A PDF of some kB can hold gigabytes or refer to itself, and a page can nest without end.
"""

from __future__ import annotations

import importlib
import io
import logging
import time
from base64 import b64decode
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import PromptError, short_message
from mixchat.base.sanitize import sanitize
from mixchat.text.sandbox_child import serve

if TYPE_CHECKING:
    from pypdf import PdfReader

_MODULES = {
    "pdf": ("pypdf",),
    "html": ("resiliparse.extract.html2text", "resiliparse.parse.encoding"),
}
_MAIN = "main, [role=main]"
_NOT_MAIN = ["nav", "aside", "footer", "form", "[role=navigation]"]
_MAX_PAGES = 2000
_READING_S = 40  # of computing time, after which no other page is begun


def main(form: str) -> None:
    """Serve the parent, which sends a document of the form `pdf` or `html`."""
    for name in _MODULES[form]:
        importlib.import_module(name)
    logging.disable()  # pypdf warns of each small fault
    serve(_DocumentService())


class _DocumentService:
    """The methods that a call can name."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, piece: str) -> None:
        """Take the next bytes of the document, in Base64."""
        self._data += b64decode(piece)

    def pdf(self, longest: int) -> dict[str, Any]:
        """Return the text of a PDF and counts of its pages.

        No page begins after `longest` characters. Raises `PromptError` for a file without pages.
        """
        from pypdf import PdfReader

        try:
            reader = PdfReader(io.BytesIO(self._data))
            # Many files are encrypted with an empty password, only to forbid printing.
            if reader.is_encrypted and not reader.decrypt(""):
                raise PromptError("is encrypted", hint="Save it without a password first.")
            count = len(reader.pages)
        except (PromptError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "DependencyError":
                raise PromptError("is encrypted", hint="Save it decrypted first.") from None
            raise PromptError(f"is a broken PDF ({short_message(error)})") from None
        return _pages(reader, count, longest)

    def html(self, charset: str | None) -> dict[str, Any]:
        """Return the main text of a web page, else all of its text.

        The main text is what the page marks as such. In a page that marks nothing, resiliparse
        finds it by rules, which take a short list for a menu.
        """
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree

        data = bytes(self._data)
        page = _decoded(data, charset or detect_encoding(data) or "utf-8")
        body = HTMLTree.parse(page).body
        marked = [] if body is None else list(body.query_selector_all(_MAIN))
        text = ""
        if len(marked) == 1:
            text = extract_plain_text(marked[0].html, skip_elements=_NOT_MAIN)
        text = text if text.strip() else extract_plain_text(page, main_content=True)
        is_main = bool(text.strip())
        if not is_main:
            text = extract_plain_text(page)
        return {"text": sanitize(text), "is_main": is_main}


def _pages(reader: PdfReader, count: int, longest: int) -> dict[str, Any]:
    texts: list[str] = []
    length = empty = broken = read = 0
    for number in range(min(count, _MAX_PAGES)):
        if length > longest or time.process_time() > _READING_S:
            break
        read += 1
        try:
            text = sanitize(reader.pages[number].extract_text())
        except MemoryError:
            raise
        except Exception:
            broken += 1
            continue
        length += len(text)
        if text.strip():
            texts.append(text)
        else:
            empty += 1
    return {
        "text": "\n\n".join(texts),
        "pages": count,
        "read": read,
        "empty": empty,
        "broken": broken,
    }


def _decoded(data: bytes, charset: str) -> str:
    try:
        return data.decode(charset, "replace")
    except LookupError:
        return data.decode("utf-8", "replace")
