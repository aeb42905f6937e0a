"""Speculation: proposes the tokens that followed the last ones earlier, to verify them in one pass.

Mixtral reads up to eight experts of a layer for several tokens, and two for one. So a pass that
verifies 16 tokens takes about as long as four or five single ones, and pays where text is quoted,
edited or repeated. Verified tokens are sampled one after the other, as without speculation.

V = vocab_size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from itertools import cycle, islice, takewhile

import torch

from mixchat.engine.stats import SpeculationStats

# Tokens that have to stand together. Fewer are chance more often: with 4, prose lost 1 to 2% before
# proposals stopped; with 12, answers with quotes gained half as much.
_LEAST = 8
_SIZE = array("i").itemsize
_MOST = 48  # tokens proposed at once
# Of the decoding time: what may be lost where proposals fail.
_STAKE = 0.02
_MOST_WON = 4  # passes of one token: beyond that, what was won earlier pays for no failures now
_FRESH = 0.2  # weight of the last pass in the mean of seconds


class Speculation:
    """Decides whether proposals pay, by the seconds that verifying them has won or lost.

    It is kept from answer to answer. A token that is accepted wins the seconds of a pass of one
    token; a pass that verifies loses what it takes longer than one. While more was lost than won,
    nothing is proposed; each pass of one token then adds 2% of its time, until the next try. At
    first it has what can be won at most.

    With 1 s for one token and 3 s for a pass that verifies 16: 12 accepted win 12 - 2 = 10 s, of
    which 4 are kept. Three passes without any lose 6 s, and the next try is 100 tokens later.
    """

    def __init__(self) -> None:
        self.single_seconds = 0.0  # mean of the passes of one token; 0 before the first
        self._won = 0.0  # seconds
        self._has_verified = False  # in the last pass

    @property
    def pays(self) -> bool:
        """Return whether to propose tokens."""
        return self.single_seconds > 0 and self._won >= 0

    def add_single(self, seconds: float) -> None:
        """Note a pass of one token.

        Behind one that verified, it may have to bring experts back: what it takes longer is lost.
        """
        if not self.single_seconds:
            self.single_seconds, self._won = seconds, _MOST_WON * seconds
        elif self._has_verified:
            self._win(self.single_seconds - seconds)
        else:
            self.single_seconds += _FRESH * (seconds - self.single_seconds)
        self._has_verified = False
        self._win(_STAKE * seconds)

    def add_verifying(self, seconds: float) -> None:
        """Note a pass that verified proposed tokens."""
        self._has_verified = True
        self._win(self.single_seconds - seconds)

    def add_accepted(self) -> None:
        """Note a proposed token that was right."""
        self._win(self.single_seconds)

    def _win(self, seconds: float) -> None:
        self._won = min(self._won + seconds, _MOST_WON * self.single_seconds)


class Proposals:
    """The proposed tokens of one answer, and the logits behind those that were verified.

    Without `speculation` it proposes nothing. No token of `stop_ids` is proposed: it ends the
    answer, so that nothing comes behind it.
    """

    def __init__(self, speculation: Speculation | None, stop_ids: Set[int]) -> None:
        self.stats = SpeculationStats()
        self._speculation, self._stop_ids = speculation, stop_ids
        self._verified: list[tuple[int, torch.Tensor]] = []
        self._text = bytearray()  # the tokens so far, `_SIZE` bytes each, to be searched fast

    def take(self, token: int) -> torch.Tensor | None:
        """Return the logits [1, V] behind the next token; None if it was not proposed."""
        if not self._verified or self._verified[0][0] != token:
            self._verified.clear()
            return None
        self.stats.accepted += 1
        if self._speculation is not None:
            self._speculation.add_accepted()
        return self._verified.pop(0)[1]

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow `ids`: as many as stood there before."""
        if self._speculation is None or not self._speculation.pays:
            return []
        end = self._find(ids)
        if end is None:
            return []
        count = min(_matched(ids, end), most)
        # Text that repeats itself without an end is proposed again and again.
        following = islice(cycle(ids[end : end + count]), count)
        return list(takewhile(lambda token: token not in self._stop_ids, following))

    def put(self, proposal: Sequence[int], logits: torch.Tensor, seconds: float) -> torch.Tensor:
        """Note a pass over one token and the proposal behind it; return the first logits [1, V].

        logits: those of all its tokens, [1 + n, V].
        """
        if self._speculation is None:
            return logits
        if not proposal:
            self._speculation.add_single(seconds)
            return logits
        self._speculation.add_verifying(seconds)
        self.stats.single_seconds = self._speculation.single_seconds
        self.stats.passes += 1
        self.stats.proposed += len(proposal)
        self._verified = [(token, logits[n : n + 1]) for n, token in enumerate(proposal, start=1)]
        return logits[:1]

    def _find(self, ids: Sequence[int]) -> int | None:
        """Return the end of the last place where the last tokens stood before."""
        self._text += array("i", ids[len(self._text) // _SIZE :]).tobytes()
        last = self._text[-_LEAST * _SIZE :]
        place = len(self._text) - len(last)
        while (place := self._text.rfind(last, 0, place + len(last) - 1)) >= 0:
            if place % _SIZE == 0:
                return place // _SIZE + _LEAST
        return None


def _matched(ids: Sequence[int], end: int) -> int:
    """Return how many tokens before `end` are the last ones of `ids`, up to `_MOST`."""
    count = 0
    while count < min(end, _MOST) and ids[end - 1 - count] == ids[-1 - count]:
        count += 1
    return count
