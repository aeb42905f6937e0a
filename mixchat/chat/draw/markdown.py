"""Draws an answer's Markdown with Rich, without losing anything that the model wrote.

Rich's own parser drops `<think>` and `vector<T>`, and joins lines. So a parser without rules that
hide text reads it. Rich draws the tokens, with an element for code of our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_block.table import escapedSplit
from markdown_it.rules_inline import StateInline, newline
from markdown_it.token import Token
from pygments.token import string_to_tokentype
from rich import box
from rich.cells import chop_cells
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import (
    CodeBlock,
    Heading,
    HorizontalRule,
    Markdown,
    MarkdownElement,
    TableElement,
)
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from mixchat.base.sanitize import sanitize
from mixchat.chat.printing import FRAME

_TAB = " " * 4
_FRAME_WIDTH = 20  # columns of the lines around code
_MIN_CELL_WIDTH = 7  # columns of a cell and its frame, or a table is shown as written
_MIN_NESTED_WIDTH = 4  # columns of each level of lists and quotes, or they are shown as written
_MAX_NESTING = 20  # levels, below which markdown-it drops everything

# A backslash before these is Markdown's. Before others, as in `\(` and `\{`, it is text.
_ESCAPED = set("\\`*_~#+-.!|<>$")
# Unicode's line and paragraph separators, which terminals show differently.
_SEPARATORS = {0x2028: "\n", 0x2029: "\n"}
# Formulas, and code outside a fence, have no emphasis and no escapes. Without a limit, a text with
# many `\(` and no end would be searched to its end from each of them.
_VERBATIM = re.compile(
    r"""\\\(.{1,1000}?\\\) | \\\[.{1,1000}?\\\] | \$\$.{1,1000}?\$\$
    | (?<=[0-9A-Za-z)]) \* (?=[0-9A-Za-z(])                            # 2*3*4
    | (?<=[0-9A-Za-z)]) \*\* (?=[0-9])                                # x**2 + y**2
    | (?<!\w) __ (?: [a-z][a-z0-9_]* | [A-Z][A-Z0-9_]* ) __ (?!\w)     # __init__, __FILE__
    """,
    re.DOTALL | re.VERBOSE,
)
_STYLES = {
    **{"h1": "bold underline", "h2": "bold", "h3": "bold italic"},
    **dict.fromkeys(("h4", "h5", "h6"), "bold"),
    **{"strong": "bold", "em": "italic", "s": "strike", "u": "underline", "code": "cyan"},
    **{"block_quote": "none", "hr": FRAME, "table.border": FRAME, "table.header": "bold"},
}
_THEME = Theme({f"markdown.{name}": style for name, style in _STYLES.items()})
_CODE_STYLES = {  # of Pygments' tokens
    "Comment": "dim italic",
    **dict.fromkeys(("Keyword", "Operator.Word"), "magenta"),
    **dict.fromkeys(("Literal.String", "Generic.Inserted"), "green"),
    **dict.fromkeys(("Literal.Number", "Name.Builtin"), "cyan"),
    **dict.fromkeys(("Name.Function", "Name.Class", "Name.Decorator", "Name.Tag"), "blue"),
    **{"Generic.Deleted": "red", "Generic.Heading": "bold", "Generic.Subheading": "bold"},
}
_CODE_THEME = ANSISyntaxTheme(
    {string_to_tokentype(name): Style.parse(style) for name, style in _CODE_STYLES.items()}
)


def cleaned(text: str, encoding: str) -> str:
    """Return `text` without control characters, or others that the encoding lacks."""
    text = sanitize(text).translate(_SEPARATORS)
    return text.encode(encoding, "replace").decode(encoding)


@dataclass(frozen=True)
class MarkdownText:
    """Rich prints it as a stream of the same text shows it."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for block in blocks(cleaned(self.text, options.encoding)):
            yield from block.parts


