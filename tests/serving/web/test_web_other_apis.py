"""Anthropic's, Ollama's and OpenAI's newer API, each with its own client."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import ClassVar

import anthropic
import ollama
import openai
import pytest
from patience import PATIENCE_S
from raw_http import exchange, request
from scripted_model import take_any_form

from mixchat.face.request import FormError
from mixchat.serving.web.access import Access
from mixchat.text.thinking import ThinkingFormat

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BY_SCHEMA = {"type": "json_schema", "schema": SCHEMA}
OBJECT = {"type": "json_object", "schema": SCHEMA}  # as in llama.cpp
WEATHER = {"name": "weather", "description": "Weather of a city"}
CALL = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLED = {"city": "Oslo"}
THOUGHT = "<think>Hm.</think>Well."


@pytest.fixture
def served(serve):
    served = serve(strict=False)
    served.model.template.thinking = ThinkingFormat("tags", ("enable_thinking",))
    return served


class Client:
    def close(self):
        self.api.close()


class AnthropicClient(Client):
    """A conversation by Anthropic's package: text, thinking, calls, end, counts."""

    tool: ClassVar = {**WEATHER, "input_schema": SCHEMA}
    ends: ClassVar = {"stop": "end_turn", "length": "max_tokens", "call": "tool_use"}

    def __init__(self, served):
        self.api = anthropic.Anthropic(base_url=served.url, api_key="x", max_retries=0)

    def ask(self, messages, *, stream=False, tools=(), system="", limit=200):
        given = {
            "model": "scripted",
            "max_tokens": limit,
            "messages": messages,
            "tools": list(tools),
            "system": [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
        if stream:
            with self.api.messages.stream(**given) as events:
                message = events.get_final_message()
        else:
            message = self.api.messages.create(**given)
        self.last = message
        parts = {block.type: block for block in message.content}
        call = parts.get("tool_use")
        return (
            parts["text"].text if "text" in parts else "",
            parts["thinking"].thinking if "thinking" in parts else "",
            None if call is None else (call.name, call.input),
            message.stop_reason,
            (message.usage.input_tokens > 0, message.usage.output_tokens),
        )

    def with_result(self, messages, text):
        call = next(block for block in self.last.content if block.type == "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": text}
        answer = [block.model_dump(exclude_none=True) for block in self.last.content]
        return [
            *messages,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": [result]},
        ]


class OllamaClient(Client):
    tool: ClassVar = {"type": "function", "function": {**WEATHER, "parameters": SCHEMA}}
    ends: ClassVar = {"stop": "stop", "length": "length", "call": "stop"}

    def __init__(self, served):
        self.api = ollama.Client(host=served.url)

    def ask(self, messages, *, stream=False, tools=(), system="", limit=200):
        said = [{"role": "system", "content": system}] if system else []
        options = {"num_predict": limit, "num_ctx": 100}
        given = {"model": "scripted:latest", "messages": [*said, *messages], "options": options}
        parts = self.api.chat(**given, tools=list(tools), think=True, stream=stream)
        parts = list(parts) if stream else [parts]
        self.last = [part.message for part in parts]
        calls = [call for message in self.last for call in message.tool_calls or ()]
        call = calls[0].function if calls else None
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        return (
            "".join(message.content for message in self.last),
            "".join(message.thinking or "" for message in self.last),
            None if call is None else (call.name, dict(call.arguments)),
            parts[-1].done_reason,
            (parts[-1].prompt_eval_count > 0, parts[-1].eval_count),
        )

    def with_result(self, messages, text):
        content = "".join(message.content for message in self.last)
        calls = next(message.tool_calls for message in self.last if message.tool_calls)
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        return [*messages, answer, {"role": "tool", "tool_name": "weather", "content": text}]


class ResponsesClient(Client):
    tool: ClassVar = {"type": "function", **WEATHER, "parameters": SCHEMA}
    ends: ClassVar = {"stop": "completed", "length": "incomplete", "call": "completed"}

    def __init__(self, served):
        self.api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)

    def ask(self, messages, *, stream=False, tools=(), system="", limit=200):
        given = {
            "model": "scripted",
            "input": messages,
            "instructions": system or None,
            "max_output_tokens": limit,
            "tools": [*tools, {"type": "web_search"}],
        }
        if stream:
            with self.api.responses.stream(**given) as events:
                seen = list(events)
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
            response = seen[-1].response
        else:
            response = self.api.responses.create(**given)
        self.last = response
        items = {item.type: item for item in response.output}
        call, thinking = items.get("function_call"), items.get("reasoning")
        return (
            response.output_text,
            thinking.content[0].text if thinking else "",
            None if call is None else (call.name, self.arguments(call, response.status)),
            response.status,
            (response.usage.input_tokens > 0, response.usage.output_tokens),
        )

    def arguments(self, call, status):
        return json.loads(call.arguments) if status == "completed" else call.arguments

    def with_result(self, messages, text):
        call = next(item for item in self.last.output if item.type == "function_call")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": text}
        said = [item.model_dump(exclude={"parsed_arguments"}) for item in self.last.output]
        return [*messages, *said, result]


@pytest.fixture(params=[AnthropicClient, OllamaClient, ResponsesClient])
def client(request, served):
    with closing(request.param(served)) as client:
        yield client


def question(script):
    return [{"role": "user", "content": f"say:{script}"}]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_its_thinking_its_end_and_its_counts(client, served, stream):
    text, thinking, call, end, counts = client.ask(
        question(THOUGHT), stream=stream, system="Be brief."
    )
    assert (text, thinking, call, end) == ("Well.", "Hm.", None, client.ends["stop"])
    assert counts == (True, len(THOUGHT) + 1)
    assert served.prompt.startswith("system: Be brief.\nuser: say:")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_at_its_limit(client, stream):
    text, _, _, end, counts = client.ask(question("abcdef"), stream=stream, limit=3)
    assert (text, end, counts[1]) == ("abc", client.ends["length"], 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result_lead_to_an_answer(client, served, stream):
    messages = question(CALL)
    text, _, call, end, _ = client.ask(messages, stream=stream, tools=[client.tool])
    assert (text.strip(), call, end) == ("Let me see.", ("weather", CALLED), client.ends["call"])
    messages = client.with_result(messages, "rain say:It rains.")
    text, _, call, end, _ = client.ask(messages, stream=stream, tools=[client.tool])
    assert (text, call, end) == ("It rains.", None, client.ends["stop"])
    prompt = served.prompt
    assert "tool: rain say:It rains." in prompt
    assert 'assistant: Let me see. weather {"city": "Oslo"}' in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cuts_off_is_no_error(client, stream):
    """Its arguments are no whole JSON, which was an internal error."""
    limit = len(CALL) - 20
    *_, call, end, counts = client.ask(
        question(CALL), stream=stream, tools=[client.tool], limit=limit
    )
    assert (end, counts[1]) == (client.ends["length"], limit)
    leaves_out = isinstance(client, OllamaClient)
    # A stream of Anthropic's has begun the block already. Its stop_reason tells.
    leaves_out |= isinstance(client, AnthropicClient) and not stream
    assert (call is None) == leaves_out
    if call is not None:
        messages = client.with_result(question(CALL), "it was cut off say:ok")
        assert client.ask(messages, stream=stream, tools=[client.tool])[0] == "ok"


def test_a_call_that_is_cut_off_is_an_incomplete_item(served):
    """It was "completed", so a client could run it, or send it back and be refused."""
    with closing(ResponsesClient(served)) as client:
        tools = [client.tool]
        for stream in (False, True):
            client.ask(question(CALL), stream=stream, tools=tools, limit=len(CALL) - 20)
            assert [item.status for item in client.last.output] == ["completed", "incomplete"]
            client.ask(question(CALL), stream=stream, tools=tools)
            assert {item.status for item in client.last.output} == {"completed"}
        given = {"model": "scripted", "input": question(CALL), "max_output_tokens": len(CALL) - 20}
        events = list(client.api.responses.create(**given, tools=tools, stream=True))
        done = [event.item.status for event in events if event.type == "response.output_item.done"]
        assert done == ["completed", "incomplete"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_the_midst_of_an_answer_reaches_the_client(client, stream):
    kinds = (anthropic.APIError, ollama.ResponseError, openai.APIError, RuntimeError)
    if stream and isinstance(client, ResponsesClient):
        with client.api.responses.stream(model="scripted", input="say:ab{fail}") as events:
            assert [event.type for event in events][-1] == "response.failed"
        return
    with pytest.raises(kinds, match="there is no memory"):
        client.ask(question("ab{fail}"), stream=stream)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollamas_seed_of_minus_one_is_drawn_by_chance(served, path):
    """Clients that send Ollama's default were refused."""
    asked = {"messages": question("{seed}"), "prompt": "say:{seed}", "stream": False}
    seeds = set()
    for seed in (-1, -1, 7):
        answer = exchange(served, request(path, {**asked, "options": {"seed": seed}})).json
        seeds.add(answer.get("response") or answer["message"]["content"])
    assert len(seeds) == 3
    assert "7" in seeds
    assert "-1" not in seeds
    refused = exchange(served, request(path, {**asked, "options": {"seed": -2}}))
    assert refused.status == 400


def test_an_instruction_after_a_question_belongs_to_it(served):
    messages = [*question("no"), {"role": "system", "content": "say:yes"}]
    body = {"max_tokens": 9, "messages": messages, "system": "S"}
    answer = exchange(served, request("/v1/messages", body)).json["content"]
    assert answer == [{"type": "text", "text": "yes"}]
    assert served.prompt == "system: S\nuser: say:no\n\nsay:yes\n"


def test_anthropic_counts_the_tokens_of_a_request(served):
    with AnthropicClient(served).api as api:
        count = api.messages.count_tokens(model="scripted", messages=question("abc"))
    assert count.input_tokens == len("user: say:abc\n")


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v1/messages", {"messages": question("a")}, 400, "max_tokens is missing"),
        ("/v1/messages", {"max_tokens": 1, "messages": []}, 400, "messages is missing or empty"),
        ("/v1/messages", {"max_tokens": 1, "model": "b", "messages": question("a")}, 404, "'b'"),
        ("/v1/responses", {"input": "a", "previous_response_id": "r"}, 400, "not stored"),
        ("/v1/responses", {"input": [{"type": "image_generation_call"}]}, 400, "input[0].type"),
        ("/v1/responses", {"input": [{"role": "user", "content": [1]}]}, 400, "content[0]"),
        ("/v1/responses", {}, 400, "input"),
        ("/api/chat", {"messages": [{"role": "user", "images": ["x"]}]}, 400, "text alone"),
        ("/api/chat", {"messages": question("a"), "format": "yaml"}, 400, "format"),
        ("/api/generate", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/api/generate", {"prompt": "a", "options": {"top_p": 7}}, 400, "top_p"),
        ("/api/show", {"model": "b"}, 404, "no model 'b'"),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "messages[0].content[0].type has to be 'text'",
        ),
        ("/v1/responses", {"input": [1]}, 400, "input[0] has to be an object, not 1"),
        ("/v1/responses", {"input": 1}, 400, "input has to be a valid list, not 1"),
        ("/v1/responses", {"input": [{"type": []}]}, 400, "input[0].type"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function"}]}, 400, "name"),
        (
            "/v1/responses",
            {"input": [{"type": "function_call", "call_id": 1, "name": "w", "arguments": "{}"}]},
            400,
            "input[0].call_id",
        ),
        ("/api/chat", {"messages": question("a"), "format": 5}, 400, "format has to be"),
        ("/api/chat", {"messages": question("a"), "options": [1]}, 400, "options"),
        ("/api/chat", {"messages": [1] * 20_000}, 400, "20000 items"),
        ("/v1/messages", {"max_tokens": 1, "messages": [1] * 20_000}, 400, "20000 items"),
        (
            "/api/chat",
            {"messages": [*question("a"), {"role": "tool", "tool_name": "f"}]},
            400,
            "messages[1].tool_name names no call",
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": question("a"), "stop_sequences": ["x", 5]},
            400,
            "stop_sequences[1] has to be",
        ),
        ("/api/pull", {"model": "b"}, 404, "no model 'b'"),
        ("/api/generate", {"model": "b", "prompt": ""}, 404, "no model 'b'"),
        ("/api/chat", {"messages": []}, 404, "no model"),
        ("/api/push", {"model": "b"}, 404, "not found"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "text", "schema": {"type": "object"}}}},
            400,
            "text.format.schema",
        ),
        *(
            (path, {"model": "scripted", "input": "a"}, 404, "embedding model")
            for path in ("/v1/embeddings", "/api/embed", "/api/embeddings")
        ),
    ],
)
def test_a_wrong_request_is_refused_in_the_form_of_its_api(served, path, body, status, text):
    response = exchange(served, request(path, body))
    assert response.status == status
    error = response.json["error"]
    message = error if path.startswith("/api/") else error["message"]
    assert text in message
    assert (response.json.get("type") == "error") == (path == "/v1/messages")


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/messages", "output_config.format", {"output_config": {"format": BY_SCHEMA}}),
        ("/v1/responses", "text.format", {"text": {"format": {**BY_SCHEMA, "name": "x"}}}),
        ("/api/chat", "format", {"format": SCHEMA}),
        ("/v1/responses", "tools", {"tools": [ResponsesClient.tool]}),
    ],
)
def test_a_form_that_cannot_be_met_is_an_error_of_the_field_that_was_sent(serve, path, field, body):
    def compile_form(form, at_end=None):
        error = FormError("it cannot be met", hint="Shorten it.")
        error.subject = "tools" if field == "tools" else "schema"
        raise error

    asked = {"input": "a"} if path == "/v1/responses" else {"messages": question("a")}
    served = serve(compile_form=compile_form, strict=False)
    response = exchange(served, request(path, {"max_tokens": 9, **asked, **body}))
    error = response.json["error"]
    message = error if path.startswith("/api/") else error["message"]
    assert (response.status, message) == (400, f"{field}: it cannot be met. Shorten it.")


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_generates_from_a_prompt_chats_or_raw_text(served, stream):
    with closing(OllamaClient(served)) as client:
        for raw, prompt in [(False, "system: S\nuser: say:hi\n"), (True, "say:hi")]:
            parts = client.api.generate("scripted", "say:hi", system="S", raw=raw, stream=stream)
            assert "".join(part.response for part in (parts if stream else [parts])) == "hi"
            assert served.prompt == prompt


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_tells_how_long_the_prompt_and_the_answer_took(served, stream):
    """A whole answer took no time, so a client that divided its tokens by it failed."""
    with closing(OllamaClient(served)) as client:
        for text in ("say:hello", "say:"):
            parts = client.api.generate("scripted", text, stream=stream)
            *_, last = parts if stream else [parts]
            assert last.eval_duration == 1000 * last.eval_count
            assert 0 < last.prompt_eval_duration < last.total_duration


