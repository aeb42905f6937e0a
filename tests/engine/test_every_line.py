"""Ctrl-C at each line of the bookkeeping, which hung with fewer slots than experts."""

import contextlib
import itertools
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from engine_tools import answer

from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts import cache, load_queue, tier
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

PROMPT, TOKENS = [5, 17, 60, 3], 1
WHERE = {module.__file__ for module in (cache, load_queue, tier)}


@contextlib.contextmanager
def ctrl_c_from(first: int, places: Counter[str]) -> Iterator[list[int]]:
    """Press Ctrl-C before a line that is carried out, and yield its number.

    It is the first line from this number on at which Ctrl-C was pressed less than three times. A
    loop's later turns tell nothing new.
    """
    lines, pressed = itertools.count(), list[int]()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in WHERE:
            return None
        if event == "line" and (line := next(lines)) >= first and not pressed:
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if places[place] < 3:
                places[place] += 1
                pressed.append(line)
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


@pytest.mark.slow
def test_after_ctrl_c_between_any_two_lines_the_next_answer_is_right(tiny_model, monkeypatch):
    monkeypatch.setattr(load_queue, "_IDLE_S", 0)  # so that its threads are started again and again

    engine = load_engine(tiny_model, LoadOptions(device="cpu"))
    expected = answer(engine, PROMPT, max_tokens=TOKENS)
    two = MemoryBudget(size=2 * InstalledModel(tiny_model).blueprint.expert.stride)
    engine = load_engine(tiny_model, LoadOptions(device="cpu", host_memory=two))
    assert engine.experts.slots == 2
    places, first = Counter[str](), 0
    while True:
        engine.forget()
        with ctrl_c_from(first, places) as pressed:
            answer(engine, PROMPT, max_tokens=TOKENS)
        if not pressed:
            break
        first = pressed[0] + 1
        engine.forget()
        assert answer(engine, PROMPT, max_tokens=TOKENS) == expected, places
    assert len(places) > 50
