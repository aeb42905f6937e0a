"""The openai package as the client of /v1/chat/completions: every field, streaming and not."""

import re

import openai
import pytest
from chat_requests import CHAT, HI, ask, streamed, text_of
from form_bombs import bomb
from raw_http import exchange, request

from mixchat.base.options import SamplingOptions


def ends_of(chunks):
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {c.index: c.finish_reason for c in choices if c.finish_reason is not None}


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
    generated = len("Good day") + 1  # with the stop token
    assert answer.usage.completion_tokens == generated
    assert answer.usage.total_tokens == prompt + generated
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
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (4, len("user: say:abc\n"))
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
        assert answer.usage.completion_tokens == 6
    assert texts == ["7", "8", "9"]


def test_a_seed_is_drawn_for_each_request_and_told(client):
    answers = [ask(client, "say:{seed}") for _ in range(3)]
    assert len({answer.seed for answer in answers}) > 1
    assert all(answer.choices[0].message.content == str(answer.seed) for answer in answers)


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
    assert served.requests[-1].sampling == SamplingOptions(
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
    served = serve(sampling=advised, max_tokens=11)
    with served.openai() as client:
        ask(client, "Hi", seed=1)
        ask(client, "Hi", seed=1, top_p=0.9, max_tokens=5)
    first, second = served.requests
    assert (first.sampling, first.max_tokens) == (
        SamplingOptions(temperature=0.2, top_k=9, repeat_penalty=1.3, seed=1),
        11,
    )
    assert (second.sampling.top_p, second.sampling.temperature, second.max_tokens) == (0.9, 0.2, 5)


def test_log_probabilities_have_openais_shape(client):
    (choice,) = ask(client, "say:aé", logprobs=True, top_logprobs=3).choices
    first, second, _ = choice.logprobs.content  # the stop token comes last
    assert (first.token, first.logprob, first.bytes) == ("a", pytest.approx(-0.5), [97])
    assert (second.token, second.bytes) == ("é", [195, 169])
    assert [top.token for top in first.top_logprobs] == ["a", "</s>"]
    (choice,) = ask(client, "say:a", logprobs=True).choices
    assert choice.logprobs.content[0].top_logprobs == []
    chunks = streamed(client, "say:aé", logprobs=True, top_logprobs=1)
    content = [t for c in chunks for x in c.choices if x.logprobs for t in x.logprobs.content]
    told = [(t.token, [top.token for top in t.top_logprobs]) for t in content]
    assert told[:2] == [("a", ["a"]), ("é", ["é"])]


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
    assert served.prompt == "system: Be brief.\nuser: a\nassistant: b\nuser: cd\n"


def test_an_answer_whose_beginning_comes_last_is_continued(client, served):
    messages = [{"role": "user", "content": "say:one two"}, {"role": "assistant", "content": "one"}]
    client.chat.completions.create(model="scripted", messages=messages)
    assert served.prompt == "user: say:one two\none"


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client):
    answer = ask(client, "say:one").choices[0].message
    messages = [
        {"role": "user", "content": "say:one"},
        answer.model_dump(),
        {"role": "user", "content": "say:two"},
    ]
    again = client.chat.completions.create(model="scripted", messages=messages)
    assert again.choices[0].message.content == "two"


def test_a_wrong_field_is_an_error_of_openais(client, served):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hi", temperature=-1)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    assert caught.value.type == "invalid_request_error"
    assert served.requests == []
    assert served.reports == []


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("size", [5000, 600_000], ids=["in tokens", "in bytes"])
def test_a_prompt_that_is_too_long_has_openais_code(client, size):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x" * size)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_whose_prompt_is_too_long_is_told_no_flags_of_a_chat(client):
    """A chat is told that --overflow could leave out old turns, which a client cannot set."""
    talk = [{"role": role, "content": "x" * 3000} for role in ("user", "assistant")]
    messages = [*talk, {"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match="too long") as caught:
        client.chat.completions.create(model="scripted", messages=messages)
    assert "--overflow" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told_with_the_time_to_come_again(serve, stream):
    served = serve(parallel=1, waiting=0)
    with served.openai() as client, ask(client, "say:a{hang}", stream=True) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, "Hi", stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "queue_full"


def test_more_answers_than_the_server_ever_takes_are_refused_with_the_most_that_it_does(serve):
    """It was told to come again later, for ever."""
    served = serve(parallel=1, waiting=2)
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


def test_no_number_in_an_answer_is_beyond_json(served):
    body = {"messages": [{"role": "user", "content": "say:~"}], "logprobs": True}
    token = exchange(served, request(CHAT, body)).json["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], token["logprob"]) == ("~", -9999.0)  # JSON has no infinity


def test_a_field_without_an_effect_is_named_in_a_header_and_noted_once(lenient):
    for stream in (False, True, False):
        asked = request(CHAT, HI | {"think": True, "stream": stream}, connection="close")
        answer = exchange(lenient, asked)
        assert (answer.status, answer.headers["x-mixchat-ignored"]) == (200, "think")
    assert lenient.notes == ["requests have the field think, which has no effect here"]
    assert "x-mixchat-ignored" not in exchange(lenient, request(CHAT, HI)).headers


def test_a_schema_that_takes_gigabytes_is_refused(serve):
    """It took the server's memory, until the system ended the server."""
    served = serve(compile_form=None, form_seconds=1)
    form = {"type": "json_schema", "json_schema": {"schema": bomb()}}
    refused = exchange(served, request(CHAT, HI | {"response_format": form}))
    assert (refused.status, refused.error["code"]) == (400, "invalid_schema")
    assert re.search(r"the schema (takes more than|needs more|gives no answer)", str(refused.error))
