"""Lays rows of cells out as a table."""

from __future__ import annotations

from collections.abc import Sequence

from mixchat.chat.printing import one_line


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as lines, in columns of equal width two spaces apart."""
    cells = [[one_line(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)
