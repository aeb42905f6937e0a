"""The openai package as the client of /v1/chat/completions: every field, streaming and not."""

from __future__ import annotations

import json
import math
import re
import threading

import openai
import pytest
from form_bombs import bomb
from raw_http import exchange, request

from mixchat.base.options import SamplingOptions
from mixchat.serving.requests.forms import forms_of
from mixchat.serving.requests.options import Defaults

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "say:well"}]}


def ask(client, text, **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="scripted", messages=messages, **options)


def streamed(client, text, **options):
    return list(ask(client, text, stream=True, **options))


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def ends_of(chunks):
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {c.index: c.finish_reason for c in choices if c.finish_reason is not None}


@pytest.fixture
def client(served):
    with served.openai() as client:
        yield client


def test_a_whole_answer_has_openais_shape(client):
    answer = ask(client, "Hi say:Good day")
    assert answer.object == "chat.completion"
    assert answer.model == "scripted"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason) == ("Good day", "stop")
    assert choice.logprobs is None
    prompt = len("user: Hi say:Good day\n")
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len("Good day")
    assert answer.usage.total_tokens == prompt + len("Good day")
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_answer_is_the_whole_one_in_pieces(client):
    chunks = streamed(client, "say:Good day")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert text_of(chunks) == "Good day"
    assert ends_of(chunks) == {0: "stop"}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_a_chunk_of_its_own(client):
    *chunks, last = streamed(client, "say:abc", stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (3, len("user: say:abc\n"))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_seeds_one_after_the_other(client, stream):
    if stream:
        chunks = streamed(client, "say:{seed}", n=3, seed=7)
        texts = [text_of(chunks, index) for index in range(3)]
        assert ends_of(chunks) == {0: "stop", 1: "stop", 2: "stop"}
    else:
        answer = ask(client, "say:{seed}", n=3, seed=7)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len("user: say:{seed}\n")
        assert answer.usage.completion_tokens == 3
    assert texts == ["7", "8", "9"]


def test_a_seed_is_drawn_for_each_request_and_told(client):
    answers = [ask(client, "say:{seed}") for _ in range(3)]
    assert len({answer.seed for answer in answers}) > 1
    assert all(answer.choices[0].message.content == str(answer.seed) for answer in answers)
    chunks = streamed(client, "say:{seed}")
    assert text_of(chunks) == str(chunks[0].seed)


@pytest.mark.parametrize(
    ("stop", "text"),
    [("o", "G"), (["ZZ", " d"], "Good"), ([], "Good day"), (["", "y"], "Good da"), (None, None)],
)
def test_stop_strings_end_an_answer(client, stop, text):
    for answer in (
        ask(client, "say:Good day", stop=stop).choices[0].message.content,
        text_of(streamed(client, "say:Good day", stop=stop)),
    ):
        assert answer == (text or "Good day")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_ends_an_answer(client, name):
    (choice,) = ask(client, "say:Good day", **{name: 4}).choices
    assert (choice.message.content, choice.finish_reason) == ("Good", "length")
    chunks = streamed(client, "say:Good day", **{name: 4})
    assert (text_of(chunks), ends_of(chunks)) == ("Good", {0: "length"})


def test_the_options_of_sampling_get_to_the_model(client, served):
    ask(
        client,
        "Hi",
        seed=5,
        temperature=0,
        top_p=0.5,
        presence_penalty=-1.5,
        frequency_penalty=2,
        logit_bias={"65": -100, "66": 1.5},
        extra_body={"top_k": 40, "min_p": 0.1, "repeat_penalty": 1.1},
    )
    assert served.service.jobs[-1].sampling == SamplingOptions(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        repeat_penalty=1.1,
        seed=5,
        presence_penalty=-1.5,
        frequency_penalty=2,
        logit_bias=((65, -100.0), (66, 1.5)),
    )


def test_what_is_not_given_is_the_models_advice(serve):
    advised = SamplingOptions(temperature=0.2, top_k=9, repeat_penalty=1.3)
    served = serve(defaults=Defaults(advised, 11))
    with served.openai() as client:
        ask(client, "Hi", seed=1)
        ask(client, "Hi", seed=1, top_p=0.9, max_tokens=5)
    first, second = served.service.jobs
    assert (first.sampling, first.max_tokens) == (
        SamplingOptions(temperature=0.2, top_k=9, repeat_penalty=1.3, seed=1),
        11,
    )
    assert (second.sampling.top_p, second.sampling.temperature, second.max_tokens) == (0.9, 0.2, 5)


def test_an_answer_ends_after_a_quarter_of_the_context_by_default(client, served):
    ask(client, "Hi")
    ask(client, "Hi", extra_body={"max_tokens": 0})
    assert [job.max_tokens for job in served.service.jobs] == [1000, None]


def test_log_probabilities_have_openais_shape(client):
    (choice,) = ask(client, "say:aé", logprobs=True, top_logprobs=3).choices
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert (second.token, second.bytes) == ("é", [195, 169])
    assert [top.token for top in first.top_logprobs] == ["a", "x", "</s>"]
    assert [top.logprob for top in first.top_logprobs] == [-0.5, -9999.0, -3.0]
    (choice,) = ask(client, "say:a", logprobs=True).choices
    assert choice.logprobs.content[0].top_logprobs == []
    chunks = streamed(client, "say:aé", logprobs=True, top_logprobs=1)
    content = [t for c in chunks for x in c.choices if x.logprobs for t in x.logprobs.content]
    assert [(t.token, [top.token for top in t.top_logprobs]) for t in content] == [
        ("a", ["a"]),
        ("é", ["é"]),
    ]


def test_a_conversation_gets_to_the_template_with_its_roles(client, served):
    client.chat.completions.create(
        model="scripted",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
            {
                "role": "user",
                "name": "Ann",
                "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}],
            },
        ],
    )
    prompt = served.service.tokenizer.decode(served.service.jobs[-1].prompt_ids)
    assert prompt == "system: Be brief.\nuser: a\nassistant: b\nuser: cd\n"


