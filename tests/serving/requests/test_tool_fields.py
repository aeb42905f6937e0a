"""Offers of tools: what the model is shown and may do, and what is refused with its place."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.errors import RequestError
from mixchat.text.form.call_form import CallForm
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tool_formats import FORMATS, PLAIN
from tests.serving.web.scripted_model import scripted_model, take_any_form

ASK = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "5"}


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, "description": "x", **more}}


TOOLS = [tool(), tool("g", parameters={"type": "object"}, strict=True)]


@pytest.fixture
def model():
    with scripted_model() as model:
        yield model


def read(model, messages=(ASK,), **fields):
    """The request of a body, its prompt, and the forms that were compiled for it."""
    forms = []

    def compile_form(form, at_end=None):
        forms.append(form)
        return take_any_form(form)

    model.forms.compile = compile_form
    asked = read_chat({"messages": list(messages), **fields}, model, True, ExitStack())
    return asked.requests[0], asked.prompts[0], forms


def prompt(model, *messages, **fields):
    return model.tokenizer.decode(read(model, messages, **fields)[1].ids)


@pytest.mark.parametrize(
    ("fields", "must_call", "names", "parallel"),
    [
        ({}, False, ["f", "g"], True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, False, ["f", "g"], False),
        ({"tool_choice": "required"}, True, ["f", "g"], True),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, True, ["g"], True),
    ],
)
def test_the_choice_decides_what_may_be_called(model, fields, must_call, names, parallel):
    _, made, (form,) = read(model, tools=TOOLS, **fields)
    assert (form.must_call, form.parallel) == (must_call, parallel)
    assert [tool.name for tool in form.tools] == names
    assert (made.tools, form.answer) == (PLAIN, None)
    assert model.tokenizer.decode(made.ids).startswith("f: x\ng: x\nuser: Hi")


def test_nothing_is_offered_if_nothing_may_be_called(model):
    request, made, forms = read(model, tools=TOOLS, tool_choice="none")
    assert (request.tools, made.tools, forms) == (None, None, [])
    assert model.tokenizer.decode(made.ids) == "user: Hi\n"


def test_calls_and_results_are_in_the_prompt(model):
    assert prompt(model, ASK, CALLING, RESULT) == 'user: Hi\nassistant:  f {"a": 1}\ntool: 5\n'


@pytest.mark.parametrize(
    ("came", "arguments"),
    [
        ("", "{}"),
        ('{"a', "{}"),
        ('{"a": ', "{}"),
        ('{"a": "x\\', '{"a": "x"}'),
        ('{"a": [1, {"b": "é', '{"a": [1, {"b": "é"}]}'),
        ('{"a": 1, "b": tr', '{"a": 1}'),
    ],
)
def test_a_call_that_was_cut_off_comes_back_as_far_as_it_came(model, came, arguments):
    """An agent sent it back with an error as its result, and its conversation ended with 400."""
    call = CALL | {"function": {"name": "f", "arguments": came}}
    text = prompt(model, ASK, CALLING | {"tool_calls": [call]}, RESULT)
    assert text == f"user: Hi\nassistant:  f {arguments}\ntool: 5\n"


def test_a_template_without_tools_gets_all_of_it_as_text(model):
    model.template.tools = None
    text = prompt(model, ASK, CALLING, RESULT, tools=TOOLS)
    assert text.startswith("system: You can call functions.")
    assert '{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text
    assert text.endswith("user: <tool_response>\n5\n</tool_response>\n")
    assert read(model, tools=TOOLS)[1].tools == PLAIN


def test_an_answer_of_a_form_may_call_tools(model):
    *_, (form,) = read(model, tools=TOOLS, response_format={"type": "json_object"})
    assert (form.must_call, form.answer) == (True, {"type": "object"})
    required = {"tools": TOOLS, "tool_choice": "required"}
    *_, (form,) = read(model, response_format={"type": "json_object"}, **required)
    assert (form.must_call, form.answer) == (True, None)


def test_an_answer_that_has_to_call_does_not_think(model):
    model.template.thinking = ThinkingFormat("tags", ("enable_thinking",))
    read(model, tools=TOOLS)
    read(model, tools=TOOLS, tool_choice="required")
    assert model.template.variables == [{}, {"enable_thinking": False}]


def test_a_call_of_harmony_has_its_own_channel(model):
    """The prompt of other forms leads into the channel of the answer."""
    model.template.thinking = ThinkingFormat("harmony")
    model.template.tools = FORMATS["harmony"]
    _, made, _ = read(model, tools=TOOLS, tool_choice="required")
    assert made.begun == 0


REFUSED = [
    ({"tool_choice": "always", "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": 5, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "custom"}, "tools": TOOLS}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice.function"),
    ({"tool_choice": {"type": "function", "function": {"name": "h"}}, "tools": TOOLS},
     "tool_choice.function.name"),
    ({"tools": {}}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [tool()] * 129}, "tools"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "grammar"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"messages": [ASK, RESULT]}, "messages[1].tool_call_id"),
    ({"messages": [ASK, CALLING, ASK, RESULT]}, "messages[3].tool_call_id"),
    ({"messages": [ASK, CALLING, RESULT | {"tool_call_id": "2"}]}, "messages[2].tool_call_id"),
    ({"messages": [ASK, CALLING, {"role": "tool", "content": "5"}]}, "messages[2].tool_call_id"),
    ({"messages": [ASK | {"tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [ASK | {"tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [ASK, CALLING]}, "messages[1].tool_calls"),
    ({"messages": [ASK, {"role": "assistant", "content": None}]}, "messages[1].content"),
    ({"messages": [ASK, CALLING | {"tool_calls": [CALL | {"function": {"name": "f"}}]}]},
     "messages[1].tool_calls[0].function.arguments"),
    *(
        ({"messages": [ASK, CALLING | {"tool_calls": [
            CALL | {"function": {"name": "f", "arguments": arguments}}]}]},
         "messages[1].tool_calls[0].function.arguments")
        for arguments in ("[]", "[1", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 9999, "{} {")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused_with_its_place(model, change, param):
    with pytest.raises(RequestError) as error:
        read(model, **{"messages": [ASK]} | change)
    assert (error.value.status, error.value.body["error"]["param"]) == (400, param)
    assert str(error.value).startswith(param)
    assert str(error.value).isprintable()


def test_a_schema_that_cannot_be_kept_is_refused_with_its_tool():
    never = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    body = {"messages": [ASK], "tools": [tool(), tool("g", parameters=never)]}
    with (
        scripted_model(compile_form=None) as model,
        pytest.raises(RequestError, match=r"arguments of g: .* at #/properties/a") as error,
    ):
        read_chat(body, model, True, ExitStack())
    assert error.value.body["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "tools", "code": "invalid_schema",
    }  # fmt: skip


def test_a_form_survives_its_way_into_the_sandbox(model):
    *_, (form,) = read(model, tools=TOOLS, response_format={"type": "json_object"})
    assert CallForm.parse(form.to_text()).to_text() == form.to_text()
    assert json.loads(form.to_text())["tools"][1]["strict"] is True
