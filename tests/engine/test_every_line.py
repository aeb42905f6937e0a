"""Ctrl-C at each line of the bookkeeping: where there are fewer slots than experts, that hung."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine import generate
from mixchat.experts import cache, fetcher, mover
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

PROMPT, TOKENS = [5, 17, 60, 3], 1
WHERE = {module.__file__ for module in (cache, fetcher, mover)}


@contextlib.contextmanager
def ctrl_c_at(line: int) -> Iterator[list[str]]:
    """Presses Ctrl-C before the line that is the given one of those carried out; where that was."""
    lines, pressed = itertools.count(), list[str]()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in WHERE:
            return None
        if event == "line" and next(lines) == line:
            pressed.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield pressed
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def test_after_ctrl_c_between_any_two_lines_the_next_answer_is_right(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_IDLE_S", 0)  # so that its thread is started again and again

    def answer(engine: generate.Engine) -> list[int]:
        greedy = SamplingOptions(temperature=0)
        return list(engine.generate(PROMPT, sampling=greedy, stop_ids=set(), max_tokens=TOKENS))

    expected = answer(load_engine(tiny_model, LoadOptions(device="cpu")))
    two = MemoryBudget(size=2 * InstalledModel(tiny_model).blueprint.expert.stride)
    engine = load_engine(tiny_model, LoadOptions(device="cpu", host_memory=two))
    assert engine.experts.slots == 2
    for line in itertools.count():
        engine.forget()
        with ctrl_c_at(line) as pressed:
            answer(engine)
        if not pressed:
            break
        engine.forget()
        assert answer(engine) == expected, pressed
    assert line > 200
