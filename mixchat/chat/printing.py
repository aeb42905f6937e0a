"""Prints everything that a person sees, in the styles that this file names in Rich's words.

No other module of cli/ and chat/ prints. Names of files, texts of models and messages of other
libraries may contain control characters, which are removed here.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TextIO

from mixchat.base.sanitize import sanitize

# The colours are ANSI's own sixteen, so that the terminal's theme decides how they look. Yellow and
# white are none of them, since they are hard to read on a light background.
PROMPT, WORDS = "bold green", "green"  # the `>>>`, and the text of the person
ERROR = "bold red"
FRAME = "dim"  # around the model's text
THINKING = "dim"
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32"}

# The rows below a wrapped line are indented as far as a bracket, a label or a first column.
_HANG = re.compile(r" *(?:\(|(?:error|hint|note|removed|left|damaged): |\S.{0,38}? {2,})?")
_MAX_INDENT = 2  # columns, if a longer one leaves too few for some word


def say(*lines: str, stream: TextIO | None = None, style: str = "") -> None:
    """Print a message on standard error, with at least one row for each of `lines`.

    A name within a line cannot start a new line, whatever it contains.
    """
    stream = stream or sys.stderr
    text = "\n".join(fitted(one_line(line), stream) for line in lines)
    # One write, because threads that print at once would tear a line from its end.
    line = painted(text, style, stream) if style else text
    print(f"{line}\n", end="", file=stream, flush=True)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print the output of a command on standard output, sanitized for a terminal.

    A program gets every character as it is. The newline at its end may be left out.
    """
    stream = stream or sys.stdout
    clean = sanitize(text) if stream.isatty() else text
    _write(clean if clean.endswith("\n") else f"{clean}\n", stream)


def show_lines(text: str) -> None:
    """Print our own lines and tables as `show` does. A terminal gets whole words."""
    if sys.stdout.isatty():
        text = "\n".join(fitted(sanitize(line), sys.stdout) for line in text.split("\n"))
    show(text)


def show_piece(text: str) -> None:
    """Print the next piece of a text for a program, as it is, at once."""
    _write(text, sys.stdout)


def show_path(path: Path) -> None:
    """Print a path. A program gets its exact bytes, which may not be UTF-8."""
    if sys.stdout.isatty():
        show(one_line(str(path)))
        return
    # print() would turn bytes that are no UTF-8 into question marks, and no script would find it.
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.flush()


def draw(text: str, stream: TextIO | None = None) -> None:
    """Print our own drawing, with its escapes for colours."""
    _write(text if text.endswith("\n") else f"{text}\n", stream or sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        # The message, such as "No space left on device", does not say which file is meant.
        if stream is sys.stdout and error.filename is None:
            error.filename = "standard output"
        raise


def one_line(text: str) -> str:
    """Return the text without control characters, its newlines as spaces."""
    return sanitize(" ".join(text.splitlines()))


def fitted(line: str, stream: TextIO) -> str:
    """Return a line for `stream`, broken between words if it is wider than a terminal."""
    return wrapped(line, columns(stream)) if stream.isatty() else line


def wrapped(line: str, width: int) -> str:
    """Return a line broken between words. The rows below are indented as far as its text is.

    `note: a b` at 7 columns becomes `note: a` and `      b`. A word that fits into no row, such
    as a path, stays whole in its place, so that it can be copied.
    """
    if _cells(line) <= width:
        return line
    words = re.findall(r"\s*\S+", line)  # each with the spaces before it
    hang = _HANG.match(line)
    indent = hang.end() if hang else 0
    if indent + max(map(_cells, line.split()), default=0) > width:
        indent = min(indent, _MAX_INDENT)
    rows = [""]
    for word in words:
        own = _cells(word.lstrip())
        if not rows[-1] or own > width - indent or _cells(rows[-1] + word) <= width:
            rows[-1] += word
        else:
            rows.append(" " * indent + word.lstrip())
    return "\n".join(rows)


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def painted(text: str, style: str, stream: TextIO) -> str:
    """Return `text` with the escapes for a style, if `stream` is a terminal that shows colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if not text or plain or not stream.isatty():
        return text
    codes = ";".join(_CODES[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m"


def columns(stream: TextIO) -> int:
    """Return the width of the terminal of `stream`. `COLUMNS` takes precedence."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):
        width = 0
    return shutil.get_terminal_size((width or 80, 24)).columns


def cut_off_note(tokens: int, more: str, *, is_thinking: bool = False) -> str:
    """Return the note on an answer cut off by its limit. `more` is the flag that raises it."""
    when = " while the model was thinking" if is_thinking else ""
    return f"cut off after {_counted(tokens)}{when}; {more} allows more"


def thought_note(tokens: int) -> str:
    """Return the line in place of a thinking."""
    return f"thought for {_counted(tokens)}"


def left_out_note(turns: int) -> str:
    """Return the note on turns that are no longer in the prompt."""
    count = "the oldest turn is" if turns == 1 else f"the {turns} oldest turns are"
    return f"the context is full: {count} left out from here on"


def _counted(tokens: int) -> str:
    return f"{tokens:,} token{'s' if tokens != 1 else ''}"