@dataclass(frozen=True)
class MarkdownBlock:
    """A paragraph, a table, an item of a list at the top level, and so on.

    `start` is its first line. `gap` tells whether a blank line comes before it. `source` is its
    text, which is shown in a terminal of fewer columns than `min_width`. `is_open` tells whether it
    ends with code whose fence has no end yet.
    """

    start: int
    gap: bool
    source: str
    tokens: list[Token]
    min_width: int
    is_open: bool

    @property
    def parts(self) -> list[RenderableType]:
        """Return the blank line before the block, if there is one, and the block."""
        return [Text(), self] if self.gap else [self]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < self.min_width:
            yield Text(self.source.replace("\t", _TAB), overflow="fold")
            return
        with console.use_theme(_THEME):
            lines = console.render_lines(_RichMarkdown(self.tokens), options, pad=False)
        for line in lines:
            # Rich fills rows with spaces. If the terminal takes a character for wider than Rich
            # does, they would begin another row.
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            yield from (*line, Segment.line())


class _Parser(MarkdownIt):
    """Leaves a link's address as it was written, whatever it is."""

    def normalizeLink(self, url: str) -> str:
        return url

    def validateLink(self, url: str) -> bool:
        return True


@cache
def _parser() -> MarkdownIt:
    """Return the parser, without rules that hide text or let later lines change earlier ones."""

    def verbatim(state: StateInline, silent: bool) -> bool:
        match = _VERBATIM.match(state.src, state.pos, state.posMax)
        if match is None:
            return False
        if not silent:
            state.push("text", "", 0).content = match[0]
        state.pos = match.end()
        return True

    def line_end(state: StateInline, silent: bool) -> bool:
        begin = state.pos
        if not newline(state, silent):
            return False
        if not silent:  # the parser's own rule drops the spaces of the next line
            state.pending += state.src[begin + 1 : state.pos]
        return True

    parser = _Parser("commonmark", {"maxNesting": _MAX_NESTING}).enable(["strikethrough", "table"])
    parser.disable(["html_block", "html_inline", "autolink"])
    # A reference or an underline would change lines that are on the screen already.
    parser.disable(["reference", "lheading", "text_join"])
    parser.inline.ruler.before("escape", "verbatim", verbatim)
    parser.inline.ruler.at("newline", line_end)
    return parser


def blocks(text: str) -> list[MarkdownBlock]:
    """Return the blocks of a cleaned text, each drawn independently of the others.

    A block cannot change when a complete line of the next one is there. So references and
    underlined headings are text here, and blank lines stay as they were written.
    """
    lines = text.split("\n")
    drawn = list[MarkdownBlock]()
    for block in _split(_parser().parse(text)):
        start, end = block[0].map or (0, 0)
        source = "\n".join(lines[start:end]).rstrip()
        gap = bool(drawn) and not lines[start - 1].strip(" \t>")
        fence = next((token for token in reversed(block) if token.type == "fence"), None)
        is_open = False
        if fence is not None and fence.map and fence.map[1] == end:
            # A closed fence has two lines more than its content.
            is_open = fence.map[1] - fence.map[0] != len(fence.content.splitlines()) + 2
        if block[0].type == "paragraph_open":
            # A paragraph may be code without a fence. A single space comes from tokenizers.
            spaces = source[: len(source) - len(source.lstrip(" "))]
            indent = spaces if len(spaces) > 1 else ""
            block[1].children = [_text(indent), *(block[1].children or [])]
        for token in block:
            if token.type == "inline":
                token.children = list(_readable(token.children or [], token.content))
        drawn.append(MarkdownBlock(start, gap, source, block, _min_width(block, lines), is_open))
    return drawn


def _split(tokens: list[Token]) -> Iterator[list[Token]]:
    """Yield the tokens of each block. An item of a list becomes a list with the item's number."""
    block = list[Token]()
    for token in tokens:
        if token.level == 0 and token.type.endswith("_list_open"):
            opening = token
        elif token.level == 0 and token.type.endswith("_list_close"):
            continue
        elif token.level == 1 and token.type == "list_item_open":
            number = {"start": token.info} if token.info else {}
            block = [opening.copy(attrs=number, map=token.map), token]
        else:
            block.append(token)
        if token.level == 1 and token.type == "list_item_close":
            closing = Token(opening.type.replace("_open", "_close"), opening.tag, -1)
            yield [*block, closing]
        elif token.level == 0 and token.nesting < 1:
            yield block
        else:
            continue
        block = []


