"""Draws an answer's Markdown for a terminal, without losing anything the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from markdown_it.rules_block.table import escapedSplit
from markdown_it.token import Token
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mixchat.base.sanitize import sanitize
from mixchat.chat.draw.highlight import TAB, Bar, Code, fitting
from mixchat.chat.draw.markdown_rules import DEEPEST, parser
from mixchat.chat.theme import CODE, FRAME, HEADINGS, INLINE, LINK

_NARROWEST = 6  # columns for indented text; with fewer it is not indented
_CELL = 7  # columns of a table's cell and its frame; with fewer a table is not drawn

# A backslash before these is Markdown's; before others, as in `\(` and `\{`, it is text.
_ESCAPED = set("\\`*_~#+-.!|<>$")
# Unicode's line and paragraph separators, which terminals show differently.
_SEPARATORS = {0x2028: "\n", 0x2029: "\n"}


def render(text: str) -> RenderableType:
    """Return what Rich prints for the Markdown `text`, which equals what streaming it shows."""
    return _Document(text)


def cleaned(text: str, encoding: str) -> str:
    """Return `text` without control characters, or others that the encoding lacks."""
    text = sanitize(text).translate(_SEPARATORS)
    return text.encode(encoding, "replace").decode(encoding)


@dataclass(frozen=True)
class PartlyDrawn:
    """The state of a code block of which `lines` lines are on the screen.

    `path` leads to it where it is in a list's item or a quote: the number of the part in each.
    `resumed`: what was drawn of it ended with a frame, so its rest gets a new one.
    """

    lines: int
    path: tuple[int, ...] = ()
    resumed: bool = False

    def rest_of(self, drawn: RenderableType) -> RenderableType:
        """Return what is still to be drawn of a block."""
        if self.path and isinstance(drawn, _Indented):
            return drawn.resumed(self.path[0], replace(self, path=self.path[1:]))
        if isinstance(drawn, Code):
            return replace(drawn, first=self.lines, resumed=self.resumed)
        return drawn


NOTHING = PartlyDrawn(0)


def broken_off(text: str) -> tuple[MarkdownBlock, PartlyDrawn] | None:
    """Return the block at the end of a cleaned text, if that ends in a fence that is not closed.

    The incomplete line counts as not drawn, because its rest alone would be hard to read.
    """
    found = blocks(text)
    drawn = found[-1].drawn if found else None
    path: tuple[int, ...] = ()
    while isinstance(drawn, _Indented):
        number, drawn = drawn.last
        path = (*path, number)
    if not isinstance(drawn, Code) or drawn.closed:
        return None
    return found[-1], PartlyDrawn(drawn.code.count("\n"), path, resumed=True)


class _Document:
    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for block in blocks(cleaned(self._text, options.encoding)):
            if block.gap:
                yield Text()
            yield block.drawn


@dataclass(frozen=True)
class MarkdownBlock:
    """A paragraph, table, top-level list item...: it starts at line `start` of its text."""

    start: int
    gap: bool  # a blank line comes before it
    drawn: RenderableType


def blocks(text: str) -> list[MarkdownBlock]:
    """Return the blocks of a cleaned text, each drawn independently of the others.

    A block cannot change once a complete line of the next one is there. That is why references and
    underlined headings are text here, why blank lines stay where they were written (no list is
    loose as a whole), and why items have the numbers they were given.
    """
    source = _Source(text.split("\n"))
    found: list[MarkdownBlock] = []
    for node in _tree(parser().parse(text)):
        is_list = node.token.type in ("bullet_list_open", "ordered_list_open")
        for part in node.children if is_list else [node]:
            found.append(
                MarkdownBlock(part.start, bool(found) and source.gap(part), source.drawn(part))
            )
    return found


@dataclass
class _Node:
    token: Token
    children: list[_Node] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.token.map[0] if self.token.map else 0

    @property
    def too_deep(self) -> bool:
        is_full = self.token.nesting == 1 and self.token.level >= DEEPEST - 1
        return is_full or any(child.too_deep for child in self.children)


def _tree(tokens: Sequence[Token]) -> list[_Node]:
    path: list[list[_Node]] = [[]]
    for token in tokens:
        if token.nesting == -1:
            path.pop()
            continue
        node = _Node(token)
        path[-1].append(node)
        if token.nesting == 1:
            path.append(node.children)
    return path[0]


class _Source:
    """The lines of a text, and the drawing of its nodes."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def gap(self, node: _Node) -> bool:
        return not self._lines[node.start - 1].strip(" \t>")

    def drawn(self, node: _Node) -> RenderableType:
        """Return one block with everything in it."""
        token, children = node.token, node.children
        if node.too_deep:
            return self._as_written(node)
        if token.type in ("paragraph_open", "heading_open"):
            if token.tag != "p":
                return _inline(children[0].token, HEADINGS.get(token.tag, "bold"))
            return _inline(children[0].token, before=self._indent(node))
        if token.type == "fence":
            return Code(token.content, token.info.strip(), closed=_is_closed(token))
        if token.type == "code_block":
            return _indented_text(token.content)
        if token.type == "table_open":
            as_written = self._as_written(node)
            return as_written if self._has_cells_too_many(node) else _Table(node, as_written)
        if token.type == "hr":
            return Bar()
        if token.type == "blockquote_open":
            return _Indented("│ ", "│ ", self._all(children))
        bullet = f"{token.info}{token.markup}" if token.info else "•"
        return _Indented(f"{bullet} ", " " * (len(bullet) + 1), self._all(children))

    def _all(self, nodes: list[_Node]) -> list[RenderableType]:
        drawn: list[RenderableType] = []
        for node in nodes:
            is_list = node.token.type in ("bullet_list_open", "ordered_list_open")
            for part in node.children if is_list else [node]:
                if drawn and self.gap(part):
                    drawn.append(Text())
                drawn.append(self.drawn(part))
        return drawn

    def _has_cells_too_many(self, table: _Node) -> bool:
        """Return whether a row has more cells than the header: Markdown drops them."""
        header, *rows = (row for section in table.children for row in section.children)
        return any(_cells(self._lines[row.start]) > len(header.children) for row in rows)

    def _indent(self, paragraph: _Node) -> str:
        """Return the spaces before a paragraph, which may be code without a fence.

        Within lists they belong to the list, and a single one comes from tokenizers.
        """
        line = self._lines[paragraph.start]
        spaces = len(line) - len(line.lstrip(" "))
        return " " * spaces if spaces > 1 and paragraph.token.level == 0 else ""

    def _as_written(self, node: _Node) -> Text:
        start, end = node.token.map or (0, 0)
        return Text("\n".join(self._lines[start:end]).rstrip().replace("\t", TAB))


