"""Fields of Anthropic's, Ollama's and OpenAI's newer API that their own clients do not send."""

from __future__ import annotations

import pytest
from raw_http import exchange, request

from mixchat.text.thinking import ThinkingFormat

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CALLED = {"city": "Oslo"}


def question(script):
    return [{"role": "user", "content": f"say:{script}"}]


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}},
            {"enable_thinking": False},
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"enable_thinking": False},
        ),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_anthropics_thinking_and_effort_are_the_templates(serve, fields, variables, strict):
    served = serve(strict=strict)
    names = ("enable_thinking", "reasoning_effort")
    served.model.template.thinking = ThinkingFormat("tags", names)
    body = {"max_tokens": 9, "messages": question("a"), **fields}
    response = exchange(served, request("/v1/messages", body))
    assert (response.status, "x-mixchat-ignored" in response.headers) == (200, False)
    assert served.model.template.variables == [variables]


def test_a_model_with_efforts_alone_always_thinks(lenient):
    lenient.model.template.thinking = ThinkingFormat("harmony", ("reasoning_effort",))
    for thinking in ("enabled", "disabled"):
        body = {"max_tokens": 9, "messages": question("a"), "thinking": {"type": thinking}}
        response = exchange(lenient, request("/v1/messages", body))
        assert (response.status, "x-mixchat-ignored" in response.headers) == (200, False)


def test_open_webui_chats_by_the_name_that_it_was_told(lenient):
    """It adds :latest to a name without a tag, and knew no such model. Its calls have an index."""
    (listed,) = exchange(lenient, request("/api/tags")).json["models"]
    call = {"index": 0, "id": "a", "function": {"name": "weather", "arguments": CALLED}}
    body = {
        "model": listed["model"],
        "messages": [
            *question("no"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "say:yes", "tool_call_id": "a"},
        ],
        "stream": False,
        "options": {"temperature": 0.5, "num_ctx": 2048, "new_topic_penalty": 1},
        "keep_alive": "5m",
        "chat_id": "b",
    }
    response = exchange(lenient, request("/api/chat", body))
    assert (listed["model"], response.json["message"]["content"]) == ("scripted:latest", "yes")
    assert "chat_id" in response.headers["x-mixchat-ignored"]


def test_fields_without_an_effect_are_named(lenient):
    for path, body, named in [
        ("/v1/messages", {"max_tokens": 9, "mcp_servers": [1]}, "mcp_servers"),
        (
            "/api/chat",
            {"keep_alive": "5m", "options": {"mirostat": 1}, "stream": False},
            "keep_alive, options.mir",
        ),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools[0]"),
    ]:
        given = {"input": "say:a"} if "responses" in path else {"messages": question("a")}
        response = exchange(lenient, request(path, {**given, **body}))
        assert (response.status, named in response.headers["x-mixchat-ignored"]) == (200, True)


def test_names_of_fields_cannot_forge_headers_or_notes(lenient):
    """Anthropic's clients may send any field, and the client chooses its name."""
    names = ["a\r\nset-cookie: b", "\x1b[31m", "\U0001f600", "b" * 5000, *map(str, range(1000))]
    body = {"max_tokens": 9, "messages": question("a"), **dict.fromkeys(names, 1)}
    response = exchange(lenient, request("/v1/messages", body))
    named = response.headers["x-mixchat-ignored"]
    assert (response.status, "set-cookie" in response.headers) == (200, False)
    assert (named.isascii(), named.isprintable(), len(named) < 2000) == (True, True, True)
    assert lenient.notes
    assert all(note.isascii() and note.isprintable() for note in lenient.notes)


@pytest.mark.parametrize(("stops", "known"), [(["b"], "b"), (["x", "b"], None)])
def test_anthropics_answer_names_no_stop_sequence_that_it_does_not_know(lenient, stops, known):
    body = {"max_tokens": 9, "messages": question("abc"), "stop_sequences": stops}
    answer = exchange(lenient, request("/v1/messages", body)).json
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", known)
