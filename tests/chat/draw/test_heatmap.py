"""The heatmap of the experts, in terminals of every width, with and without colours."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.style import Style

from mixchat.chat.draw.heatmap import LEVEL_NAMES, STYLES, Heatmap, drawn
from mixchat.engine.report import ExpertReport

TINY = ExpertReport(
    model="tiny",
    hits=[[3, 0, 7, 5], [0, 0, 0, 0]],
    misses=[[1, 0, 1, 3], [0, 0, 0, 0]],
    tiers=[["device", "disk", "host", "device"], ["disk", "disk", "disk", "device"]],
    slots={"device": 3, "host": 1},
    bytes_moved=4_000_000,
    stalled_seconds=1.5,
    predictions=4,
    right_predictions=3,
    tokens=10,
    seconds=6.0,
)


def report_of(layers: int, experts: int) -> ExpertReport:
    """Expert e of each layer is used e times, and found but once."""
    return replace(
        TINY,
        hits=[[min(e, 1) for e in range(experts)] for _ in range(layers)],
        misses=[[max(e - 1, 0) for e in range(experts)] for _ in range(layers)],
        tiers=[[("device", "host", "disk")[e % 3] for e in range(experts)]] * layers,
    )


def lines(report: ExpertReport, width: int = 80, encoding: str = "utf-8") -> list[str]:
    """Without colours, as in a pipe."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, color_system=None).print(Heatmap(report))
    out.flush()
    return out.buffer.getvalue().decode(encoding).splitlines()


def test_a_tiny_model():
    assert [line.rstrip() for line in lines(TINY)] == [
        "      0     1     2     3     hits",
        "  0   20●    -·   40○   40●    75%",
        "  1    -·    -·    -·    -●      -",
        "cells    % of the layer's uses",
        "experts  ● GPU 3 of 3 slots   ○ RAM 1 of 1 slots   · disk 4",
        "model    tiny: 10 tokens in 6 s",
        "uses     20, 75.0% hits; predictions 4, 3 right (75%)",
        "loaded   4 MB, 400 kB a token; waited 1.5 s, 25% of the run",
    ]


def test_a_second_gpu_has_a_mark_of_its_own():
    tiers = [["device", "other-device", "host", "device"], ["other-device"] * 4]
    report = replace(TINY, tiers=tiers, slots={"device": 3, "other-device": 5, "host": 1})
    for encoding, marks in (("utf-8", "●◐○"), ("ascii", "#%+")):
        first, second, ram = marks
        shown = [line.rstrip() for line in lines(report, encoding=encoding)]
        assert shown[1] == f"  0   20{first}    -{second}   40{ram}   40{first}    75%"
        places = f"{first} GPU 2 of 3 slots   {second} other GPU 5 of 5 slots"
        assert shown[4] == f"experts  {places}   {ram} RAM 1 of 1 slots"


def test_a_run_that_did_nothing_divides_by_nothing():
    nothing = [[0] * 4] * 2
    idle = replace(TINY, hits=nothing, misses=nothing, tokens=0, seconds=0.0, bytes_moved=0)
    idle = replace(idle, stalled_seconds=0.0, predictions=0, right_predictions=0)
    assert [line.rstrip() for line in lines(idle)][-3:] == [
        "model    tiny: 0 tokens in 0 s",
        "uses     0, - hits; predictions 0",
        "loaded   0 bytes; waited 0.0 s",
    ]


@pytest.mark.parametrize("width", [1, 20, 79, 200])
@pytest.mark.parametrize("experts", [1, 8, 60])
def test_no_line_is_wider_than_the_terminal(width, experts):
    assert max(map(len, lines(report_of(3, experts), width))) <= width


def test_many_experts_go_on_below_and_none_is_left_out():
    shown = lines(report_of(64, 128))
    assert shown[0].split() == ["0", "8", "16", "24", "hits"]
    rows = shown[1 : 1 + 64 * 4]
    assert [line[:4] for line in rows[:5]] == ["  0 ", "+32 ", "+64 ", "+96 ", "  1 "]
    cells = "".join(line[4:68] for line in rows[:4])
    # Expert e is used e times, and the mean is 63.5.
    levels = [0] + [1] * 31 + [2] * 19 + [3] * 29 + [4] * 47 + [5]
    assert cells == "".join(f"{level}{'●○·'[e % 3]}" for e, level in enumerate(levels))


def test_colour_tells_the_level_of_use():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="256", no_color=False)
    segments = [s for line in console.render_lines(Heatmap(TINY)) for s in line]
    styles = {s.text.strip(): s.style.bgcolor for s in segments if s.style and s.style.bgcolor}
    assert styles["20●"] == Style.parse(STYLES[3]).bgcolor
    assert styles["40○"] == styles["<2"] == Style.parse(STYLES[4]).bgcolor
    assert set(styles) >= set(LEVEL_NAMES[1:])
    assert not [text for text in styles if text.startswith("-")]


def test_no_color_leaves_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="256").print(Heatmap(TINY))
    assert "\x1b[4" not in out.getvalue()
    assert "\x1b[3" not in out.getvalue()
    assert "mean" not in out.getvalue()  # the legend of the colours


def test_a_models_name_cannot_act_on_the_terminal(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out = io.StringIO()
    shown = drawn(replace(TINY, model="[red]\x1b[2J\nx"), out)
    assert out.getvalue() == ""  # Rich itself would exit at a closed pipe
    assert "model    [red][2J x: 10 tokens" in shown
    assert "\x1b" not in shown