def _is_closed(fence: Token) -> bool:
    """Return whether the fence is closed: its last line is then not one of its code."""
    start, end = fence.map or (0, 0)
    return end - start == len(fence.content.splitlines()) + 2


def _indented_text(code: str) -> Text:
    """Return code without a fence as it was written, because its start and end are uncertain."""
    lines = code.removesuffix("\n").replace("\t", TAB).split("\n")
    return Text(
        "\n".join(f"{TAB}{line}" if line.strip() else "" for line in lines), overflow="fold"
    )


def _cells(row: str) -> int:
    cells = escapedSplit(row.strip(" \t>"))
    return len(cells[cells[0] == "" :]) - (cells[-1] == "" and len(cells) > 1)


class _Indented:
    """A list's item or a quote: its content, behind its mark."""

    def __init__(self, first: str, other: str, content: list[RenderableType]) -> None:
        self._first, self._other, self._content = first, other, content

    @property
    def last(self) -> tuple[int, RenderableType]:
        """Return the number of its last part, and that part."""
        number = len(self._content) - 1
        return number, self._content[number] if self._content else Text()

    def resumed(self, part: int, partly: PartlyDrawn) -> _Indented:
        """Return the same from the rest of this part on, without a mark.

        Returns all of it where there is no such part: what looked like a fence was none.
        """
        if part >= len(self._content):
            return self
        rest, *others = self._content[part:]
        return _Indented(self._other, self._other, [partly.rest_of(rest), *others])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, other = (fitting(mark, options) for mark in (self._first, self._other))
        width = options.max_width - cell_len(first)
        if width < _NARROWEST:
            yield Text(first.rstrip(), style=FRAME)
            yield from self._content
            return
        mark = first
        for part in self._content or [Text()]:
            for line in console.render_lines(part, options.update(width=width), pad=False):
                yield Segment(mark, console.get_style(FRAME))
                yield from line
                yield Segment.line()
                mark = other


class _Table:
    """A table; as it was written where it cannot be drawn for lack of columns."""

    def __init__(self, node: _Node, as_written: Text) -> None:
        self._rows = [row for section in node.children for row in section.children]
        self._as_written = as_written

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        header, *rows = self._rows
        if options.max_width < _CELL * len(header.children) + 1:
            yield self._as_written
            return
        table = Table(box=box.SQUARE, border_style=FRAME)
        for cell in header.children:
            align = str(cell.token.attrs.get("style", "")).removeprefix("text-align:") or "left"
            table.add_column(_inline(cell.children[0].token), justify=align, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(_inline(cell.children[0].token) for cell in row.children))
        yield table


def _inline(token: Token, style: str = "", before: str = "") -> Text:
    """Return a line of text with its emphasis, code and links, behind the spaces `before` it."""
    text = Text(before, style=style, overflow="fold")
    styles: list[str] = []
    targets: list[tuple[int, str]] = []
    for child in token.children or []:
        if child.type == "link_open":
            targets.append((len(text), _target(child, "href")))
        elif child.type == "link_close":
            start, target = targets.pop()
            text.stylize(LINK, start)
            text.append("" if text.plain[start:] == target else f" ({target})")
        elif child.nesting == 1:
            styles.append(INLINE[child.tag])
        elif child.nesting == -1:
            styles.pop()
        else:
            own = [CODE] if child.tag == "code" else []
            text.append(_leaf(child), " ".join(styles + own))
    return text


def _leaf(token: Token) -> str:
    if token.tag == "br":
        return "\n"
    if token.type == "image":
        return f"{token.content} ({_target(token, 'src')})"
    if token.type == "text_special" and token.content not in _ESCAPED:
        return token.markup
    return token.content.replace("\t", TAB)


def _target(token: Token, name: str) -> str:
    """Return a link's address and its title."""
    title = f' "{token.attrs["title"]}"' if "title" in token.attrs else ""
    return f"{token.attrs[name]}{title}"
