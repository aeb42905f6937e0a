"""The result of a command, from which its text and its JSON are drawn, and tables."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mixchat.chat.printing import one_line, show, show_lines


class Report(ABC):
    """The result of a command, for a person and for programs."""

    @abstractmethod
    def as_text(self) -> str:
        """Return the result as lines for a person."""

    @abstractmethod
    def as_json(self) -> Any:
        """Return the result for programs, with sizes in bytes and times in seconds."""

    def show(self, as_json: bool) -> None:
        """Print the result on standard output."""
        if as_json:
            show(json.dumps(self.as_json(), indent=2))
        else:
            show_lines(self.as_text())


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as lines, in columns of equal width two spaces apart."""
    cells = [[one_line(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)
