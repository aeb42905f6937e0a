"""The figures that `--verbose` prints after an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mixchat.base.quantities import format_age, format_rates, format_size, format_times
from mixchat.chat.printing import say
from mixchat.engine.report import slots_in_words

if TYPE_CHECKING:
    from mixchat.chat.session import Finished
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats, SpeculationStats
    from mixchat.experts.cache import ExpertStats
    from mixchat.planning.plan import Prediction


class VerboseReport:
    """Prints a turn's figures and the predicted speed. `engine` is None if a server answers."""

    def __init__(self, engine: Engine | None, predict: Callable[[], Prediction | None]) -> None:
        self._engine, self._predict = engine, predict
        self._first = True

    def __call__(self, finished: Finished) -> None:
        seed = "left to the server" if finished.seed is None else finished.seed
        lines = [
            *generation_lines(finished.stats, self._predict(), first=self._first),
            *self._expert_lines(finished),
            *([] if self._engine is None else [f"context  {self._engine.context.in_words}"]),
            f"seed     {seed}",
            f"ended    {finished.reason}",
        ]
        self._first = False
        say(*lines)

    def _expert_lines(self, finished: Finished) -> list[str]:
        if self._engine is None:
            return ["experts  the server does not tell"]
        return expert_lines(finished.stats.experts, self._engine.slots_by_tier)


def generation_lines(
    stats: GenerationStats, predicted: Prediction | None, *, first: bool
) -> list[str]:
    """Return tokens, rates and predicted rates of prefill and decode.

    The prompt of the first turn brings experts from disk, unless all have come before.
    """
    first = first and bool(stats.experts.misses)
    new = stats.prompt_tokens - stats.reused_tokens
    # The first token comes from the prefill.
    decoded = max(stats.generated_tokens - 1, 0)
    prompt = [
        f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache",
        f"prefill  {new} tokens, {_rate(new, stats.prefill_seconds)}",
    ]
    return [
        *(prompt if stats.prompt_tokens else ["prompt   the server does not tell its tokens"]),
        f"         first token after {stats.prefill_seconds:.1f} s"
        + _prompt_predicted(predicted, new, first),
        f"decode   {stats.generated_tokens} tokens, {_rate(decoded, stats.decode_seconds)}"
        + _speed_predicted(predicted),
        *_speculation_lines(stats.speculation),
    ]


def _speculation_lines(did: SpeculationStats) -> list[str]:
    if not did.passes:
        return []
    return [
        f"proposed {did.proposed} tokens, {did.accepted} of them accepted, in {did.passes} passes "
        f"({_rate(1, did.single_seconds)} without)"
    ]


def _prompt_predicted(predicted: Prediction | None, tokens: int, first: bool) -> str:
    speed = None if predicted is None else predicted.prompt(tokens, cold=first)
    if speed is None:
        return ""
    seconds = format_times(tokens / speed.high, tokens / speed.low)
    return f" ({seconds} predicted{', with all experts on disk' if first else ''})"


def _speed_predicted(predicted: Prediction | None) -> str:
    speed = None if predicted is None else predicted.decode()
    if speed is None:
        return ""
    age = format_age(time.time() - speed.measured_at)
    return f" ({format_rates(speed.low, speed.high)} predicted, measured {age})"


def expert_lines(did: ExpertStats, slots: Mapping[str, int]) -> list[str]:
    """Return a turn's use of experts and of prefetching."""
    hits, misses = did.hits.total(), did.misses.total()
    rate = f"hit rate {did.hit_rate:.1%}" if hits + misses else "none used"
    moved, waited = format_size(did.bytes_moved), did.stalled_seconds
    lines = [
        f"experts  {hits} hits, {misses} misses ({rate}), {slots_in_words(slots)}",
        f"loaded   {moved}, waited {waited:.1f} s for it",
    ]
    if did.read_seconds:
        bandwidth = format_size(int(did.bytes_read / did.read_seconds))
        lines.append(f"files    read for {did.read_seconds:.1f} s at {bandwidth}/s")
    if did.predictions:
        lines.append(f"prefetch {did.predictions} predicted, {did.right_predictions} of them right")
    return lines


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "no time taken"
