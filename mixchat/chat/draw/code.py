"""Finds the blocks of code in an answer."""

from __future__ import annotations


def code_blocks(text: str) -> list[str]:
    """Return the content of each fenced block of a Markdown text, in order, those in lists too."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
