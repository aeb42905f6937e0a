"""Bodies of any kind of JSON: each is read or refused, and nothing else happens."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.errors import PromptError
from mixchat.base.options import SamplingOptions
from mixchat.serving.requests.body import read_object
from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.completion import read_completion
from mixchat.serving.requests.errors import RequestError, as_request_error, to_json
from mixchat.serving.requests.forms import no_forms
from mixchat.serving.requests.options import Defaults
from tests.serving.web.scripted_service import ScriptedService

SERVICE = ScriptedService()
DEFAULTS = Defaults(SamplingOptions())
GOOD = {
    "model": "scripted",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "prompt": "Hi",
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
    "max_completion_tokens": 5,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
    "tools": [],
    "echo": False,
    "suffix": "",
    "best_of": 2,
}
ONLY = {
    read_chat: {"messages", "logprobs", "top_logprobs", "max_completion_tokens", "tools"},
    read_completion: {"prompt", "echo", "suffix", "best_of"},
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


def read(reader, body):
    return reader(body, SERVICE, DEFAULTS, no_forms)


def error_of(work):
    """The error for the client that `work` ends with, None where it ends well."""
    try:
        work()
    except (RequestError, PromptError) as error:
        return as_request_error(error)
    return None


def good_for(reader):
    other = ONLY[read_completion if reader is read_chat else read_chat]
    return {name: value for name, value in GOOD.items() if name not in other}


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


def test_a_good_body_is_read_whole():
    for reader in (read_chat, read_completion):
        asked = read(reader, good_for(reader))
        assert len(asked.jobs) == 2


@given(st.sampled_from([read_chat, read_completion]), st.data())
def test_a_value_of_a_wrong_type_is_refused_with_its_place(reader, data):
    good = good_for(reader)
    path = data.draw(st.sampled_from([path for path in paths(good) if path]))
    new = data.draw(any_json)
    body = json.loads(json.dumps(replaced(good, path, new)))
    error = error_of(lambda: read(reader, body))
    if error is None:
        return
    assert error.status in (400, 404)
    about = error.body["error"]
    # A prompt may be of the right type, and still be no prompt.
    if about["param"] is None:
        assert path[0] in ("prompt", "messages")
    else:
        # It names the field, one in it, or another one that it does not fit.
        assert about["param"].partition(".")[0].partition("[")[0] in good


@given(st.binary(max_size=60) | any_json.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(data):
    error = error_of(lambda: to_json(read_object(data)))
    assert error is None or (error.status == 400 and str(error).isprintable())


@given(any_json)
def test_what_is_read_is_what_was_sent(value):
    assert read_object(json.dumps({"a": value}).encode()) == {"a": value}
