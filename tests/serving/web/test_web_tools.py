"""The openai package as the client that calls tools, until there is an answer."""

from __future__ import annotations

import json

import pytest
from raw_http import exchange, request

from mixchat.text.thinking import ThinkingFormat

TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": {
        "type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}}}
    for name, about, argument in (("find", "Find a city", "name"), ("weather", "Weather", "city"))
]  # fmt: skip
FUNCTIONS = {
    # What each function returns is what the scripted model says next.
    "find": lambda name: f"{name} exists say:{call('weather', city='Oslo')}",
    "weather": lambda city: f"rain say:It rains in {city}.",
}


def call(tool, **arguments):
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def whole(client, messages, **options):
    """A message, how it ended, and its calls with their ids, names and arguments."""
    (choice,) = client.chat.completions.create(
        model="scripted", messages=messages, tools=TOOLS, **options
    ).choices
    calls = [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    assert (choice.message.content is None) == (calls != [] and not choice.message.content)
    return choice.message.content or "", choice.finish_reason, calls


def streamed(client, messages, **options):
    content, finish, calls = "", None, {}
    for chunk in client.chat.completions.create(
        model="scripted", messages=messages, tools=TOOLS, stream=True, **options
    ):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for piece in choice.delta.tool_calls or []:
            assert (piece.id is None) == (piece.index in calls) == (piece.function.name is None)
            calls.setdefault(piece.index, [piece.id, piece.function.name, ""])
            calls[piece.index][2] += piece.function.arguments
    assert list(calls) == list(range(len(calls)))
    return content, finish, [tuple(call) for call in calls.values()]


@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_loop_with_two_tools_ends_in_an_answer(client, ask):
    messages = [{"role": "user", "content": f"Rain? say:Let me see. {call('find', name='Oslo')}"}]
    said = []
    while True:
        content, finish, calls = ask(client, messages)
        said.append((content, finish, [(name, json.loads(given)) for _, name, given in calls]))
        if not calls:
            break
        messages.append({"role": "assistant", "content": content or None, "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": given}}
            for id, name, given in calls]})  # fmt: skip
        for id, name, given in calls:
            result = FUNCTIONS[name](**json.loads(given))
            messages.append({"role": "tool", "tool_call_id": id, "content": result})
    assert said == [
        ("Let me see.", "tool_calls", [("find", {"name": "Oslo"})]),
        ("", "tool_calls", [("weather", {"city": "Oslo"})]),
        ("It rains in Oslo.", "stop", []),
    ]


@pytest.mark.parametrize("ask", [whole, streamed])
def test_calls_at_once_have_ids_of_their_own(client, ask):
    script = call("find", name="Rome") + "\n" + call("weather", city='"{}"')
    content, finish, calls = ask(client, [{"role": "user", "content": f"say:{script}"}])
    assert (content, finish) == ("", "tool_calls")
    assert [name for _, name, _ in calls] == ["find", "weather"]
    assert json.loads(calls[1][2]) == {"city": '"{}"'}
    assert len({id for id, *_ in calls}) == 2


@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_call_that_is_cut_off_says_so(client, ask):
    messages = [{"role": "user", "content": f"say:{call('find', name='Rome')}"}]
    content, finish, calls = ask(client, messages, max_tokens=50)
    assert (content, finish) == ("", "length")
    id, name, arguments = calls[0]
    assert arguments.startswith('{"name')
    made = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [made]})
    messages.append({"role": "tool", "tool_call_id": id, "content": "it was cut off say:ok"})
    assert ask(client, messages) == ("ok", "stop", [])


@pytest.mark.parametrize("ask", [whole, streamed])
def test_text_that_looks_like_a_call_is_text_without_tools(client, ask):
    messages = [{"role": "user", "content": f"say:{call('find', name='Rome')}"}]
    content, finish, calls = ask(client, messages, tool_choice="none")
    assert (content, finish, calls) == (call("find", name="Rome"), "stop", [])


def test_thinking_stays_apart_from_calls(served, client):
    served.model.template.thinking = ThinkingFormat("tags")
    script = f"<think>\n{call('weather', city='x')}\n</think>\n\n{call('find', name='Rome')}"
    messages = [{"role": "user", "content": f"say:{script}"}]
    (choice,) = client.chat.completions.create(
        model="scripted", messages=messages, tools=TOOLS
    ).choices
    assert choice.message.reasoning_content == call("weather", city="x")
    assert [c.function.name for c in choice.message.tool_calls] == ["find"]


def test_the_thinking_before_a_call_can_be_sent_back(served, client):
    made = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "1", "content": "say:ok"},
    ]
    assert whole(client, messages) == ("ok", "stop", [])


def test_the_reasoning_before_a_call_is_the_templates_in_responses(served, monkeypatch):
    """Codex sends it back. It was left out, and gpt-oss has to read it until its final answer."""
    seen = []
    template, encode = served.model.template, served.model.template.encode
    monkeypatch.setattr(template, "encode", lambda *a: seen.append(a[0]) or encode(*a))

    def reasoning(text):
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

    def called(id):
        call = {"type": "function_call", "call_id": id, "name": "find", "arguments": "{}"}
        return [call, {"type": "function_call_output", "call_id": id, "output": "found"}]

    said = {"role": "assistant", "content": "I look."}
    items = [{"role": "user", "content": "Hi"}, reasoning("Hm."), said, *called("1")]
    items += [*called("2"), reasoning("So."), *called("3")]
    items += [{"type": "reasoning", "content": None}, {"role": "user", "content": "say:ok"}]
    assert exchange(served, request("/v1/responses", {"input": items})).status == 200
    answers = [message for message in seen[0] if message.role == "assistant"]
    assert [answer.thinking for answer in answers] == ["Hm.", "", "So."]
