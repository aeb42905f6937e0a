"""The code in an answer: what stands in its fences."""

from __future__ import annotations


def code_blocks(text: str) -> list[str]:
    """What each fenced block of a Markdown text holds, in their order, those in lists too."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
