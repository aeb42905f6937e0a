"""A file of prompts: each line is answered as it would be alone, and they keep their order."""

import io
import json
import threading
from typing import Any

import pytest
from patience import PATIENCE_S

from mixchat.base.errors import PromptError
from mixchat.face.model import Model
from mixchat.serving.requests import lines as lines_module
from mixchat.serving.requests.lines import (
    Begin,
    Line,
    LineDefaults,
    answer_lines,
    answered_here,
    numbered_lines,
)


def begin_with(model: Model, **defaults: Any) -> Begin:
    model.advised_tokens = 12
    return answered_here(model, LineDefaults(**defaults))


def answers(
    model: Model, lines: list[Any], at_once: int = 4, **defaults: Any
) -> list[dict[str, Any]]:
    text = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
    lines = answer_lines(enumerate(text, 1), begin_with(model, **defaults), at_once)
    return [line.as_dict() for line in lines]


def test_lines_are_answered_in_their_order_as_each_one_alone(load):
    lines = [
        {"prompt": "Tell me " + "more " * (n % 5), "seed": n, "max_tokens": 1 + 7 * n % 20}
        for n in range(30)
    ]
    together = answers(load(), lines)
    assert [line["line"] for line in together] == list(range(1, 31))
    alone = load(parallel=1)
    for line, found in zip(lines, together, strict=True):
        expected = answers(alone, [line])[0]
        assert (found["answer"], found["seed"]) == (expected["answer"], line["seed"])
        assert found["usage"]["generated_tokens"] <= line["max_tokens"]


def test_a_prompt_is_a_question_and_messages_are_a_conversation(load):
    model = load()
    question = [{"role": "user", "content": "Hi"}]
    one, other = answers(model, [{"prompt": "Hi", "seed": 1}, {"messages": question, "seed": 1}])
    assert one["answer"] == other["answer"]
    with_system = [{"role": "system", "content": "Be brief"}, *question]
    given, own = answers(
        model,
        [{"prompt": "Hi", "seed": 1}, {"messages": with_system, "seed": 1}],
        system="Be brief",
    )
    assert given["answer"] == own["answer"] != one["answer"]


def test_a_line_goes_before_what_applies_to_all(load):
    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "seed": 8}]
    found = answers(load(), lines, fields={"seed": 7})
    assert [line["seed"] for line in found] == [7, 8]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "the line is not JSON"),
        (b"[]", "has to be a JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"prompt": NaN}', "NaN is no number"),
        ({"prompt": 3}, "prompt has to be a string, not 3"),
        ({"prompt": "Hi", "messages": []}, "exclude each other"),
        ({"temperature": 1}, "messages is missing"),
        ({"prompt": "Hi", "temperature": -1}, "temperature has to be 0 or more"),
        ({"prompt": "Hi", "stream": True}, "stream is not for a file"),
        ({"prompt": "Hi", "n": 2}, "n is not for a file"),
        ({"prompt": "Hi", "colour": "red"}, "colour is not a field"),
        ({"prompt": "x" * 200}, "too long"),
        ({"prompt": "x" * 10**7}, "too long"),
    ],
)
def test_a_line_that_cannot_be_answered_says_why_and_stops_no_other(load, line, said):
    good = {"prompt": "Hi", "seed": 1}
    first, bad, last = answers(load(), [good, line, good])
    assert said in bad["error"]
    assert bad["line"] == 2
    assert first["answer"] == last["answer"]


def test_an_id_comes_back_also_with_an_error(load):
    found = answers(load(), [{"id": {"a": [1]}, "prompt": "Hi"}, {"id": "x", "prompt": ""}])
    assert found[0]["id"] == {"a": [1]}
    assert found[1]["id"] == "x"


def test_empty_lines_are_left_out(load):
    found = answers(load(), [b"\n", {"prompt": "Hi"}, b"  \n", {"prompt": "Ho"}])
    assert [line["line"] for line in found] == [2, 4]


def test_an_answer_comes_before_the_next_line_of_a_slow_pipe(load):
    answered = threading.Event()

    def slow():
        yield 1, b'{"prompt": "Hi"}'
        assert answered.wait(PATIENCE_S)
        yield 2, b'{"prompt": "Ho"}'

    found: list[Line] = []
    for line in answer_lines(slow(), begin_with(load()), 4):
        found.append(line)
        answered.set()
    assert [line.number for line in found] == [1, 2]


def test_lines_are_read_a_few_ahead_only(load):
    read: list[int] = []

    def endless():
        for number in range(1, 10**9):
            read.append(number)
            yield number, b'{"prompt": "Hi"}'

    running = answer_lines(endless(), begin_with(load()), 4)
    for _ in range(5):
        next(running)
    assert len(read) <= 5 + 2 * 4 + 1


def test_what_reading_raises_comes_behind_the_lines_before(load):
    def broken():
        yield 1, b'{"prompt": "Hi"}'
        raise OSError("the disk is gone")

    running = answer_lines(broken(), begin_with(load()), 4)
    assert next(running).number == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(running)


class Endless(io.RawIOBase):
    """A file that has the same byte for ever, as /dev/zero; `read` counts what was read of it."""

    read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        buffer[:] = bytes(len(buffer))
        self.read_bytes += len(buffer)
        return len(buffer)


def test_a_line_without_an_end_is_cut_and_given_up(monkeypatch):
    """A line's length was checked after it was read: /dev/zero took 8.8 GB in a minute."""
    monkeypatch.setattr(lines_module, "_MAX_SKIPPED", 3_000_000)
    endless = Endless()
    found = numbered_lines(io.BufferedReader(endless), 100)
    assert next(found) == (1, bytes(101))
    assert endless.read_bytes < 100_000
    with pytest.raises(PromptError, match=r"line 1 has no end within 3 MB"):
        next(found)
    assert endless.read_bytes < 5_000_000


def test_lines_behind_one_that_is_too_long_keep_their_numbers():
    file = io.BytesIO(b"one\n" + b"x" * 3_000_000 + b"\nthree\n\nlast")
    found = list(numbered_lines(file, 10))
    assert found == [(1, b"one\n"), (2, b"x" * 11), (3, b"three\n"), (4, b"\n"), (5, b"last")]
