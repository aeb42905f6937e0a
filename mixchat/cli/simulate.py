"""`mixchat simulate`: the hit rates of expert caches, by replaying a routing trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.flags.arguments import checked
from mixchat.cli.output.show_progress import status
from mixchat.errors import UsageError

if TYPE_CHECKING:
    from mixchat.experts.trace import Trace
    from mixchat.planning.simulate import HitRateRow

_TOKENS = 2000


def simulate(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            help="A file that 'mixchat run --trace' recorded; without one, a synthetic trace.",
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Also simulate a cache of N experts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Predict the hit rates of expert caches by size and policy."""
    from mixchat.cli.output.table import aligned
    from mixchat.experts.trace import read_trace
    from mixchat.planning.simulate import synthetic_trace

    path = None if trace is None else checked(trace, "the trace's name")
    with status("reading the trace"):
        replayed = synthetic_trace(tokens=_TOKENS) if path is None else read_trace(Path(path))
    total = replayed.layers * replayed.experts
    if slots is not None and slots > total:
        raise UsageError(f"--slots {slots}: the model of this trace has {total} experts")
    rows = _rows(replayed, () if slots is None else (slots,))
    if as_json:
        about = {"trace": path, "model": replayed.model} | _counts(replayed)
        show(json.dumps(about | {"rows": [vars(row) for row in rows]}, indent=2))
    else:
        say(_describe(path, replayed), "", stream=sys.stdout)
        show_lines(aligned(_cells(rows)))


def _rows(trace: Trace, slots: tuple[int, ...]) -> list[HitRateRow]:
    """Return the rows of the table; show the progress, because that takes seconds."""
    from mixchat.planning.simulate import hit_rate_table

    with status("replaying the trace") as update:
        return hit_rate_table(
            trace,
            slots=slots,
            started=lambda done, of: update(f"replaying the trace, {done} of {of}"),
        )


def _counts(trace: Trace) -> dict[str, int]:
    tokens = [trace.tokens(forward) for forward in trace.forwards]
    return {
        "layers": trace.layers,
        "experts": trace.experts,
        "experts_per_token": trace.experts_per_token,
        "prefill_tokens": sum(count for count in tokens if count > 1),
        "decode_tokens": tokens.count(1),
    }


def _describe(path: str | None, trace: Trace) -> str:
    counts = _counts(trace)
    shape = f"{trace.layers} layers of {trace.experts} experts, {trace.experts_per_token} a token"
    if path is None:
        what = "Synthetic, with the repetitions that the Mixtral paper measured (its table 5)"
        return f"{what}: {counts['decode_tokens']} tokens, {shape}."
    tokens = f"{counts['prefill_tokens']} tokens of prefill, {counts['decode_tokens']} of decode"
    return f"{path}: {trace.model}, {tokens}, {shape}; hit rates are those of decode."


def _cells(rows: list[HitRateRow]) -> list[tuple[str, ...]]:
    cells = [("CAPACITY", "SLOTS", *(name.upper() for name in rows[0].hit_rates))]
    for row in rows:
        rates = ("-" if rate is None else f"{rate:.1%}" for rate in row.hit_rates.values())
        cells.append((f"{row.capacity:.0%}", str(row.slots), *rates))
    return cells
