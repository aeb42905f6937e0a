"""The other routes, the headers of every response, and bodies that are not what they should be."""

import json
import subprocess
import time
from types import SimpleNamespace

import openai
import pytest
from patience import PATIENCE_S
from raw_http import exchange, read_response, request

from mixchat.serving.requests import fields as body_reader
from mixchat.serving.requests.fields import read_object
from mixchat.serving.web import anthropic
from mixchat.text.messages import Message
from mixchat.text.tool_formats import in_plain_text

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "say:well"}]}


def test_the_models_are_the_one_that_is_served(served):
    with served.openai() as client:
        (model,) = client.models.list().data
        assert (model.id, model.object, model.owned_by) == ("scripted", "model", "mixchat")
        assert model.context_size == 4000
        assert client.models.retrieve("scripted") == model
    missing = exchange(served, request("/v1/models/org/other"))
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_curl_is_a_client(served):
    command = ["curl", "-sS", "-m", "20", f"{served.url}{CHAT}", "-d", json.dumps(HI)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "well"
    streamed = subprocess.run(
        [*command[:-1], json.dumps(HI | {"stream": True})],
        capture_output=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert streamed.stdout.endswith(b"\n\ndata: [DONE]\n\n")


def test_metrics_are_those_of_the_model(served):
    for text in ("say:a", "say:b", "say:{fail}"):
        exchange(served, request(CHAT, {"messages": [{"role": "user", "content": text}]}))
    response = exchange(served, request("/metrics"))
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.body.decode().splitlines()
    assert "mixchat_requests_finished_total 2" in lines
    assert "mixchat_requests_failed_total 1" in lines
    assert "# TYPE mixchat_expert_hits_total counter" in lines
    assert all(line.startswith(("#", "mixchat_")) for line in lines)


def test_text_is_turned_into_tokens_and_back(served):
    tokens = exchange(served, request("/tokenize", {"content": "Hé"})).json
    assert tokens == {"tokens": [72, 233]}
    assert exchange(served, request("/detokenize", tokens)).json == {"content": "Hé"}
    with_bos = exchange(served, request("/tokenize", {"content": "H", "add_special": True}))
    assert with_bos.json == {"tokens": [1, 72]}


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_tokens_of_a_model_that_is_not_here_are_refused(served, path):
    body = {"content": "a"} if path == "/tokenize" else {"tokens": [97]}
    for name, status in {"scripted": 200, "scripted:latest": 200, "other": 404}.items():
        assert exchange(served, request(path, {"model": name, **body})).status == status


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 8001}, "tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused(served, path, body, param):
    response = exchange(served, request(path, body))
    assert (response.status, response.error["param"]) == (400, param)


def test_every_response_has_an_id_of_our_own_and_is_not_cached(served):
    seen = set()
    for data in (
        request("/health", x_request_id="evil"),
        request("/nowhere"),
        request(CHAT, b"{"),
        request(CHAT, HI),
        request("/health", origin="http://elsewhere"),
    ):
        headers = exchange(served, data).headers
        seen.add(headers["x-request-id"])
        assert headers["cache-control"] == "no-cache"
        assert "server" not in headers
    assert len(seen) == 5
    assert all(identity.startswith("req_") for identity in seen)


def test_a_stream_is_kept_from_the_buffers_of_proxies(served):
    with served.connect() as connection:
        connection.sendall(request(CHAT, HI | {"stream": True}, connection="close"))
        response = read_response(connection)
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("/nowhere"), 404),
        (request("/v1/models/", method="GET"), 404),
        (request("/v1"), 404),
        (request(CHAT), 405),
        (request("/health", method="DELETE"), 405),
        (request("/models", {}), 404),
    ],
)
def test_wrong_paths_and_methods_have_openais_form(served, data, status):
    response = exchange(served, data)
    assert response.status == status
    assert response.error["type"] == "invalid_request_error"
    assert status != 405 or response.headers["allow"]


