"""Functions of Python as tools: schemas, checked arguments, rounds and results."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import mixchat
from mixchat.base.errors import PromptTooLongError, UsageError
from mixchat.face.arguments import request_of
from mixchat.face.functions import PythonTool
from mixchat.text.form.call_form import CallForm
from mixchat.text.tool_formats import PLAIN
from tests.serving.web.scripted_model import scripted_model

UNIT = Literal["C", "F"]


class Place(BaseModel):
    city: str


def weather(city: str, days: Annotated[int, Field(le=7)] = 1, unit: UNIT = "C") -> str:
    """Tell the weather.

    city: its name
    """
    return f"say:{days} days of rain in {city}, {unit}"


async def tide(city: str) -> str:
    """Tell the tide."""
    await asyncio.sleep(0)
    return f"say:high in {city}"


def call_of(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def asking(name: str, **arguments: Any) -> str:
    return f"say:{call_of(name, **arguments)}"


@pytest.fixture
def model() -> Iterator[Any]:
    with scripted_model() as model:
        yield model


def results(events: Any) -> list[str]:
    return [event.text for event in events if isinstance(event, mixchat.ToolResult)]


def test_a_signature_and_its_docstring_are_the_schema_of_a_tool():
    tool = PythonTool(weather).tool
    assert (tool.name, tool.description) == ("weather", "Tell the weather.\n\ncity: its name")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "maximum": 7, "default": 1},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }


def test_a_function_runs_and_the_model_answers_with_its_result(model):
    answer = model.chat(asking("weather", city="Oslo", days="2"), tools=[weather])
    events = list(answer)
    assert results(events) == ["say:2 days of rain in Oslo, C"]
    assert [event for event in events if isinstance(event, mixchat.End)] == [events[-1]]
    assert answer.text() == "2 days of rain in Oslo, C"
    added = answer.messages()
    assert [message.role for message in added] == ["assistant", "tool", "assistant"]
    assert added[1].call_id == added[0].calls[0].id
    assert added[2] == events[-1].message
    follow_up = [{"role": "user", "content": "Weather?"}, *added]
    assert model.chat([*follow_up, {"role": "user", "content": "say:Bye"}]).text() == "Bye"


def test_a_method_and_several_calls_in_one_answer_run_in_their_order(model):
    class Log:
        lines: list[str] = []  # noqa: RUF012

        def write(self, line: str) -> int:
            self.lines.append(line)
            return len(self.lines)

    calls = call_of("write", line="a") + call_of("write", line="b")
    answer = model.chat(f"say:{calls}", tools=[Log().write], max_rounds=1)
    assert results(answer) == ["1", "2"]
    assert Log.lines == ["a", "b"]


def test_arguments_are_converted_to_the_types_of_the_signature(model):
    taken = []

    def visit(place: Place) -> None:
        taken.append(place)

    answer = model.chat(asking("visit", place={"city": "Oslo"}), tools=[visit], max_rounds=1)
    assert results(answer) == ["null"]
    assert taken == [Place(city="Oslo")]


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"city": "Oslo", "days": 9}, "Error: the arguments do not fit. days: Input should be"),
        ({}, "Error: the arguments do not fit. city: Missing required"),
        ({"city": "Oslo", "sun": 1}, "Error: the arguments do not fit. sun: Unexpected"),
    ],
)
def test_arguments_that_do_not_fit_are_told_to_the_model(model, arguments, result):
    (text,) = results(model.chat(asking("weather", **arguments), tools=[weather], max_rounds=1))
    assert text.startswith(result)


def test_an_exception_of_a_function_is_told_to_the_model(model):
    def fail(city: str) -> str:
        raise LookupError(f"no {city}")

    answer = model.chat(asking("fail", city="Oslo"), tools=[fail], max_rounds=1)
    assert results(answer) == ["Error: LookupError: no Oslo"]


def test_ctrl_c_in_a_function_reaches_the_caller_and_ends_the_answer(model):
    def stop() -> str:
        raise KeyboardInterrupt

    answer = model.chat(asking("stop"), tools=[stop])
    with pytest.raises(KeyboardInterrupt):
        answer.text()
    assert [message.content for message in answer.messages()][-1].startswith("Error: the user")
    assert list(answer)[-1].reason == "interrupted"
    assert list(answer) == []


def test_a_result_is_bounded_and_any_value_is_one(model):
    def flood() -> str:
        return "a" * 10**6

    def values() -> Any:
        return {"place": Place(city="Oslo"), "odd": {1}, "other": object}

    with scripted_model(context_size=30_000) as large:
        (text,) = results(large.chat(asking("flood"), tools=[flood], max_rounds=1))
    assert text == f"{'a' * 20_000}\n(cut off: 980,000 more characters)"
    (text,) = results(model.chat(asking("values"), tools=[values], max_rounds=1))
    assert json.loads(text) == {"place": {"city": "Oslo"}, "odd": [1], "other": "<class 'object'>"}


def test_only_the_first_answer_has_to_call_and_the_last_is_offered_no_tool(model):
    """A model that has to call in each round would never answer."""
    offers = []
    make = model.prompt

    def prompt(request: Any) -> Any:
        offers.append(request.tools)
        return make(request)

    model.prompt = prompt
    again = call_of("loop")

    def loop() -> str:
        return f"say:{again}"

    def other() -> None: ...

    options = {"tools": [loop, other], "tool_choice": "loop", "max_rounds": 2}
    answer = model.chat(f"say:{again}", **options)
    assert len(results(answer)) == 2
    assert [offer and (offer.must_call, len(offer.callable)) for offer in offers] == [
        (True, 1),
        (False, 2),
        None,
    ]


def test_results_that_do_not_fit_the_context_raise_each_time_the_text_is_asked_for(model):
    """The second time waited for ever for a round that had not begun."""

    def flood() -> str:
        return "a" * 5000

    answer = model.chat(asking("flood"), tools=[flood])
    later = model.achat(asking("flood"), tools=[flood])
    for _ in range(2):
        with pytest.raises(PromptTooLongError):
            answer.text()
        with pytest.raises(PromptTooLongError):
            asyncio.run(later.text())
    assert list(answer) == []


def test_a_call_of_a_tool_without_a_function_ends_the_answer(model):
    tools = [weather, {"type": "function", "function": {"name": "find"}}]
    *_, end = model.chat(asking("find"), tools=tools)
    assert end.reason == "tool_calls"
    assert [call.name for call in end.message.calls] == ["find"]


def test_a_call_that_was_cut_off_does_not_run_and_is_in_no_message(model):
    """Its message had a call without a result, so the next request was refused by templates."""
    calls = call_of("weather", city="Oslo") + call_of("weather", city="Rome")
    answer = model.chat(f"say:{calls}", tools=[weather], max_tokens=len(calls) - 30)
    assert (answer.text(), answer.end.reason) == ("", "length")
    assert answer.end.message.calls
    assert [message.calls for message in answer.messages()] == [()]


def test_async_functions_run_in_asyncio_and_others_in_a_thread(model):
    threads = []

    def note() -> str:
        threads.append(threading.current_thread())
        return "say:noted"

    async def ask(question: str) -> str:
        return await model.achat(question, tools=[tide, note]).text()

    assert asyncio.run(ask(asking("tide", city="Oslo"))) == "high in Oslo"
    assert asyncio.run(ask(asking("note"))) == "noted"
    assert threads != [threading.main_thread()]
    with pytest.raises(UsageError, match="the tool tide is async: ask with achat"):
        model.chat("Hi", tools=[tide])


def test_an_async_function_that_is_cancelled_ends_the_answer(model):
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def ask() -> None:
        task = asyncio.create_task(model.achat(asking("wait"), tools=[wait]).text())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    assert len(model.engine.requests) == 1


def test_a_seed_repeats_all_rounds(model):
    options = {"tools": [weather]}
    *_, end = model.chat(asking("weather", city="{seed}"), **options)
    seeds = {request.sampling.seed for request in model.engine.requests}
    assert seeds == {end.seed}


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (lambda city: city, "the name of a tool"),
        (print, "the signature of print has no JSON schema"),
        (partial(weather, "Oslo"), "has no __name__"),
    ],
    ids=["lambda", "print", "partial"],
)
def test_a_function_that_can_be_no_tool_is_refused(model, tool, message):
    with pytest.raises(UsageError, match=message):
        model.chat("Hi", tools=[tool])


def test_parameters_without_a_name_or_schema_are_refused(model):
    def by_place(city: str, /) -> None: ...

    def many(*cities: str) -> None: ...

    def typed(lock: threading.Thread) -> None: ...

    for tool, message in ((by_place, "by name"), (many, "by name"), (typed, "no JSON schema")):
        with pytest.raises(UsageError, match=message):
            model.chat("Hi", tools=[tool])


@pytest.mark.parametrize("rounds", [0, -1, True, "2", 1.5])
def test_rounds_that_are_no_number_are_refused(model, rounds):
    with pytest.raises(UsageError, match="max_rounds has to be 1 or more"):
        model.chat("Hi", tools=[weather], max_rounds=rounds)


def test_the_schema_of_a_signature_becomes_a_grammar(load):
    """A parameter's class stands in $defs, to which its schema refers."""

    def visit(place: Place, unit: UNIT = "C", note: str | None = None) -> None: ...

    form = CallForm(PLAIN, [PythonTool(visit).tool, PythonTool(weather).tool], must_call=True)
    constraint = load().forms.compile(form)()
    assert constraint.allowed().any()
    constraint.close()


def test_tools_of_a_request_are_the_functions_and_openai_s(model):
    with pytest.raises(UsageError, match="a tool is"):
        request_of("Hi", tools=[weather])  # a request alone runs nothing
