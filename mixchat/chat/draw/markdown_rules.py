"""The Markdown parser, without rules that hide text or let later lines change earlier ones."""

from __future__ import annotations

import re
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, newline

MAX_NESTING = 20  # levels, below which markdown-it drops everything

# Formulas, and code outside a fence, have no emphasis and no escapes.
_VERBATIM = re.compile(
    r"""\\\(.{1,1000}?\\\) | \\\[.{1,1000}?\\\] | \$\$.{1,1000}?\$\$
    | (?<=[0-9A-Za-z)]) \* (?=[0-9A-Za-z(])                            # 2*3*4
    | (?<=[0-9A-Za-z)]) \*\* (?=[0-9])                                # x**2 + y**2
    | (?<!\w) __ (?: [a-z][a-z0-9_]* | [A-Z][A-Z0-9_]* ) __ (?!\w)     # __init__, __FILE__
    """,
    re.DOTALL | re.VERBOSE,
)


class _Parser(MarkdownIt):
    """Leaves a link's address as it was written, whatever it is."""

    def normalizeLink(self, url: str) -> str:
        return url

    def validateLink(self, url: str) -> bool:
        return True


@lru_cache(maxsize=1)
def parser() -> MarkdownIt:
    """Return the parser, which is built once."""
    made = _Parser("commonmark", {"maxNesting": MAX_NESTING}).enable(["strikethrough", "table"])
    made.disable(["html_block", "html_inline", "autolink", "entity"])
    made.disable(["reference", "lheading", "text_join"])
    made.inline.ruler.before("escape", "verbatim", _verbatim)
    made.inline.ruler.at("newline", _newline)
    return made


def _verbatim(state: StateInline, silent: bool) -> bool:
    """Take text of `_VERBATIM` as it is (a rule of the parser)."""
    found = _VERBATIM.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("text", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _newline(state: StateInline, silent: bool) -> bool:
    """End a line, but leave the spaces of the next one (a rule of the parser)."""
    begin = state.pos
    if not newline(state, silent):
        return False
    if not silent:
        state.pending += state.src[begin + 1 : state.pos]
    return True


def code_blocks(text: str) -> list[str]:
    """Return the content of each fenced block of a Markdown text, in order, those in lists too."""
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
