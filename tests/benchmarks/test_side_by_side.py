"""The script that measures llama.cpp beside mixchat; a program plays llama.cpp."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from side_by_side import SideBySide, ratios

from mixchat.bench.rounds import BenchTask

SCRIPTS = sorted(
    path
    for path in Path(__file__).parent.glob("*.py")
    if not path.name.startswith("test_") and "__main__" in path.read_text(encoding="utf-8")
)


class Peer:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def decode(self, context: int, tokens: int) -> float:
        assert tokens == 5
        self.asked.append(("decode", context))
        return 10.0

    def prefill(self, tokens: int) -> float:
        self.asked.append(("prefill", tokens))
        return 100.0


def test_both_are_measured_in_each_round():
    tasks = [BenchTask("decode", 0), BenchTask("decode", 40), BenchTask("prompt", 16)]
    bench: Any = SimpleNamespace(tasks=tasks, run=lambda: iter(tasks * 3))
    peer: Any = Peer()
    both = SideBySide(bench, peer, tokens=5, turns=1)
    assert len(list(both.run())) == 9
    assert peer.asked == [("decode", 0), ("decode", 40), ("prefill", 16)] * 3
    assert both.rates == [[10.0] * 3, [10.0] * 3, [100.0] * 3]


def test_a_ratio_is_that_of_a_round():
    assert ratios([10.0, 20.0, 40.0], [5.0, 20.0, 10.0], turns=1) == [2.0, 1.0, 4.0]
    # Of the same tokens in each turn, in 3 and in 6 seconds.
    assert ratios([1.0, 0.5, 8.0, 8.0], [0.2, 1.0, 4.0, 4.0], turns=2) == [2.0, 2.0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_has_help(path, monkeypatch, capsys):
    """In this process, because each one of its own would import torch again."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert not ending.value.code
    assert capsys.readouterr().out.startswith("usage: ")
