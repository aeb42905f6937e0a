"""Proposes tokens that followed the last ones earlier, and verifies them in one pass.

A pass that verifies 16 tokens takes about as long as four or five single ones, and pays if text is
repeated. Verified tokens are sampled one after the other, as without speculation.

V = vocab_size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from itertools import cycle, islice, takewhile

import torch

from mixchat.engine.stats import SpeculationStats

# Tokens that have to be repeated. With 4, prose lost 1 to 2% before proposals stopped. With 12,
# answers with quotes gained half as much.
_MIN_MATCH_TOKENS = 8
_MAX_PROPOSAL_TOKENS = 48
_TOKEN_BYTES = array("i").itemsize
_MAX_LOST_SHARE = 0.02  # of the decoding time, if proposals fail
_MAX_SAVED_PASSES = 4  # passes of one token
_LAST_PASS_WEIGHT = 0.2  # in the mean of seconds


class Speculation:
    """Decides if proposals pay, by the seconds that verifying them has saved or lost.

    An accepted token saves the seconds of a pass of one token. A pass that verifies loses the
    seconds that it takes longer. While more was lost than saved, nothing is proposed, and each pass
    of one token adds 2% of its time.

    Let one token take 1 s, and a pass that verifies 16 of them 3 s. Then 12 accepted tokens save 10
    s, of which 4 are kept. Three passes without any lose 6 s, and the next try is 100 tokens later.
    """

    def __init__(self) -> None:
        self.single_seconds = 0.0  # mean of the passes of one token, 0 before the first
        self._saved_seconds = 0.0
        self._has_verified = False  # in the last pass

    @property
    def pays(self) -> bool:
        return self.single_seconds > 0 and self._saved_seconds >= 0

    def add_single(self, seconds: float) -> None:
        """Note a pass of one token."""
        if not self.single_seconds:
            self.single_seconds = seconds
            self._saved_seconds = _MAX_SAVED_PASSES * seconds
        elif self._has_verified:
            # Verifying evicted experts. The time to bring them back is lost by it.
            self._save(self.single_seconds - seconds)
        else:
            self.single_seconds += _LAST_PASS_WEIGHT * (seconds - self.single_seconds)
        self._has_verified = False
        self._save(_MAX_LOST_SHARE * seconds)

    def add_verifying(self, seconds: float) -> None:
        """Note a pass that verified tokens."""
        self._has_verified = True
        self._save(self.single_seconds - seconds)

    def add_accepted(self) -> None:
        """Note a proposed token that was right."""
        self._save(self.single_seconds)

    def _save(self, seconds: float) -> None:
        most = _MAX_SAVED_PASSES * self.single_seconds
        self._saved_seconds = min(self._saved_seconds + seconds, most)


class Proposals:
    """The proposed tokens of one answer, and the logits after the verified tokens.

    No token of `stop_ids` is proposed, and none without `speculation`.
    """

    def __init__(self, speculation: Speculation | None, stop_ids: Set[int]) -> None:
        self.stats = SpeculationStats()
        self._speculation = speculation
        self._stop_ids = stop_ids
        self._verified: list[tuple[int, torch.Tensor]] = []
        self._text = bytearray()  # the tokens so far as bytes, which are searched fast

    def take(self, token: int) -> torch.Tensor | None:
        """Return the logits [V] after the next token, None if it was not proposed."""
        if not self._verified or self._verified[0][0] != token:
            self._verified.clear()
            return None
        self.stats.accepted += 1
        if self._speculation is not None:
            self._speculation.add_accepted()
        return self._verified.pop(0)[1]

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow `ids`."""
        if self._speculation is None or not self._speculation.pays:
            return []
        # Find the last earlier occurrence of the last tokens. It may overlap with them.
        self._text += array("i", ids[len(self._text) // _TOKEN_BYTES :]).tobytes()
        last = self._text[-_MIN_MATCH_TOKENS * _TOKEN_BYTES :]
        match = len(self._text) - len(last)
        while (match := self._text.rfind(last, 0, match + len(last) - 1)) >= 0:
            if match % _TOKEN_BYTES == 0:
                break  # an occurrence that begins inside a token does not count
        if match < 0:
            return []
        # Propose as many tokens as are repeated: the longer the quote, the farther it goes on.
        end = match // _TOKEN_BYTES + _MIN_MATCH_TOKENS
        longest = min(end, _MAX_PROPOSAL_TOKENS)
        repeated = 0
        while repeated < longest and ids[end - 1 - repeated] == ids[-1 - repeated]:
            repeated += 1
        count = min(repeated, most)
        # What follows may end before that, if the text repeats itself, and then begins again.
        following = islice(cycle(ids[end : end + count]), count)
        return list(takewhile(lambda token: token not in self._stop_ids, following))

    def put(self, proposal: Sequence[int], logits: torch.Tensor, seconds: float) -> None:
        """Note a pass over one token and n proposed ones, with the logits [1 + n, V]."""
        if self._speculation is None:
            return
        if not proposal:
            self._speculation.add_single(seconds)
            return
        self._speculation.add_verifying(seconds)
        self.stats.single_seconds = self._speculation.single_seconds
        self.stats.passes += 1
        self.stats.proposed += len(proposal)
        self._verified = [(token, logits[n]) for n, token in enumerate(proposal, start=1)]
