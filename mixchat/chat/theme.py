"""The styles of everything on the screen, in Rich's words.

The colours are ANSI's own sixteen, so that the terminal's theme decides how they look. Yellow and
white are none of them, since they are hard to read on a light background.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.style import Style

PROMPT, WORDS = "bold green", "green"  # the `>>>`, and the text of the person
ERROR = "bold red"
# From the history, so it should not look like typed text. Some themes have bright black as
# background.
SUGGESTION = "#808080 italic"
FRAME = "dim"  # around the model's text
THINKING = "dim"
# Rich's names of the parts of Markdown, after `markdown.`
MARKDOWN = {
    **{"h1": "bold underline", "h2": "bold", "h3": "bold italic"},
    **dict.fromkeys(("h4", "h5", "h6"), "bold"),
    **{"strong": "bold", "em": "italic", "s": "strike", "u": "underline", "code": "cyan"},
    **{"block_quote": "none", "hr": FRAME, "table.border": FRAME, "table.header": "bold"},
}
_TOKENS = {
    "Token.Comment": "dim italic",
    "Token.Keyword": "magenta",
    "Token.Operator.Word": "magenta",
    "Token.Literal.String": "green",
    "Token.Literal.Number": "cyan",
    "Token.Name.Builtin": "cyan",
    "Token.Name.Function": "blue",
    "Token.Name.Class": "blue",
    "Token.Name.Decorator": "blue",
    "Token.Name.Tag": "blue",
    "Token.Generic.Deleted": "red",
    "Token.Generic.Inserted": "green",
    "Token.Generic.Heading": "bold",
    "Token.Generic.Subheading": "bold",
}

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32"}


@cache
def code_styles() -> dict[Any, Style]:
    """Return Rich's styles of Pygments' tokens."""
    from pygments.token import string_to_tokentype
    from rich.style import Style

    return {
        string_to_tokentype(name.removeprefix("Token.")): Style.parse(style)
        for name, style in _TOKENS.items()
    }


def painted(text: str, style: str, stream: TextIO) -> str:
    """Return `text` with the escapes for a style, if `stream` is a terminal that shows colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if not text or plain or not stream.isatty():
        return text
    codes = ";".join(_CODES[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m"


def for_prompt(style: str) -> str:
    """Return a style in the words of prompt-toolkit, which follows NO_COLOR by itself."""
    return " ".join(f"ansi{word}" if word in ("red", "green") else word for word in style.split())
