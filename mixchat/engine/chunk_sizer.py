"""Chooses how many tokens of prompts a pass takes: nobody should wait long, and little be lost."""

from __future__ import annotations

_FRESH = 0.7  # weight of each earlier pass, against the one after it
_EVEN = 0.01  # weight of the belief that a pass of no tokens takes no time


class ChunkSizer:
    """Learns from passes that took `fixed + n * each` seconds for n tokens of prompts.

    `fixed` is much where experts are read from disk: nearly all of them, whatever n is. Then small
    pieces would be slow and no pass shorter, so that the tokens may take as long as `fixed` does.
    With 0.1 s and 0.01 s a token, 60 tokens fit into 0.7 s; with 10 s and 0.01 s a token it is
    1,000 tokens, although nobody wants to wait for longer than 0.7 s.
    """

    def __init__(self, first: int, least: int, most: int) -> None:
        self._first, self._least, self._most = first, least, most
        self._weight = self._tokens = self._seconds = 0.0
        self._squares = self._products = 0.0
        self._last = first

    def add(self, tokens: int, seconds: float) -> None:
        """Note a pass with so many tokens of prompts."""
        fresh = (1, tokens, seconds, tokens * tokens, tokens * seconds)
        known = (self._weight, self._tokens, self._seconds, self._squares, self._products)
        sums = (_FRESH * old + new for old, new in zip(known, fresh, strict=True))
        self._weight, self._tokens, self._seconds, self._squares, self._products = sums
        self._last = tokens

    def choose(self, patience: float) -> int:
        """Return the tokens of the next pass, which may take so many seconds.

        It is at most twice as many as in the last pass.
        """
        if not self._weight:
            return self._first
        fixed, each = self._fit()
        room = max(patience - fixed, fixed)
        wanted = self._most if each * self._most <= room else int(room / each)
        return min(max(wanted, self._least), 2 * max(self._last, self._least), self._most)

    def _fit(self) -> tuple[float, float]:
        """Return `fixed` and `each`, by least squares."""
        tokens, seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - tokens**2
        covariance = self._products / self._weight - tokens * seconds
        slope = covariance + _EVEN * tokens * seconds
        each = max(slope / (variance + _EVEN * tokens**2), 0.0)
        return max(seconds - each * tokens, 0.0), each
