"""What `--verbose` prints after an answer."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, TextIO

from mixchat.settings import format_size

if TYPE_CHECKING:
    from mixchat.chat.session import Finished
    from mixchat.engine.generate import Engine, GenerationStats
    from mixchat.experts.stats import ExpertStats


class VerboseReport:
    """Prints the figures of a turn. The engine counts from its start, so the last count is kept."""

    def __init__(self, engine: Engine, stream: TextIO | None = None) -> None:
        self._engine = engine
        self._stream = stream or sys.stderr
        self._before = dataclasses.replace(engine.expert_stats)

    def __call__(self, finished: Finished) -> None:
        """Print the turn that has just ended."""
        now = dataclasses.replace(self._engine.expert_stats)
        lines = [
            *generation_lines(finished.stats),
            *expert_lines(self._before, now),
            f"seed     {finished.seed}",
            f"ended    {finished.reason}",
        ]
        self._before = now
        print("\n".join(lines), file=self._stream, flush=True)


def generation_lines(stats: GenerationStats) -> list[str]:
    """Tokens and rates of prefill and decode."""
    new = stats.prompt_tokens - stats.reused_tokens
    # The first token falls out of the prefill.
    decoded = max(stats.generated_tokens - 1, 0)
    return [
        f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache",
        f"prefill  {new} tokens, {_rate(new, stats.prefill_seconds)}",
        f"decode   {stats.generated_tokens} tokens, " + _rate(decoded, stats.decode_seconds),
    ]


def expert_lines(before: ExpertStats, now: ExpertStats) -> list[str]:
    """What the cache of experts did between two counts."""
    did = now.since(before)
    rate = f"{did.hit_rate:.1%}" if did.hits + did.misses else "none asked for"
    return [
        f"experts  {did.hits} hits, {did.misses} misses ({rate}), "
        f"{format_size(did.bytes_moved)} moved, {did.slots} slots"
    ]


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "no time taken"
