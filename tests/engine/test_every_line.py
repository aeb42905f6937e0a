"""Ctrl-C at each line of the bookkeeping, which hung with fewer slots than experts."""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from engine_tools import answer

from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts import cache, fetcher, load_queue
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

PROMPT, TOKENS = [5, 17, 60, 3], 1
WHERE = {module.__file__ for module in (cache, fetcher, load_queue)}


@contextlib.contextmanager
def ctrl_c_at(line: int) -> Iterator[list[str]]:
    """Press Ctrl-C before the line of this number that is carried out, and yield its place."""
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


def test_after_ctrl_c_between_any_two_lines_the_next_answer_is_right(tiny_model, monkeypatch):
    monkeypatch.setattr(load_queue, "_IDLE_S", 0)  # so that its threads are started again and again

    engine = load_engine(tiny_model, LoadOptions(device="cpu"))
    expected = answer(engine, PROMPT, max_tokens=TOKENS)
    two = MemoryBudget(size=2 * InstalledModel(tiny_model).blueprint.expert.stride)
    engine = load_engine(tiny_model, LoadOptions(device="cpu", host_memory=two))
    assert engine.experts.slots == 2
    for line in itertools.count():
        engine.forget()
        with ctrl_c_at(line) as pressed:
            answer(engine, PROMPT, max_tokens=TOKENS)
        if not pressed:
            break
        engine.forget()
        assert answer(engine, PROMPT, max_tokens=TOKENS) == expected, pressed
    assert line > 200
