"""Requests: each field is read or refused by its name, whatever the JSON."""

import json
from contextlib import ExitStack

import pytest
from hostile_api_bodies import changed
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixchat.base import errors
from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    PromptError,
    PromptTooLongError,
    ResourceError,
    UsageError,
)
from mixchat.face.request import QueueFullError, ShuttingDownError
from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.errors import RequestError, as_request_error
from mixchat.serving.requests.fields import read_object, to_json
from mixchat.serving.requests.openai import read_completion
from mixchat.serving.web.anthropic import read_counted, read_messages
from mixchat.serving.web.ollama import read_generate, read_ollama_chat
from mixchat.serving.web.openai_responses import read_responses
from tests.serving.web.scripted_model import scripted_model

MODEL = scripted_model()  # which does not answer here
READERS = {
    "/v1/messages": read_messages,
    "/v1/messages/count_tokens": read_counted,
    "/v1/responses": read_responses,
    "/api/chat": read_ollama_chat,
    "/api/generate": read_generate,
}
HI = {"messages": [{"role": "user", "content": "Hi"}]}
SHARED = {
    "model": "scripted",
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "repeat_penalty": 1.1,
    "seed": 1,
    "n": 2,
    "stop": ["a", "b"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "logit_bias": {"5": 1},
    "response_format": {"type": "text"},
}
GOOD = {
    read_chat: SHARED
    | {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "logprobs": True,
        "top_logprobs": 2,
        "max_completion_tokens": 5,
        "tools": [],
    },
    read_completion: SHARED | {"prompt": "Hi", "echo": False, "suffix": "", "best_of": 2},
}
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def read(reader, body, strict=True):
    return reader(body, MODEL, strict, ExitStack())


def error_of(work):
    """The error for the client that `work` ends with, None if it ends well."""
    try:
        work()
    except (RequestError, MixchatError) as error:
        return as_request_error(error)
    return None


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("reader", GOOD)
def test_a_good_body_is_read_whole(reader):
    assert len(read(reader, GOOD[reader]).requests) == 2


@given(st.sampled_from(list(GOOD)), st.data())
def test_a_value_of_a_wrong_type_is_refused_with_its_place(reader, data):
    good = GOOD[reader]
    path = data.draw(st.sampled_from([path for path in paths(good) if path]))
    body = json.loads(json.dumps(replaced(good, path, data.draw(any_json))))
    error = error_of(lambda: read(reader, body))
    if error is None:
        return
    assert error.status in (400, 404)
    param = error.body["error"]["param"]
    # A prompt may be of the right type, and still be no prompt.
    if param is None:
        assert path[0] in ("prompt", "messages")
    else:
        # It names the field, one in it, or another one that it does not fit.
        assert param.partition(".")[0].partition("[")[0] in good


@given(st.binary(max_size=60) | any_json.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(data):
    error = error_of(lambda: to_json(read_object(data)))
    assert error is None or (error.status == 400 and str(error).isprintable())


@given(any_json)
def test_what_is_read_is_what_was_sent(value):
    assert read_object(json.dumps({"a": value}).encode()) == {"a": value}


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), st.booleans())
def test_a_changed_body_of_another_api_is_read_or_refused(random, strict):
    path, body = changed(random, forms=True)
    assume(path in READERS)  # others ask for no answer
    body = read_object(json.dumps(body).encode())
    error = error_of(lambda: read(READERS[path], body, strict))
    assert error is None or error.status in (400, 404)


CHAT_REFUSED = [
    ({"function_call": {"name": "f"}}, "function_call", "unsupported_value"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "invalid_value"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value"),
    ({"store": True}, "store", "unsupported_value"),
    ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
    ({"frobnicate": False}, "frobnicate", "unknown_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_value"),
    ({"logit_bias": {"65": 1.1e9}}, "logit_bias.65", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias.9999999", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"stop": ["a", 5]}, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 33}, "stop", "invalid_value"),
    ({"stop": "a" * 501}, "stop[0]", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"logprobs": 1}, "logprobs", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 10**5}}}},
        "response_format.json_schema.schema",
        None,
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}}},
        "response_format.schema",
        "unknown_parameter",
    ),
    (
        {"response_format": {"type": "json_object", "schema": {"a": "x" * 10**5}}},
        "response_format.schema",
        None,
    ),
    ({"grammar": 5}, "grammar", "invalid_value"),
    ({"grammar": "x" * 100_001}, "grammar", None),
    ({"grammar": "root ::=", "response_format": {"type": "text"}}, "grammar", None),
    ({"messages": []}, "messages", "missing_required_parameter"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": "Hi"}, "messages", "invalid_value"),
    ({"messages": ["Hi"]}, "messages[0]", "invalid_value"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "mood": "y"}]},
        "messages[0].mood",
        "unknown_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        "messages[0].tool_calls[0]",
        "invalid_value",
    ),
]