def test_an_answer_whose_beginning_comes_last_is_continued(client, served):
    messages = [
        {"role": "user", "content": "say:one two"},
        {"role": "assistant", "content": "one"},
    ]
    client.chat.completions.create(model="scripted", messages=messages)
    job = served.service.jobs[-1]
    assert served.service.tokenizer.decode(job.prompt_ids) == "user: say:one two\none"
    assert job.continues_prompt  # so that the next word keeps its space


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client):
    answer = ask(client, "say:one").choices[0].message
    messages = [
        {"role": "user", "content": "say:one"},
        answer.model_dump(),
        {"role": "user", "content": "say:two"},
    ]
    again = client.chat.completions.create(model="scripted", messages=messages)
    assert again.choices[0].message.content == "two"


def test_harmless_fields_change_nothing(client):
    answer = ask(
        client,
        "say:one",
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        prompt_cache_key="x",
        safety_identifier="y",
        modalities=["text"],
        reasoning_effort="none",
        tools=[{"type": "function", "function": {"name": "look"}}],
        tool_choice="auto",
        parallel_tool_calls=True,
        extra_body={"functions": [{"name": "look"}], "options": None},
        response_format={"type": "text"},
        stream_options=None,
    )
    assert answer.choices[0].message.content == "one"


REFUSED = [
    ({"tools": [{}], "tool_choice": "required"}, "tool_choice", "unsupported_value"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "unsupported_value"),
    ({"function_call": {"name": "f"}}, "function_call", "unsupported_value"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "invalid_value"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value"),
    ({"store": True}, "store", "unsupported_value"),
    ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
    ({"frobnicate": False}, "frobnicate", "unknown_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"logit_bias": {"65": 101}}, "logit_bias.65", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias.9999999", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"stop": ["a", 5]}, "stop", "invalid_value"),
    ({"stop": ["a"] * 33}, "stop", "invalid_value"),
    ({"stop": "a" * 501}, "stop", "invalid_value"),
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
    ({"grammar": 5}, "grammar", "invalid_value"),
    ({"grammar": "x" * 100_001}, "grammar", None),
    ({"grammar": "root ::=", "response_format": {"type": "text"}}, "grammar", None),
    ({"messages": []}, "messages", "missing_required_parameter"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": "Hi"}, "messages", "invalid_value"),
    ({"messages": ["Hi"]}, "messages[0]", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_value"),
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
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
]


@pytest.mark.parametrize(("change", "param", "code"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_is_refused_by_its_name(client, served, change, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hi", extra_body=change)
    assert caught.value.param == param
    if code is not None:
        assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"].startswith(param)
    assert served.service.jobs == []
    assert served.reports == []


def test_a_conversation_without_a_question_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="must end with a question"):
        client.chat.completions.create(
            model="scripted", messages=[{"role": "assistant", "content": "I"}]
        )


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("size", [5000, 600_000], ids=["in tokens", "in bytes"])
def test_a_prompt_that_is_too_long_has_openais_code(client, size):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x" * size)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told_with_the_time_to_come_again(serve, stream):
    served = serve(parallel=1, queue=0)
    with served.openai() as client, ask(client, "say:a{hang}", stream=True) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, "Hi", stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "queue_full"


def test_all_answers_of_a_request_are_taken_or_none(serve):
    served = serve(parallel=2, queue=1)
    with served.openai() as client, ask(client, "say:a{hang}", stream=True) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError):
            ask(client, "say:{hang}", n=3)
        assert ask(client, "say:well", n=1).choices[0].message.content == "well"


def test_more_answers_than_the_server_ever_takes_are_refused_with_the_most_that_it_does(serve):
    """It was told to come again later, for ever."""
    served = serve(parallel=1, queue=2)
    with served.openai() as client:
        assert len(ask(client, "say:well", n=3).choices) == 3
        with pytest.raises(openai.BadRequestError, match="between 1 and 3, not 4") as caught:
            ask(client, "say:well", n=4)
        assert caught.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="more than 3 answers"):
            client.completions.create(model="scripted", prompt=["a", "b"], n=2)


def test_a_fault_of_the_model_is_an_error_of_the_server(client, served):
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "say:a{fail}")
    assert caught.value.status_code == 503
    assert "there is no memory. Close other programs." in str(caught.value)


def test_a_bug_is_reported_here_and_not_told_to_the_client(client, served):
    for stream in (False, True):
        with pytest.raises(openai.APIError) as caught:
            list(ask(client, "say:a{crash}", stream=stream))
        assert "internal error" in str(caught.value)
        assert "secret" not in str(caught.value)
    assert [str(report) for report in served.reports] == ["a secret of the machine"] * 2


def test_an_error_in_the_midst_of_a_stream_comes_as_an_event(client):
    pieces = []
    with pytest.raises(openai.APIError, match="there is no memory"):
        pieces.extend(ask(client, "say:abc{fail}", stream=True))
    assert text_of(pieces) == "abc"


def test_forty_at_once_of_which_a_third_leaves_get_what_each_gets_alone(serve):
    served = serve(parallel=4, queue=40)
    results: dict[int, str] = {}

    def one(number):
        text = f"say:{{wait}}answer {number} of{{wait}} seed {{seed}}"
        with served.openai() as client:
            if number % 3 == 0:
                with ask(client, f"{text}{{hang}}", stream=True) as stream:
                    next(iter(stream))
                return
            if number % 2:
                found = ask(client, text, seed=number).choices[0].message.content
            else:
                found = text_of(streamed(client, text, seed=number))
            results[number] = found

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = {i: f"answer {i} of seed {i}" for i in range(40) if i % 3}
    assert results == expected
    served.service.close(10)
    assert served.service.stats().running == 0
    assert served.reports == []


def test_no_number_in_an_answer_is_beyond_json(served):
    import urllib.request

    body = {
        "messages": [{"role": "user", "content": "say:ab"}],
        "logprobs": True,
        "top_logprobs": 3,
    }
    request = urllib.request.Request(
        f"{served.url}/v1/chat/completions", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        text = response.read().decode()
    assert "Infinity" not in text
    token = json.loads(text)["choices"][0]["logprobs"]["content"][0]
    assert all(math.isfinite(top["logprob"]) for top in token["top_logprobs"])


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


@pytest.fixture
def lenient(serve):
    """A server as `mixchat serve` starts it without --strict."""
    return serve(defaults=Defaults(SamplingOptions(), strict=False))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_of_another_server_is_ignored_and_named(lenient, name):
    """Each ended in 400, and so did every request of the clients that send them."""
    body = HI | {name: FOREIGN[name]}
    for stream in (False, True, False):
        asked = request(CHAT, body | {"stream": stream}, connection="close")
        answer = exchange(lenient, asked)
        assert (answer.status, answer.headers["x-mixchat-ignored"]) == (200, name)
    assert lenient.notes == [f"requests have the field {name}, which has no effect here"]


def test_a_field_that_asks_for_what_is_done_anyway_is_not_named(lenient):
    usual = {"cache_prompt": True, "think": False, "reasoning_effort": "none", "num_ctx": None}
    answer = exchange(lenient, request(CHAT, HI | usual | {"tools": []}))
    assert answer.status == 200
    assert "x-mixchat-ignored" not in answer.headers


@pytest.mark.parametrize("name", FOREIGN)
def test_a_strict_server_refuses_the_field_of_another_one(served, name):
    answer = exchange(served, request(CHAT, HI | {name: FOREIGN[name]}))
    assert (answer.status, answer.error["param"]) == (400, name)


def test_repetition_penalty_is_the_repeat_penalty(lenient):
    """The name of Hugging Face and of vLLM for what llama.cpp calls repeat_penalty."""
    penalty = {"repetition_penalty": 1.3}
    assert exchange(lenient, request(CHAT, HI | penalty)).status == 200
    assert lenient.service.jobs[-1].sampling.repeat_penalty == 1.3
    differs = exchange(lenient, request(CHAT, HI | penalty | {"repeat_penalty": 1.2}))
    assert (differs.status, differs.error["param"]) == (400, "repetition_penalty")


def test_tools_that_may_be_called_are_named_since_none_is(lenient):
    """They were dropped, and nobody was told."""
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    with lenient.openai() as client:
        raw = client.chat.completions.with_raw_response.create(model="scripted", **HI, **tools)
    assert raw.headers["x-mixchat-ignored"] == "tools"
    assert raw.parse().choices[0].message.content == "well"
    assert lenient.notes == ["requests have the field tools, which has no effect here"]


@pytest.mark.parametrize(("change", "param", "code"), REFUSED[:5], ids=lambda v: str(v)[:60])
def test_what_would_make_another_kind_of_answer_is_always_refused(lenient, change, param, code):
    refused = exchange(lenient, request(CHAT, HI | change))
    assert (refused.status, refused.error["param"], refused.error["code"]) == (400, param, code)


def test_a_schema_that_takes_gigabytes_is_refused(serve):
    """It took the server's memory, until the system ended the server."""
    compile_form = forms_of(serve().service, seconds=1)
    served = serve(state={"compile_form": compile_form})
    form = {"type": "json_schema", "json_schema": {"schema": bomb()}}
    refused = exchange(served, request(CHAT, HI | {"response_format": form}))
    assert (refused.status, refused.error["code"]) == (400, "invalid_schema")
    assert re.search(r"the schema (takes more than 1 s|needs more than 1 GB)", str(refused.error))