def _readable(children: Iterable[Token], source: str) -> Iterator[Token]:
    """Yield the tokens of the text `source`, with what Rich loses: addresses and line ends."""
    targets: list[str] = []
    linked = ""
    for token in children:
        if token.type == "link_open":
            targets.append(_target(token, "href", source))
            linked = ""
            yield Token("u_open", "u", 1)
        elif token.type == "link_close":
            target = targets.pop()
            yield Token("u_close", "u", -1)
            if target != linked:
                yield _text(f" ({target})")
        elif token.type == "image":
            yield _text(f"{token.content} ({_target(token, 'src', source)})")
        elif token.type == "softbreak":
            yield Token("hardbreak", "br", 0)
        elif token.info == "entity" and (content := _entity(token)):
            linked += content
            yield _text(content)
        elif token.type == "text_special" and token.content not in _ESCAPED:
            yield _text(token.markup)
        elif token.type in ("text", "text_special"):
            linked += token.content
            yield _text(token.content.replace("\t", _TAB))
        else:
            linked += token.content
            yield token


def _entity(token: Token) -> str:
    """Return an entity's character if it is ASCII and can be shown, else nothing.

    Others could act on the terminal, or are missing in its encoding, so they stay as written.
    """
    content = token.content.replace("\xa0", " ")
    return content if content.isascii() and content.isprintable() else ""


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)


def _target(token: Token, name: str, source: str) -> str:
    """Return the address and title of a link in the text `source`.

    The parser has decoded entities in them. A character that only an entity has written, as a bidi
    control or what the encoding lacks, stays one.
    """
    title = f' "{token.attrs["title"]}"' if "title" in token.attrs else ""
    target = f"{token.attrs[name]}{title}"
    written = {*source, " ", '"'} if "&" in source else target
    return "".join(char if char in written else f"&#{ord(char)};" for char in target)


def _min_width(block: list[Token], lines: list[str]) -> int:
    """Return the columns that a block needs. No terminal has enough for what would lose text."""
    levels = max(token.level for token in block)
    columns = sum(token.type == "th_open" for token in block)
    most = 0
    for token in block:
        if token.type == "tr_open" and token.map:
            cells = escapedSplit(lines[token.map[0]].strip(" \t>"))
            bars = (cells[0] == "") + (cells[-1] == "" and len(cells) > 1)
            most = max(most, len(cells) - bars)
    # The parser drops what is nested deeper, and cells that have no header.
    if levels >= _MAX_NESTING - 1 or most > columns:
        return 10**6
    return max(_MIN_CELL_WIDTH * columns + 1, _MIN_NESTED_WIDTH * levels)


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar = {f"h{level}": "left" for level in range(1, 7)}


class _Code(CodeBlock):
    """Code with a line before and after it, on the terminal's own background."""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        block = cls(token.info.strip(), "")
        block._has_fence = token.type == "fence"
        return block

    _has_fence = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).removesuffix("\n")
        if not self._has_fence:  # as it was written, because its start and end are uncertain
            lines = (f"{_TAB}{line}" if line.strip() else "" for line in code.split("\n"))
            yield Text("\n".join(lines).replace("\t", _TAB), overflow="fold")
            return
        language = self.lexer_name
        first = f"── {language} " if language else ""
        code = code.expandtabs(len(_TAB))
        drawn = Syntax(code, language.split(" ")[0] or "text", theme=_CODE_THEME).highlight(code)
        if drawn.plain.rstrip("\n") != code.rstrip("\n"):  # a lexer that changes text
            drawn = Text(code)
        width = min(_FRAME_WIDTH, options.max_width)
        yield Text(first.ljust(width, "─"), style=FRAME, no_wrap=True, overflow="crop")
        for line in drawn.split("\n", allow_blank=True)[: code.count("\n") + 1]:
            # A full row is cut, because spaces in code count.
            widths = map(len, chop_cells(line.plain, options.max_width)[:-1])
            yield from line.divide(accumulate(widths))
        yield Text("─" * width, style=FRAME)


class _Table(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            table.box = box.SQUARE
            table.pad_edge = True
            table.collapse_padding = False
            yield table


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style=FRAME)


class _RichMarkdown(Markdown):
    """One block in Rich's Markdown, with the tokens of our parser."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        **{"heading_open": _Heading, "fence": _Code, "code_block": _Code},
        **{"table_open": _Table, "hr": _Rule},
    }
    # A link's text is underlined. Rich's own links hide their addresses, or repeat them.
    inlines = Markdown.inlines | {"u"}

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = iter(super().__rich_console__(console, options))
        first = next(segments, None)
        if first is not None and first != Segment.line():  # Rich's gap before a list, quote, table
            yield first
        yield from segments