def test_a_client_of_another_api_is_told_the_path_of_chats(served):
    """OpenAI's client shows the message; it said no more than "not found"."""
    with served.openai() as client, pytest.raises(openai.NotFoundError, match=CHAT):
        client.moderations.create(input="Hi")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a JSON object"),
        (b"null", "a JSON object"),
        (b'"text"', "a JSON object"),
        (b"\xff{}", "not UTF-8: byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"temperature": -Infinity}', "-Infinity is no number"),
        (b'{"temperature": 1e999}', "1e999 is too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"n": 1, "n": 2}', "'n' is given twice"),
        (b'{"messages": [{"role": "a", "role": "b"}]}', "'role' is given twice"),
        (b'{"user": "\\ud800"}', "user has half of a surrogate pair"),
        (b'{"metadata": {"a": ["\\udfff"]}}', "metadata.a[0] has half of a surrogate pair"),
        (b'{"\\ud800": 1}', "a name has half of a surrogate pair"),
        (b'{"metadata": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 levels"),
        (b"[" * 100_000, "more than 64 levels"),
        (b'{"a":' * 100_000, "more than 64 levels"),
    ],
)
def test_a_body_that_no_two_readers_understand_alike_is_refused(served, body, said):
    response = exchange(served, request(CHAT, body))
    assert response.status == 400
    assert said in response.error["message"]
    assert served.reports == []


def test_no_path_is_written_out_for_a_body_without_a_fault(monkeypatch):
    """A name of 500 kB was copied for each of 240,000 items under it: 1 MB took 5 s of a core."""
    monkeypatch.setattr(body_reader, "path_text", None)
    deep = {"a" * 1000: {"b": ["text", 1, {"c": [None, "d"]}]}}
    assert read_object(json.dumps(deep).encode()) == deep


def test_texts_that_are_joined_are_copied_once():
    """Joining 10,000 questions one by one copied 50 GB."""
    questions = [Message("user", "x" * 1000)] * 10_000
    start = time.process_time()
    (joined,) = in_plain_text(questions)
    fields = SimpleNamespace(
        messages=[anthropic._AnthropicMessage(role="user", content="x" * 1000)] * 10_000
    )
    (merged,) = anthropic._messages(fields)
    assert time.process_time() - start < 4  # seconds of computing
    assert len(joined.content) == 1001 * 10_000 - 1
    assert len(merged.content) == 1002 * 10_000 - 2


def test_thinking_that_many_calls_share_counts_for_each_of_them(served):
    """300 kB became a prompt of 200 MB, since each call's message has the thinking before it."""
    thought = {"type": "reasoning", "content": [{"text": "x" * 100_000}]}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    said = [call, {"role": "assistant", "content": "y"}] * 20
    result = {"type": "function_call_output", "call_id": "a", "output": "r"}
    items = [{"role": "user", "content": "a"}, thought, *said, call, result]
    refused = exchange(served, request("/v1/responses", {"input": items}))
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")


def test_a_message_of_ollama_has_no_more_calls_than_another_apis(lenient):
    calls = [{"function": {"name": "f", "arguments": {}}}] * 129
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}]
    refused = exchange(lenient, request("/api/chat", {"messages": messages}))
    assert (refused.status, "129 calls" in refused.json["error"]) == (400, True)


def test_a_compressed_body_is_refused(served):
    response = exchange(served, request(CHAT, b"\x1f\x8b", content_encoding="gzip"))
    assert response.status == 415


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(served):
    with served.connect() as connection:
        connection.sendall(request(CHAT, b"", content_length="100000000", expect="100-continue"))
        response = read_response(connection)
    assert (response.status, response.error["code"]) == (413, "request_too_large")


def test_a_body_of_unknown_length_is_refused_as_soon_as_it_is_too_large(served):
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with served.connect() as connection:
        head = request(CHAT, b"", content_length=None, transfer_encoding="chunked")
        connection.sendall(head)
        for _ in range(30):  # 2 MB, of the 1.5 MB that are read
            connection.sendall(chunk)
        assert read_response(connection).status == 413


def test_a_name_that_a_client_chose_cannot_break_the_message(served):
    body = json.dumps({"a\r\nx: y\x1b[31m\u202e": 1} | HI).encode()
    message = exchange(served, request(CHAT, body)).error["message"]
    assert message.isascii()
    assert message.isprintable()
