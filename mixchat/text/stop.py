"""Stop strings over a stream of text: ends it at the first one, and shows no part of it."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Watches text for stop strings; what may be the start of one is held back.

    The string that ends first counts, and of those that end together the longest, so the outcome
    is the same however the text is cut. With the stop string "END":
        add("the E") = ("the ", False), add("N") = ("", False), add("Dx") = ("", True)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Empty strings are ignored."""
        self._strings = sorted({s for s in strings if s}, key=len, reverse=True)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has come. After one, no more."""
        if self._stopped:
            return "", True
        text = self._held + text
        ends = [(i + len(s), i) for s in self._strings if (i := text.find(s)) >= 0]
        if ends:
            self._held, self._stopped = "", True
            return text[: min(ends)[1]], True
        kept = len(text) - self._partial(text)
        self._held = text[kept:]
        return text[:kept], False

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        rest, self._held = self._held, ""
        return rest

    def _partial(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max((len(s) - 1 for s in self._strings), default=0)
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-size:]) for s in self._strings)
            ),
            0,
        )
