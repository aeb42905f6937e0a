"""Asks the sandbox for the text of a PDF or a web page, and says what is missing of it."""

from __future__ import annotations

from base64 import b64encode
from importlib.util import find_spec
from typing import Any

from mixchat.base.errors import CheckpointError, MissingDependencyError, PromptError
from mixchat.base.quantities import format_count, format_size
from mixchat.text.sandbox import Sandbox, SandboxCall

MAX_BYTES = 64_000_000
_LIBRARY = {"pdf": "pypdf", "html": "resiliparse"}
_PIECE = 3 * 2**20  # bytes of a call
_READING_S = 60  # of computing time


def pdf_text(data: bytes, source: str, longest: int) -> tuple[str, str]:
    """Return the text of a PDF, and a remark on its pages.

    Pages after `longest` characters are left out. Raises `PromptError` if there is no text.
    """
    reply = _asked("pdf", data, source, longest)
    pages = reply["pages"]
    if not reply["text"].strip():
        if pages and reply["empty"] == reply["read"]:
            hint = "Its pages may be scanned pictures. A program for OCR makes text of them."
            raise PromptError(
                f"{source} has no text on its {format_count(pages, 'page')}", hint=hint
            )
        raise PromptError(f"{source} has no page that can be read")
    remarks = [format_count(pages, "page")]
    if pages > reply["read"]:
        remarks.append(f"only the first {reply['read']} were read")
    if reply["empty"]:
        remarks.append(f"{reply['empty']} without text (pictures are left out)")
    if reply["broken"]:
        remarks.append(f"{reply['broken']} broken and left out")
    return reply["text"], ", ".join(remarks)


def html_text(data: bytes, charset: str | None, source: str) -> tuple[str, str]:
    """Return the main text of a web page, and a remark on it.

    Raises `PromptError` if there is none.
    """
    reply = _asked("html", data, source, charset)
    if not reply["text"].strip():
        hint = "Its text may come by JavaScript. Save the text as a file, and name that."
        raise PromptError(f"{source} has no text", hint=hint)
    remark = "the main text, without menus" if reply["is_main"] else "all text of the page"
    return reply["text"], remark


def _asked(form: str, data: bytes, source: str, argument: object) -> Any:
    if len(data) > MAX_BYTES:
        raise PromptError(f"{source} is larger than {format_size(MAX_BYTES)}")
    name = {"pdf": "a PDF", "html": "a web page"}[form]
    if find_spec(_LIBRARY[form]) is None:
        raise MissingDependencyError(
            f"the text of {name} needs the package {_LIBRARY[form]}",
            hint="Install it: pip install 'mixchat[files]'",
        )
    sandbox = Sandbox("mixchat.chat.documents.document_child", argument=form)
    try:
        for start in range(0, len(data), _PIECE):
            piece = b64encode(data[start : start + _PIECE]).decode()
            sandbox.ask(SandboxCall(source, "add", (piece,), max_bytes=2 * _PIECE))
        return sandbox.ask(SandboxCall(source, form, (argument,), seconds=_READING_S))
    except PromptError as error:
        raise PromptError(f"{source} {error}", hint=error.hint) from None
    except CheckpointError as error:
        raise PromptError(f"{error}", hint="Its text cannot be had in this way.") from None
    finally:
        sandbox.close()