COMPLETION_REFUSED = [
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": []}, "messages"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, None),
    ({"prompt": ["a", 5]}, "prompt[1]"),
    ({"prompt": [5, "a"]}, "prompt[1]"),
    ({"prompt": [[5, "a"]]}, "prompt[0][1]"),
    ({"prompt": [0x110000]}, "prompt[0]"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": ["a"] * 5, "n": 4}, "prompt"),
]
FOREIGN = {
    "chat_template_kwargs": {"enable_thinking": False},
    "cache_prompt": False,
    "keep_alive": "5m",
    "options": {"num_ctx": 4096},
    "think": True,
    "verbosity": "low",
    "num_ctx": 4096,
    "reasoning_effort": "high",
}


@pytest.mark.parametrize(("change", "param", "code"), CHAT_REFUSED, ids=lambda v: str(v)[:60])
def test_what_a_chat_cannot_do_is_refused_by_its_name(change, param, code):
    error = error_of(lambda: read(read_chat, HI | change, strict="reasoning_effort" in change))
    told = error.body["error"]
    assert (error.status, told["param"], told["type"]) == (400, param, "invalid_request_error")
    assert told["code"] == code or code is None
    assert told["message"].startswith(param)
    assert told["message"].isprintable()


@pytest.mark.parametrize(("change", "param"), COMPLETION_REFUSED, ids=str)
def test_what_a_completion_cannot_do_is_refused_by_its_name(change, param):
    error = error_of(lambda: read(read_completion, {"prompt": "x"} | change))
    assert (error.status, error.body["error"]["param"]) == (400, param)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_of_another_server_is_ignored_and_named_or_refused_if_strict(name):
    """Each ended in 400, and so did every request of the clients that send them."""
    body = HI | {name: FOREIGN[name]}
    assert read(read_chat, body, strict=False).ignored == (name,)
    error = error_of(lambda: read(read_chat, body))
    assert (error.status, error.body["error"]["param"]) == (400, name)


def test_fields_that_change_nothing_are_taken_and_not_named():
    usual = {"cache_prompt": True, "think": False, "reasoning_effort": "none", "num_ctx": None}
    ignored = ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
    harmless = dict.fromkeys(ignored, 1) | {
        "store": False,
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
    }
    assert read(read_chat, HI | usual | harmless, strict=False).ignored == ()


def test_repetition_penalty_is_the_repeat_penalty():
    """The name of Hugging Face and of vLLM for what llama.cpp calls repeat_penalty."""
    body = HI | {"repetition_penalty": 1.3, "repeat_penalty": None}
    assert read(read_chat, body, strict=False).requests[0].sampling.repeat_penalty == 1.3
    error = error_of(lambda: read(read_chat, body | {"repeat_penalty": 1.2}, strict=False))
    assert (error.status, error.body["error"]["param"]) == (400, "repetition_penalty")


def test_null_is_as_not_given():
    nothing = dict.fromkeys([*GOOD[read_chat].keys() - HI.keys(), "frobnicate", "audio"])
    asked = read(read_chat, HI | nothing)
    assert (asked.n, asked.stream, asked.requests[0].max_tokens) == (1, False, None)


def test_a_body_of_many_unknown_fields_is_refused_once():
    body = HI | {f"field{number}": 1 for number in range(10**5)}
    assert error_of(lambda: read(read_chat, body)).body["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("x"), 429, "queue_full"),
        (ShuttingDownError("x"), 503, "shutting_down"),
        (ResourceError("x"), 503, "no_room"),
        (PromptTooLongError("x"), 400, "context_length_exceeded"),
        (PromptError("x"), 400, None),
        (UsageError("the answer cannot be continued in its form"), 400, None),
        (CheckpointError("x"), 500, None),
        (ValueError("x"), 500, None),
        (RequestError("x", status=418), 418, None),
    ],
)
def test_an_error_has_the_status_that_clients_know_it_by(error, status, code):
    explained = as_request_error(error)
    assert explained.status == status
    told = explained.body["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["code"] == code


CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]
ERRORS = [value for value in CLASSES if issubclass(value, MixchatError)]


@pytest.mark.parametrize("error_class", ERRORS)
def test_only_errors_about_a_request_or_memory_are_told_in_their_own_words(error_class):
    """Clients were told the directories of damaged models."""
    told = str(as_request_error(error_class("/home/me/models/a: damaged", hint="In /home/me.")))
    about_request = (PromptError, UsageError, ResourceError)
    assert ("/home/me" in told) == issubclass(error_class, about_request)


def test_the_hint_follows_the_message():
    error = as_request_error(PromptError("it is empty", hint="Write something."))
    assert str(error) == "it is empty. Write something."


def test_json_is_ascii_on_one_line_and_never_nan():
    assert to_json({"a": "\u20ac\n\ud800"}) == rb'{"a":"\u20ac\n\ud800"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json([float("nan")])
