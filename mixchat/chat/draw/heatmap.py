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
        a_line = _cells_a_line(experts, room // width)
        yield _cropped(_header(width, a_line))
        for layer, uses in enumerate(relative_uses(report)):
            cells = [
                _cell(use, use / experts, marks[tier], width)
                for use, tier in zip(uses, report.tiers[layer], strict=True)
            ]
            rate = _rate(sum(report.hits[layer]), sum(report.misses[layer]), 0)
            yield from map(_cropped, _rows(layer, cells, a_line, rate))
        yield _legend(width, console.color_system is not None and not console.no_color)
        yield _places(report, marks)
        yield Text("\n".join(_totals(report)))


def _cells_a_line(experts: int, fit: int) -> int:
    """Return how many experts go on a line, all if they fit, else a multiple of 8 if possible."""
    if experts <= fit:
        return experts
    return max(fit // 8 * 8 or fit, 1)


def _header(width: int, a_line: int) -> Text:
    """Return the numbers of the experts, only every eighth if cells are too narrow."""
    if width == _NARROW_CELL:
        names = "".join(f"{i:<{8 * width}}" for i in range(0, a_line, 8))
        names = names[: a_line * width].ljust(a_line * width)
    else:
        names = "".join(f"{i:^{width}}" for i in range(a_line))
    return Text(f"{'':{_BEFORE}}{names}{'hits':>{_AFTER}}", style="bold")


def _cell(use: float, share: float, mark: str, width: int) -> tuple[str, str]:
    """Return text and style of a cell. `use` is a multiple of the mean, `share` from 0 to 1."""
    level = bisect_right(BOUNDS, use) + 1 if use else 0
    if width == _NARROW_CELL:
        return f"{level}{mark}", STYLES[level]
    text = f"{share * 100:3.0f}" if use else "  -"
    return f"{text}{mark}".center(width), STYLES[level]


def _rows(layer: int, cells: list[tuple[str, str]], a_line: int, rate: str) -> Iterator[Text]:
    """Yield a layer's line, and lines below it for the experts that do not fit."""
    for start in range(0, len(cells), a_line):
        line = Text(f"{layer:>3} " if start == 0 else f"{'+' + str(start):<{_BEFORE}}")
        line.append_tokens(cells[start : start + a_line])
        yield line.append(f"{rate:>{_AFTER}}") if start == 0 else line


def _legend(width: int, coloured: bool) -> Text:
    if width != _NARROW_CELL:
        line = Text("cells    % of the layer's uses")
        if not coloured:
            return line
        line.append("\ncolours  uses / layer's mean: ")
        names = [f" {name} " for name in LEVEL_NAMES]
    else:
        line = Text("cells    uses / layer's mean: ")
        names = [f" {level} {name} " for level, name in enumerate(LEVEL_NAMES)]
    return line.append_tokens(zip(names, STYLES, strict=True))


def _places(report: ExpertReport, marks: dict[str, str]) -> Text:
    """Return the legend of the marks, with the number of experts at each."""
    counts = Counter(chain(*report.tiers))
    places = []
    for tier in report.tiers_used:
        slots = f" of {report.slots[tier]} slots" if tier in report.slots else ""
        places.append(f"{marks[tier]} {PLACES[tier]} {counts[tier]}{slots}")
    return Text(f"experts  {'   '.join(places)}")


def _totals(report: ExpertReport) -> Iterator[str]:
    model = sanitize(" ".join(report.model.split()))
    yield f"model    {model}: {report.tokens:,} tokens in {format_time(report.seconds)}"
    hits, misses = sum(chain(*report.hits)), sum(chain(*report.misses))
    predictions = f"{report.predictions:,}"
    if report.predictions:
        part = report.right_predictions / report.predictions
        predictions += f", {report.right_predictions:,} right ({part:.0%})"
    yield f"uses     {hits + misses:,}, {_rate(hits, misses, 1)} hits; predictions {predictions}"
    moved, stalled = format_size(report.bytes_moved), f"{report.stalled_seconds:,.1f} s"
    if report.tokens:
        moved += f", {format_size(report.bytes_moved // report.tokens)} a token"
    if report.seconds:
        stalled += f", {report.stalled_seconds / report.seconds:.0%} of the run"
    yield f"loaded   {moved}; waited {stalled}"


def _rate(hits: int, misses: int, digits: int) -> str:
    return f"{hits / (hits + misses):.{digits}%}" if hits + misses else "-"


def _cropped(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "crop"
    return line
