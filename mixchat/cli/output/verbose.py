"""What `--verbose` prints after an answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from mixchat.chat.printing import say
from mixchat.quantities import format_age, format_rates, format_size

if TYPE_CHECKING:
    from mixchat.chat.session import Finished
    from mixchat.engine.generate import Engine, GenerationStats
    from mixchat.experts.stats import ExpertStats
    from mixchat.planning.expectation import SpeedRange


class VerboseReport:
    """Prints the figures of a turn. The engine counts from its start, so the last count is kept."""

    def __init__(self, engine: Engine, stream: TextIO | None = None) -> None:
        self._engine = engine
        self._stream = stream or sys.stderr
        self._before = engine.experts.stats.copy()

    def __call__(self, finished: Finished) -> None:
        """Print the turn that has just ended."""
        now = self._engine.experts.stats.copy()
        lines = [
            *generation_lines(finished.stats, self._engine.expected()),
            *expert_lines(now.since(self._before), self._engine.experts.slots_by_tier),
            f"seed     {finished.seed}",
            f"ended    {finished.reason}",
        ]
        self._before = now
        say(*lines, stream=self._stream)


def generation_lines(stats: GenerationStats, expected: SpeedRange | None) -> list[str]:
    """Tokens and rates of prefill and decode, beside the rate that `mixchat plan` expects."""
    new = stats.prompt_tokens - stats.reused_tokens
    # The first token falls out of the prefill.
    decoded = max(stats.generated_tokens - 1, 0)
    beside = ""
    if expected is not None:
        age = format_age(time.time() - expected.measured_at)
        beside = f" ({format_rates(expected.low, expected.high)} expected, measured {age})"
    return [
        f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache",
        f"prefill  {new} tokens, {_rate(new, stats.prefill_seconds)}",
        f"decode   {stats.generated_tokens} tokens, {_rate(decoded, stats.decode_seconds)}{beside}",
    ]


def expert_lines(did: ExpertStats, slots: Mapping[str, int]) -> list[str]:
    """What the slots of experts were good for in a turn."""
    hits, misses = did.hits.total(), did.misses.total()
    rate = f"{did.hit_rate:.1%}" if hits + misses else "none asked for"
    held = ", ".join(f"{count} {tier} slots" for tier, count in slots.items())
    moved, waited = format_size(did.bytes_moved), did.stalled_seconds
    lines = [
        f"experts  {hits} hits, {misses} misses ({rate}), {held}",
        f"moved    {moved}, waited {waited:.1f} s for them",
    ]
    if did.guesses:
        lines.append(f"guessed  {did.guesses} ahead, {did.right_guesses} of them right")
    return lines


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "no time taken"
