"""Draws an answer's Markdown for a terminal, without losing anything the model wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace

from markdown_it.rules_block.table import escapedSplit
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mixchat.base.sanitize import sanitize
from mixchat.chat.draw.highlight import TAB, Bar, Code, fitting
from mixchat.chat.draw.markdown_rules import MAX_NESTING, parser
from mixchat.chat.theme import CODE, FRAME, HEADINGS, INLINE, LINK

_MIN_INDENTED_WIDTH = 6  # columns, or text is not indented
_MIN_CELL_WIDTH = 7  # columns of a cell and its frame, or a table is not drawn

# A backslash before these is Markdown's. Before others, as in `\(` and `\{`, it is text.
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

    If it is in an item of a list or in a quote, `path` leads to it, with the number of the part in
    each. If it is `resumed`, the drawn lines ended with a frame, so the rest gets a new one.
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
    """A paragraph, table, top-level list item, which starts at line `start` of its text."""

    start: int
    gap: bool  # a blank line comes before it
    drawn: RenderableType


def blocks(text: str) -> list[MarkdownBlock]:
    """Return the blocks of a cleaned text, each drawn independently of the others.

    A block cannot change when a complete line of the next one is there. So references and
    underlined headings are text here, blank lines stay as they were written (no list is loose as a
    whole), and items have the numbers they were given.
    """
    source = _Source(text.split("\n"))
    found: list[MarkdownBlock] = []
    for part in _with_items(SyntaxTreeNode(parser().parse(text)).children):
        gap = bool(found) and source.gap(part)
        found.append(MarkdownBlock(_start(part), gap, source.drawn(part)))
    return found


def _with_items(nodes: list[SyntaxTreeNode]) -> list[SyntaxTreeNode]:
    """Return the nodes with the items of lists in place of the lists."""
    lists = ("bullet_list", "ordered_list")
    return [part for node in nodes for part in (node.children if node.type in lists else [node])]


def _start(node: SyntaxTreeNode) -> int:
    return node.map[0] if node.map else 0


def _is_too_deep(node: SyntaxTreeNode) -> bool:
    """Return whether the parser dropped a part of a block, because it was nested too deep."""
    blocks = (child for child in node.children if child.type != "inline")
    return (node.is_nested and node.level >= MAX_NESTING - 1) or any(map(_is_too_deep, blocks))


class _Source:
    """The lines of a text, and the drawing of its nodes."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def gap(self, node: SyntaxTreeNode) -> bool:
        """Return whether a blank line comes before a node."""
        return not self._lines[_start(node) - 1].strip(" \t>")

    def drawn(self, node: SyntaxTreeNode) -> RenderableType:
        """Return one block with everything in it."""
        if _is_too_deep(node):
            return self._as_written(node)
        match node.type:
            case "heading":
                return _inline(node.children[0].token, HEADINGS.get(node.tag, "bold"))
            case "paragraph":
                return _inline(node.children[0].token, before=self._indent(node))
            case "fence":
                return Code(node.content, node.info.strip(), closed=_is_closed(node))
            case "code_block":
                return _indented_text(node.content)
            case "table":
                as_written = self._as_written(node)
                return as_written if self._has_cells_too_many(node) else _Table(node, as_written)
            case "hr":
                return Bar()
            case "blockquote":
                return _Indented("│ ", "│ ", self._all(node.children))
        bullet = f"{node.info}{node.markup}" if node.info else "•"
        return _Indented(f"{bullet} ", " " * (len(bullet) + 1), self._all(node.children))

    def _all(self, nodes: list[SyntaxTreeNode]) -> list[RenderableType]:
        drawn: list[RenderableType] = []
        for part in _with_items(nodes):
            if drawn and self.gap(part):
                drawn.append(Text())
            drawn.append(self.drawn(part))
        return drawn

    def _has_cells_too_many(self, table: SyntaxTreeNode) -> bool:
        """Return whether a row has more cells than the header, which Markdown drops."""
        header, *rows = (row for section in table.children for row in section.children)
        return any(_cells(self._lines[_start(row)]) > len(header.children) for row in rows)

    def _indent(self, paragraph: SyntaxTreeNode) -> str:
        """Return the spaces before a paragraph, which may be code without a fence.

        Within lists they belong to the list, and a single one comes from tokenizers.
        """
        line = self._lines[_start(paragraph)]
        spaces = len(line) - len(line.lstrip(" "))
        return " " * spaces if spaces > 1 and paragraph.level == 0 else ""

    def _as_written(self, node: SyntaxTreeNode) -> Text:
        start, end = node.map or (0, 0)
        return Text("\n".join(self._lines[start:end]).rstrip().replace("\t", TAB))


def _is_closed(fence: SyntaxTreeNode) -> bool:
    """Return whether the fence is closed, so that its last line is not code."""
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
    """An item of a list or a quote, with its content after its mark."""

    def __init__(self, first: str, other: str, content: list[RenderableType]) -> None:
        self._first, self._other, self._content = first, other, content

    @property
    def last(self) -> tuple[int, RenderableType]:
        """Return the number of its last part, and that part."""
        number = len(self._content) - 1
        return number, self._content[number] if self._content else Text()

    def resumed(self, part: int, partly: PartlyDrawn) -> _Indented:
        """Return the same from the rest of this part on, without a mark.

        Returns all of it if there is no such part, because the line only looked like a fence.
        """
        if part >= len(self._content):
            return self
        rest, *others = self._content[part:]
        return _Indented(self._other, self._other, [partly.rest_of(rest), *others])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, other = (fitting(mark, options) for mark in (self._first, self._other))
        width = options.max_width - cell_len(first)
        if width < _MIN_INDENTED_WIDTH:
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
    """A table, or its source if there are too few columns to draw it."""

    def __init__(self, node: SyntaxTreeNode, as_written: Text) -> None:
        self._rows = [row for section in node.children for row in section.children]
        self._as_written = as_written

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        header, *rows = self._rows
        if options.max_width < _MIN_CELL_WIDTH * len(header.children) + 1:
            yield self._as_written
            return
        table = Table(box=box.SQUARE, border_style=FRAME)
        for cell in header.children:
            align = str(cell.attrs.get("style", "")).removeprefix("text-align:") or "left"
            table.add_column(_inline(cell.children[0].token), justify=align, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(_inline(cell.children[0].token) for cell in row.children))
        yield table


def _inline(token: Token | None, style: str = "", before: str = "") -> Text:
    """Return a line of text with its emphasis, code and links, after the spaces `before` it."""
    text = Text(before, style=style, overflow="fold")
    styles: list[str] = []
    targets: list[tuple[int, str]] = []
    for child in (token and token.children) or []:
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
    title = f' "{token.attrs["title"]}"' if "title" in token.attrs else ""
    return f"{token.attrs[name]}{title}"
