"""An answer as its text, as an object, and in asyncio."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator

import mixchat
from mixchat.base.errors import CutOffError, PromptError, ResourceError, UsageError
from mixchat.base.options import AnswerOptions, SamplingOptions
from mixchat.face.arguments import ChatArguments
from mixchat.face.request import Request
from mixchat.text.thinking import ThinkingFormat
from tests.serving.web.scripted_model import scripted_model

HANGS = "say:He{hang}llo"


class Point(BaseModel):
    x: int
    y: int = 0


@dataclasses.dataclass
class Size:
    width: int


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def is_even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number


@pytest.fixture
def model() -> Iterator[Any]:
    with scripted_model() as model:
        yield model


def until_idle(model: Any) -> None:
    """Wait until the model has ended every answer, which happens in its own thread."""
    while model.stats.running or model.stats.waiting:
        model.do(lambda engine: None)


def test_the_text_of_an_answer_is_all_of_it_also_after_some_events(model):
    answer = model.chat("say:Hello")
    assert isinstance(next(answer), mixchat.Reading)
    assert answer.end is None
    assert [answer.text(), answer.text()] == ["Hello", "Hello"]
    assert list(answer) == []
    assert (answer.end.reason, answer.end.stats.generated_tokens) == ("stop", 6)


def test_the_text_of_an_answer_has_no_thinking(model):
    model.template.thinking = ThinkingFormat("tags")
    answer = model.chat("say:<think>hm</think>Hello")
    assert answer.text() == "Hello"
    assert answer.message().thinking == "hm"


def test_an_answer_that_fails_raises_each_time_its_text_is_asked_for(model):
    answer = model.chat("say:He{fail}")
    for _ in range(2):
        with pytest.raises(ResourceError):
            answer.text()


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (Point, '{"x": 1}', Point(x=1)),
        (list[Point], '[{"x": 1, "y": 2}]', [Point(x=1, y=2)]),
        (Size, '{"width": 3}', Size(3)),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
    ],
    ids=str,
)
def test_an_answer_is_read_as_the_type_of_its_form(model, form, text, expected):
    assert model.chat(f"say:{text}", form=form).parsed() == expected


def test_a_class_holds_the_answer_to_its_schema(load):
    class Choice(BaseModel):
        right: bool

    assert load().chat("hell", form=Choice, max_tokens=100).parsed().right in (True, False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 5}, "after 5 tokens: it reached max_tokens, so raise that"),
        ({"stop": ","}, "stop string"),
    ],
)
def test_an_answer_that_was_cut_off_has_no_object(model, options, reason):
    answer = model.chat('say:{"x": 1, "y": 2}', form=Point, **options)
    with pytest.raises(CutOffError, match=reason):
        answer.parsed()


def test_an_answer_against_a_rule_that_no_schema_states_raises_pydantic_s_error(model):
    with pytest.raises(ValidationError, match="odd"):
        model.chat('say:{"number": 3}', form=Even).parsed()


@pytest.mark.parametrize("options", [{}, {"form": "start: /a/"}])
def test_an_answer_without_a_form_of_json_has_no_object(model, options):
    with pytest.raises(UsageError, match="needs a form"):
        model.chat("say:a", **options).parsed()


@pytest.mark.parametrize("form", [threading.Thread, Callable[[], int]])
def test_a_type_that_has_no_schema_is_refused(model, form):
    with pytest.raises(UsageError, match="has no JSON schema"):
        model.chat("Hi", form=form)


def test_type_checkers_know_every_option():
    names = [
        *(each.name for each in dataclasses.fields(Request)),
        *(each.name for each in dataclasses.fields(SamplingOptions)),
        *("tool_choice", "max_rounds"),
    ]
    assert {each.name for each in dataclasses.fields(AnswerOptions)} <= set(names)
    assert ChatArguments.__annotations__.keys() == set(names) - {"messages", "prompt"}


def test_asyncio_gets_the_same_events(model):
    async def events(**options: Any) -> list[Any]:
        return [event async for event in model.achat("say:Hello", **options)]

    expected = list(model.chat("say:Hello", seed=1))
    got = asyncio.run(events(seed=1))
    assert [type(event) for event in got] == [type(event) for event in expected]
    assert got[-1].message == expected[-1].message


def test_asyncio_answers_at_once_and_reads_objects(model):
    async def ask() -> list[Any]:
        texts = (model.achat(f"say:{number}").text() for number in range(3))
        return await asyncio.gather(*texts, model.achat('say:{"x": 5}', form=Point).parsed())

    assert asyncio.run(ask()) == ["0", "1", "2", Point(x=5)]


@pytest.mark.parametrize("leave", ["break", "cancel", "aclose", "drop"])
def test_an_answer_of_asyncio_ends_when_nobody_reads_it_any_longer(model, leave):
    async def ask() -> None:
        if leave == "break":
            async for event in model.achat(HANGS):
                if isinstance(event, mixchat.Piece):
                    break
            return
        answer = model.achat(HANGS)
        while not isinstance(await anext(answer), mixchat.Piece):
            pass
        if leave == "cancel":
            task = asyncio.create_task(answer.text())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        elif leave == "aclose":
            await answer.aclose()
            events = [event async for event in answer]
            assert events[-1].reason == "interrupted"

    asyncio.run(ask())
    until_idle(model)
    assert model.stats.cancelled == 1


def test_an_answer_of_asyncio_that_is_closed_before_it_begins_computes_nothing(model):
    async def ask() -> None:
        answer = model.achat("say:Hello")
        await answer.aclose()
        assert [event async for event in answer] == []
        with pytest.raises(UsageError, match="before it began"):
            await answer.text()

    asyncio.run(ask())
    assert model.engine.requests == []


def test_errors_of_asyncio_s_answers_are_raised_in_their_tasks(model):
    async def ask() -> list[Any]:
        asked = [model.achat("say:{fail}").text(), model.achat("x" * 5000).text()]
        return await asyncio.gather(*asked, model.achat("Hi").text(), return_exceptions=True)

    failed, too_long, text = asyncio.run(ask())
    assert isinstance(failed, ResourceError)
    assert isinstance(too_long, PromptError)
    assert text == "Hello"
    with pytest.raises(TypeError, match="write temperature"):
        model.achat("Hi", temp=1)  # before anything is awaited


def test_a_second_task_that_reads_an_answer_is_refused(model):
    async def ask() -> None:
        answer = model.achat(HANGS)
        first = asyncio.create_task(answer.text())
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="is reading this answer"):
            await anext(answer)
        first.cancel()
        await asyncio.wait([first])

    asyncio.run(ask())


def test_an_answer_outlives_the_loop_that_read_it_without_a_fault(model):
    """The model's thread tells a closed loop of tokens, which must not end the thread."""

    async def begin() -> Any:
        answer = model.achat("say:H{wait}{wait}ello")
        await anext(answer)
        return answer

    answer = asyncio.run(begin())
    until_idle(model)
    assert model.chat("say:Next").text() == "Next"
    del answer


def test_ctrl_c_while_a_text_is_awaited_ends_the_answer(model, monkeypatch):
    """In a shell the traceback kept the answer, which was computed to its end."""

    class Interrupted:
        def put(self, event: Any) -> None: ...

        def get(self) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr("queue.SimpleQueue", {mixchat.face.model_answer._RoundEvent: Interrupted})
    answer = model.chat(HANGS)
    with pytest.raises(KeyboardInterrupt):
        answer.text()
    until_idle(model)
    assert model.stats.cancelled == 1