def test_ollama_lists_and_shows_models(served):
    """llm-ollama knows models by their digests, and each of llm's commands failed without one."""
    with closing(OllamaClient(served)) as client:
        (model,) = client.api.list().models
        assert (model.model, len(model.digest)) == ("scripted:latest", 64)
        assert None not in (model.modified_at, model.size)
        assert [model.model for model in client.api.ps().models] == ["scripted:latest"]
        for thinking, more in ((None, []), (ThinkingFormat("tags"), ["thinking"])):
            served.model.template.thinking = thinking
            capabilities = client.api.show("scripted:latest").capabilities
            assert capabilities == ["completion", "tools", *more]
        assert client.api.ps().models[0].expires_at.year > 2200  # it stays loaded
    assert exchange(served, request("/api/version")).json["version"].count(".") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_pulls_a_model_that_is_here(served, stream):
    """Codex pulls the model that it was given, unless its name with the tag is the same."""
    with closing(OllamaClient(served)) as client:
        pulled = client.api.pull("scripted", stream=stream)
        assert [part.status for part in (pulled if stream else [pulled])] == ["success"]
    line = exchange(served, request("/api/pull", {"model": "scripted"})).body
    assert line.endswith(b"\n")  # Codex reads lines


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_an_agent_that_looks_at_an_image_continues_without_it(served, path):
    """Codex offers a tool that returns an image. Its call ended the conversation."""
    image = {"type": "input_image" if path == "/v1/responses" else "image", "image_url": "data:,"}
    if path == "/v1/responses":
        call = {"type": "function_call", "call_id": "a", "name": "view", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "a", "output": [image]}
        body = {"input": [*question("no"), call, result, *question("yes")]}
    else:
        call = {"type": "tool_use", "id": "a", "name": "view", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": [image]}
        said = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        body = {"max_tokens": 9, "messages": [*question("no"), *said, *question("yes")]}
    assert exchange(served, request(path, body)).status == 200
    prompt = served.prompt
    assert "tool: [an image, which this model cannot see]\n" in prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": question("a"), "response_format": OBJECT}),
        ("/v1/completions", {"prompt": "a", "response_format": OBJECT}),
        ("/v1/responses", {"input": "a", "text": {"format": OBJECT}}),
    ],
)
def test_a_schema_of_the_type_json_object_is_followed(serve, path, body):
    """Responses took the schema and ignored it, and the other two refused it."""
    asked = []

    def compile_form(form, at_end=None):
        asked.append(form)
        return take_any_form(form)

    served = serve(compile_form=compile_form)
    assert exchange(served, request(path, body)).status == 200
    assert asked == [SCHEMA]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": question("a"), "grammar": 'root ::= "a"'}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_object"}}}),
        ("/api/generate", {"prompt": "a", "format": "json", "stream": False}),
    ],
)
def test_at_most_two_forms_are_checked_at_once(serve, path, body):
    """A grammar's check is a process, too, but was not counted."""
    running, most, two = set(), [], threading.Barrier(2)

    def compile_form(form, at_end=None):
        running.add(threading.get_ident())
        two.wait(PATIENCE_S)
        time.sleep(0.05)  # in which a third one could come
        most.append(len(running))
        two.wait(PATIENCE_S)
        running.remove(threading.get_ident())
        return take_any_form(form)

    served = serve(compile_form=compile_form)
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: exchange(served, request(path, body)), range(6)))
    assert {response.status for response in responses} == {200}
    assert (len(most), max(most)) == (6, 2)


def test_the_key_of_anthropics_clients_is_taken(serve):
    served = serve(Access(key="secret"))
    body = {"max_tokens": 9, "messages": question("a")}
    for key, status in [("secret", 200), ("wrong", 401)]:
        response = exchange(served, request("/v1/messages", body, x_api_key=key))
        assert (response.status, response.json["type"]) == (
            status,
            "message" if status == 200 else "error",
        )


@pytest.mark.parametrize("headers", [{}, {"origin": "http://evil.example"}])
def test_a_client_that_is_turned_away_gets_the_form_of_its_api(serve, headers):
    served = serve(Access(key="secret"))
    response = exchange(served, request("/api/chat", {}, **headers))
    assert (response.status, type(response.error)) == (403 if headers else 401, str)
