"""Stop strings in a stream of text: the text ends at the first one, no part of which is shown."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Looks for stop strings in a stream of text, and holds back what may be the start of one.

    The string that ends first counts, and of those that end together the longest, so the result
    does not depend on how the text is cut. With the stop string "END":
        add("the E") = ("the ", False), add("N") = ("", False), add("Dx") = ("", True)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Look for `strings`; empty ones are ignored."""
        self._strings = sorted({s for s in strings if s}, key=len, reverse=True)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string has come.

        After a stop string the text is always empty.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        ends = [(i + len(s), i) for s in self._strings if (i := text.find(s)) >= 0]
        if ends:
            self._held, self._stopped = "", True
            return text[: min(ends)[1]], True
        safe = len(text) - self._partial(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return what was held back, at the end of a text without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _partial(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(s) - 1 for s in self._strings), default=0)
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-size:]) for s in self._strings)
            ),
            0,
        )
