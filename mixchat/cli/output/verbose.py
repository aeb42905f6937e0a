"""The figures that `--verbose` prints after an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mixchat.base.quantities import format_age, format_rate, format_size
from mixchat.chat.printing import say
from mixchat.engine.report import slots_in_words

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats
    from mixchat.experts.cache import ExpertStats
    from mixchat.face.events import End
    from mixchat.planning.expectation import SpeedEstimate


class VerboseReport:
    """Prints a turn's figures and the predicted speed. `engine` is None if a server answers."""

    def __init__(self, engine: Engine | None, predict: Callable[[], SpeedEstimate | None]) -> None:
        self._engine = engine
        self._predict = predict
        self._first = True

    def __call__(self, end: End) -> None:
        seed = "left to the server" if end.seed is None else end.seed
        experts = ["experts  the server does not tell"]
        if self._engine is not None:
            experts = expert_lines(end.stats.experts, self._engine.slots_by_tier)
            experts.append(f"context  {self._engine.context.in_words}")
        loading = None if self._engine is None else self._engine.load_seconds * self._first
        lines = [
            *generation_lines(end.stats, self._predict(), first=self._first, loading=loading),
            *experts,
            f"seed     {seed}",
            f"ended    {end.reason}",
        ]
        self._first = False
        say(*lines)


def generation_lines(
    stats: GenerationStats, predicted: SpeedEstimate | None, *, first: bool, loading: float | None
) -> list[str]:
    """Return tokens, rates and predicted rates of prefill and decode.

    first: it is the conversation's first turn. loading: seconds that the model's loading took
    before the turn, None if a server answers.
    """
    new = stats.prompt_tokens - stats.reused_tokens
    prompt = ["prompt   the server does not tell its tokens"]
    if stats.prompt_tokens:
        again = f", {stats.repeated_tokens} of them again" if stats.repeated_tokens else ""
        prompt = [
            f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache",
            f"prefill  {new} tokens{again}, {_rate(new, stats.prefill_seconds)}",
        ]
    first_token = f"         first token after {stats.prefill_seconds:.1f} s"
    # The first turn reads experts from disk, unless something brought all of them before.
    cold = first and bool(stats.experts.misses)
    if predicted is not None and (cost := predicted.prompt(new, cold=cold)) is not None:
        from_disk = ", with all experts on disk" if cold else ""
        first_token += f" ({format_rate(cost.seconds)} s predicted{from_disk})"
    first_token_lines = [first_token]
    if loading is not None:
        waiting = stats.prefill_waiting_seconds
        size = stats.prefill_bytes_read
        parts = [f"{waiting:.1f} s waiting for {format_size(size)} from disk"] if size else []
        parts.append(f"{stats.prefill_seconds - waiting:.1f} s computing")
        if loading:
            parts.append(f"after {loading:.1f} s of loading")
        first_token_lines.append(f"         {', '.join(parts)}")
    # The prefill generates the first token.
    decoded = max(stats.generated_tokens - 1, 0)
    decode = f"decode   {stats.generated_tokens} tokens, {_rate(decoded, stats.decode_seconds)}"
    if predicted is not None and (rate := predicted.tokens_per_second) is not None:
        age = format_age(time.time() - predicted.speeds.measured_at)
        decode += f" ({format_rate(rate)} predicted, measured {age})"
    lines = [*prompt, *first_token_lines, decode]
    speculation = stats.speculation
    if speculation.passes:
        lines.append(
            f"proposed {speculation.proposed} tokens, {speculation.accepted} of them accepted, in "
            f"{speculation.passes} passes ({_rate(1, speculation.single_seconds)} without)"
        )
    return lines


def expert_lines(stats: ExpertStats, slots: Mapping[str, int]) -> list[str]:
    """Return a turn's use of experts and of prefetching."""
    hits = stats.hits.total()
    misses = stats.misses.total()
    rate = f"hit rate {stats.hit_rate:.1%}" if hits + misses else "none used"
    moved = format_size(stats.bytes_moved)
    waited = stats.stalled_seconds
    lines = [
        f"experts  {hits} hits, {misses} misses ({rate}), {slots_in_words(slots)}",
        f"loaded   {moved}, waited {waited:.1f} s for it",
    ]
    if stats.read_seconds:
        bandwidth = format_size(int(stats.bytes_read / stats.read_seconds))
        lines.append(f"files    read for {stats.read_seconds:.1f} s at {bandwidth}/s")
    if stats.predictions:
        lines.append(
            f"prefetch {stats.predictions} predicted, {stats.right_predictions} of them right"
        )
    return lines


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 else "no time taken"
