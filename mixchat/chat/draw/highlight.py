"""Draws code in colours, so that its first lines can be shown before the last are known."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mixchat.chat.theme import FRAME, TOKENS

TAB = " " * 4
_BAR_WIDTH = 20  # columns
_ASCII = str.maketrans("─│•", "-|-")


def fitting(frame: str, options: ConsoleOptions) -> str:
    """Return `frame`, in ASCII if the terminal has nothing else."""
    return frame.translate(_ASCII) if options.ascii_only else frame


@dataclass(frozen=True)
class Bar:
    """A horizontal line with a name in it, as long as the row or `width` columns."""

    name: str = ""
    width: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width or options.max_width, options.max_width)
        start = fitting("── " if self.name else "", options)
        line = f"{start}{self.name} ".lstrip().ljust(width, fitting("─", options))
        yield Text(line, style=FRAME, overflow="fold")


@dataclass(frozen=True)
class Code:
    """A code block, or the part of one from line `first` to before line `end`.

    A block is `closed` if its fence has an end. A part is `resumed` if it is drawn with a frame
    before it, although the block starts earlier.
    """

    code: str
    language: str = ""
    first: int = 0
    end: int | None = None
    closed: bool = True
    resumed: bool = False

    @property
    def settled(self) -> int:
        """Return how many lines keep their colours, whatever follows."""
        return max(_lexed_ends(self.code.count("\n")), default=0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.first == 0 or self.resumed:
            yield Bar(self.language, _BAR_WIDTH)
        lines = self.code.expandtabs(len(TAB)).removesuffix("\n").split("\n")[: self.end]
        for line in _highlighted(lines, self.language.split(" ")[0], self.first):
            yield from _folded(line, options.max_width)
        if self.end is None:
            yield Bar("", _BAR_WIDTH)


def _folded(line: Text, width: int) -> Iterable[Text]:
    """Return the rows of a line. A full row is cut, because spaces in code count."""
    if cell_len(line.plain) <= width:
        return [line]
    return line.divide(accumulate(map(len, chop_cells(line.plain, width)[:-1])))


def _lexed_ends(count: int) -> list[int]:
    """Return the lines at which code is lexed from its start, which are 16, 24, 36...

    So the colours of a line depend on the code alone, not on the pieces in which it came. All of it
    takes three times as long as lexing once.
    """
    ends, end = [], 16
    while end <= count:
        ends.append(end)
        end = end * 3 // 2
    return ends


def _highlighted(lines: list[str], language: str, first: int) -> list[Text]:
    """Return the lines from `first` on, each with its colours at the next of `_lexed_ends`."""
    drawn: list[Text] = []
    for end in [*_lexed_ends(len(lines)), len(lines)]:
        if (start := first + len(drawn)) < end:
            drawn += _lexed(lines[:end], language, start)
    return drawn


def _lexed(lines: list[str], language: str, first: int) -> list[Text]:
    parts: list[list[tuple[str, str]]] = [[]]
    if lexer := _lexer(language):
        for kind, value in lexer.get_tokens("\n".join(lines)):
            head, *others = value.split("\n")
            parts[-1].append((head, _colour(kind)))
            parts += [[(other, _colour(kind))] for other in others]
    drawn = [Text.assemble(*line) for line in parts[first : len(lines)]]
    if [line.plain for line in drawn] != lines[first:]:  # no lexer, or one that changes text
        return [Text(line) for line in lines[first:]]
    return drawn


@lru_cache(maxsize=8)
def _lexer(language: str) -> Any:
    if not language:
        return None
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    with suppress(ClassNotFound):
        return get_lexer_by_name(language, stripnl=False)
    return None


def _colour(kind: Any) -> str:
    while kind.parent is not None and str(kind) not in TOKENS:
        kind = kind.parent
    return TOKENS.get(str(kind), "")
