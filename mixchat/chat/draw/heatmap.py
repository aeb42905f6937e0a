"""Draws the use of the experts in a run, with a row for each layer and a cell for each expert."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mixchat.base.quantities import format_size, format_time
from mixchat.base.sanitize import sanitize
from mixchat.engine.report import PLACES, ExpertReport

# Uses of an expert in multiples of the mean of its layer, which all would have if the router chose
# evenly. A level starts at each bound. Level 0 is for experts that were never used.
BOUNDS = (0.5, 0.8, 1.25, 2.0)
LEVEL_NAMES = ("never", "<0.5", "<0.8", "<1.25", "<2", "2+")
# From dark to bright as in viridis, in colours that differ on a terminal with 16, too.
STYLES = (
    "",
    "color(15) on color(54)",
    "color(15) on color(26)",
    "color(15) on color(30)",
    "color(16) on color(77)",
    "color(16) on color(226)",
)
MARKS = {"device": "●", "other-device": "◐", "host": "○", "worker": "◆", "disk": "·"}
ASCII_MARKS = {"device": "#", "other-device": "%", "host": "+", "worker": "*", "disk": "."}
_BEFORE, _AFTER = 4, 6  # columns for the layer's number and its hit rate
_NARROW_CELL = 2  # columns of a cell that has a level and a mark, and no room for a percentage


def drawn(report: ExpertReport, stream: TextIO) -> str:
    """Return the heatmap as text with the escapes, width and characters that suit `stream`."""
    console = Console(file=stream)
    with console.capture() as capture:  # printing here, Rich would exit at a closed pipe
        console.print(Heatmap(report))
    return capture.get()


def relative_uses(report: ExpertReport) -> list[list[float]]:
    """Return each expert's uses in multiples of its layer's mean, 0 in a layer without any."""
    layers = []
    for hits, misses in zip(report.hits, report.misses, strict=True):
        uses = [hit + miss for hit, miss in zip(hits, misses, strict=True)]
        mean = sum(uses) / len(uses)
        layers.append([use / mean if use else 0.0 for use in uses])
    return layers


class Heatmap:
    """A heatmap for Rich, which fits the width and needs neither colours nor Unicode."""

    def __init__(self, report: ExpertReport) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report, experts = self._report, len(self._report.tiers[0])
        marks = ASCII_MARKS if options.ascii_only else MARKS
        room = options.max_width - _BEFORE - _AFTER
        width = next((width for width in (6, 4) if experts * width <= room), _NARROW_CELL)
        narrow, a_line = width == _NARROW_CELL, room // width  # experts on a line
        # All if they fit, else a multiple of 8, because a narrow header numbers every eighth.
        a_line = experts if experts <= a_line else max(a_line // 8 * 8 or a_line, 1)
        step = 8 if narrow else 1
        names = "".join(
            f"{i:{'<' if narrow else '^'}{step * width}}" for i in range(0, a_line, step)
        )
        names = names[: a_line * width].ljust(a_line * width)
        header = f"{'':{_BEFORE}}{names}{'hits':>{_AFTER}}"
        yield Text(header, style="bold", no_wrap=True, overflow="crop")
        for layer, uses in enumerate(relative_uses(report)):
            cells = list[tuple[str, str]]()  # texts and styles
            for use, tier in zip(uses, report.tiers[layer], strict=True):
                level = bisect_right(BOUNDS, use) + 1 if use else 0
                percent = f"{use / experts * 100:3.0f}" if use else "  -"
                text = str(level) if narrow else percent
                cells.append((f"{text}{marks[tier]}".center(width), STYLES[level]))
            rate = _rate(sum(report.hits[layer]), sum(report.misses[layer]), 0)
            for start in range(0, experts, a_line):
                number = f"{layer:>3} " if start == 0 else f"{f'+{start}':<{_BEFORE}}"
                line = Text(number, no_wrap=True, overflow="crop")
                line.append_tokens(cells[start : start + a_line])
                yield line.append(f"{rate:>{_AFTER}}") if start == 0 else line
        legend = "uses / layer's mean: " if narrow else "% of the layer's uses"
        line = Text(f"cells    {legend}")
        coloured = console.color_system is not None and not console.no_color
        if coloured and not narrow:
            line.append("\ncolours  uses / layer's mean: ")
        if coloured or narrow:
            levels = (
                f"{level} {name}" if narrow else name for level, name in enumerate(LEVEL_NAMES)
            )
            line.append_tokens(
                (f" {name} ", style) for name, style in zip(levels, STYLES, strict=True)
            )
        yield line
        yield Text("\n".join(_totals(report, marks)))


def _totals(report: ExpertReport, marks: dict[str, str]) -> Iterator[str]:
    """Yield the lines below the heatmap: the experts at each place, the tokens, the loads."""
    counts = Counter(chain(*report.tiers))
    places = []
    for tier in report.tiers_used:
        slots = f" of {report.slots[tier]} slots" if tier in report.slots else ""
        places.append(f"{marks[tier]} {PLACES[tier]} {counts[tier]}{slots}")
    yield f"experts  {'   '.join(places)}"
    model = sanitize(" ".join(report.model.split()))
    yield f"model    {model}: {report.tokens:,} tokens in {format_time(report.seconds)}"
    hits, misses = sum(chain(*report.hits)), sum(chain(*report.misses))
    predictions = f"{report.predictions:,}"
    if report.predictions:
        share = report.right_predictions / report.predictions
        predictions += f", {report.right_predictions:,} right ({share:.0%})"
    yield f"uses     {hits + misses:,}, {_rate(hits, misses, 1)} hits; predictions {predictions}"
    moved, stalled = format_size(report.bytes_moved), f"{report.stalled_seconds:,.1f} s"
    if report.tokens:
        moved += f", {format_size(report.bytes_moved // report.tokens)} a token"
    if report.seconds:
        stalled += f", {report.stalled_seconds / report.seconds:.0%} of the run"
    yield f"loaded   {moved}; waited {stalled}"


def _rate(hits: int, misses: int, digits: int) -> str:
    return f"{hits / (hits + misses):.{digits}%}" if hits + misses else "-"
