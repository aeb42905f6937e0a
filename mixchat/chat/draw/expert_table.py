"""Writes the use of the experts in a run as a table, with a row for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from mixchat.base.quantities import format_size, format_time
from mixchat.base.sanitize import sanitize
from mixchat.engine.report import PLACES, ExpertReport

_SHOWN_EXPERTS = 4  # the most used of a layer


def expert_table(report: ExpertReport) -> str:
    """Return the uses, hits, places and most used experts of each layer, and the totals."""
    places = [PLACES[tier] for tier in report.tiers_used]
    rows = [("layer", "uses", "hits", *places, f"most used of {len(report.tiers[0])}")]
    for layer, tiers in enumerate(report.tiers):
        hits = report.hits[layer]
        misses = report.misses[layer]
        counts = [str(tiers.count(tier)) for tier in report.tiers_used]
        uses = [hit + miss for hit, miss in zip(hits, misses, strict=True)]
        rate = _rate(sum(hits), sum(misses), 0)
        rows.append((str(layer), f"{sum(uses):,}", rate, *counts, _most_used(uses)))
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = list[str]()
    for *numbers, experts in rows:
        cells = (f"{text:>{width}}" for text, width in zip(numbers, widths, strict=True))
        lines.append("  ".join([*cells, experts]))
    return "\n".join([*lines, "", *_totals(report)])


def _most_used(uses: list[int]) -> str:
    """Return numbers of experts with their shares of the uses, as `3 (41%), 0 (22%)`."""
    most = [pair for pair in Counter(dict(enumerate(uses))).most_common(_SHOWN_EXPERTS) if pair[1]]
    return ", ".join(f"{expert} ({count / sum(uses):.0%})" for expert, count in most) or "-"


def _totals(report: ExpertReport) -> Iterator[str]:
    """Yield the lines below the table: the experts at each place, the tokens, the loads."""
    counts = Counter(chain(*report.tiers))
    places = []
    for tier in report.tiers_used:
        slots = f" of {report.slots[tier]} slots" if tier in report.slots else ""
        places.append(f"{PLACES[tier]} {counts[tier]}{slots}")
    yield f"experts  {'   '.join(places)}"
    model = sanitize(" ".join(report.model.split()))
    yield f"model    {model}: {report.tokens:,} tokens in {format_time(report.seconds)}"
    hits = sum(chain(*report.hits))
    misses = sum(chain(*report.misses))
    predictions = f"{report.predictions:,}"
    if report.predictions:
        share = report.right_predictions / report.predictions
        predictions += f", {report.right_predictions:,} right ({share:.0%})"
    yield f"uses     {hits + misses:,}, {_rate(hits, misses, 1)} hits; predictions {predictions}"
    moved = format_size(report.bytes_moved)
    stalled = f"{report.stalled_seconds:,.1f} s"
    if report.tokens:
        moved += f", {format_size(report.bytes_moved // report.tokens)} a token"
    if report.seconds:
        stalled += f", {report.stalled_seconds / report.seconds:.0%} of the run"
    yield f"loaded   {moved}; waited {stalled}"


def _rate(hits: int, misses: int, digits: int) -> str:
    return f"{hits / (hits + misses):.{digits}%}" if hits + misses else "-"
