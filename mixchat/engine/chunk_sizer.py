"""Chooses how many tokens of prompts a pass takes, so that neither prompts nor others wait long."""

from __future__ import annotations

from mixchat.engine.caches.kv_cache import MAX_CUT_TOKENS

# Tokens. Chunks are large, because each reads most experts on disk again.
PREFILL_CHUNK = MAX_CUT_TOKENS
# Tokens of prompts in a pass in which other answers decode.
_FIRST_CHUNK = 32
SMALLEST_CHUNK = 16
# Seconds that a pass may take if other answers decode in it, and if none do.
_DECODING_TARGET_S = 0.7
_PREFILL_TARGET_S = 8.0
# On a slow machine, the first target as a multiple of a pass that only decodes.
_DECODING_TARGET_RATIO = 4
_OLD_PASS_WEIGHT = 0.7  # of each earlier pass, against the one after it
_PRIOR_WEIGHT = 0.01  # of the belief that a pass of no tokens takes no time


class PassSizer:
    """Chooses how many tokens of prompts the next pass takes, or `fixed` if given."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._decoding_seconds = 0.0
        self._most = PREFILL_CHUNK  # that a GPU's memory has room for
        # By whether other answers decode in the pass.
        self._sizers = {
            False: ChunkSizer(PREFILL_CHUNK, SMALLEST_CHUNK, PREFILL_CHUNK),
            True: ChunkSizer(_FIRST_CHUNK, SMALLEST_CHUNK, PREFILL_CHUNK),
        }

    def choose(self, *, decodes: bool) -> int:
        """Return the tokens of prompts in the next pass."""
        if self._fixed is not None:
            return min(self._fixed, self._most)
        slowest = max(_DECODING_TARGET_S, _DECODING_TARGET_RATIO * self._decoding_seconds)
        chosen = self._sizers[decodes].choose(slowest if decodes else _PREFILL_TARGET_S)
        return min(chosen, self._most)

    def shrink(self, tokens: int) -> None:
        """Take fewer than so many tokens, for which a GPU's memory was too small."""
        self._most = max(tokens // 2, SMALLEST_CHUNK)

    def recover(self) -> None:
        """Take more tokens again, since memory may be free by now."""
        self._most = min(2 * self._most, PREFILL_CHUNK)

    def add(self, prompt_tokens: int, seconds: float, *, decodes: bool) -> None:
        if prompt_tokens:
            self._sizers[decodes].add(prompt_tokens, seconds)
        else:
            self._decoding_seconds = seconds


class ChunkSizer:
    """Learns from passes that took `fixed + n * each` seconds for n tokens of prompts.

    If experts are read from disk, `fixed` is large. The tokens may then take as long as that. With
    0.1 s and 0.01 s a token, 60 tokens fit into 0.7 s. With 10 s and 0.01 s a token the chunk has
    1,000 tokens.
    """

    def __init__(self, first: int, least: int, most: int) -> None:
        self._first = first
        self._least = least
        self._most = most
        self._weight = self._tokens = self._seconds = 0.0
        self._squares = self._products = 0.0
        self._last = first

    def add(self, tokens: int, seconds: float) -> None:
        new = (1, tokens, seconds, tokens * tokens, tokens * seconds)
        old = (self._weight, self._tokens, self._seconds, self._squares, self._products)
        # Old passes fade, because the speed changes as the cache of experts fills.
        sums = (_OLD_PASS_WEIGHT * past + item for past, item in zip(old, new, strict=True))
        self._weight, self._tokens, self._seconds, self._squares, self._products = sums
        self._last = tokens

    def choose(self, target: float) -> int:
        """Return the tokens for `target` seconds, at most twice the last pass's."""
        if not self._weight:
            return self._first
        # Fit `fixed` and `each` by least squares.
        tokens = self._tokens / self._weight
        seconds = self._seconds / self._weight
        variance = self._squares / self._weight - tokens**2
        covariance = self._products / self._weight - tokens * seconds
        # The prior belief, of a line through 0, decides while all passes have the same tokens.
        slope = covariance + _PRIOR_WEIGHT * tokens * seconds
        each = max(slope / (variance + _PRIOR_WEIGHT * tokens**2), 0.0)
        fixed = max(seconds - each * tokens, 0.0)
        room = max(target - fixed, fixed)
        wanted = self._most if each * self._most <= room else int(room / each)
        # A fit of few passes may be far off, so the chunk grows by steps.
        return min(max(wanted, self._least), 2 * max(self._last, self._least), self._most)
