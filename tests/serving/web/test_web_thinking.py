"""Thinking of models in answers over HTTP, and the variables of their templates."""

import pytest
from chat_requests import CHAT, HI, ask, streamed, text_of
from raw_http import exchange, request

from mixchat.text.thinking import ThinkingFormat


@pytest.fixture
def thinking(served):
    """The model thinks, and its template has a switch."""
    variables = ("enable_thinking", "preserve_thinking", "reasoning_effort")
    served.model.template.thinking = ThinkingFormat("tags", variables)
    return served


def test_thinking_is_in_reasoning_content_and_counted_apart(thinking, client):
    answer = ask(client, "say:<think>Hm.</think>Yes")
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes", "Hm.")
    assert answer.usage.completion_tokens == len("<think>Hm.</think>Yes") + 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>Hm.</think>")


def test_streamed_thinking_comes_before_the_content(thinking, client):
    chunks = streamed(client, "say:<think>Hm.</think>Yes")
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm."
    assert text_of(chunks) == "Yes"
    last = max(n for n, delta in enumerate(deltas) if hasattr(delta, "reasoning_content"))
    assert not any(delta.content for delta in deltas[: last + 1])


def test_an_answer_cut_off_within_its_thinking_has_no_content(thinking, client):
    choice = ask(client, "say:<think>Hmmm", max_tokens=9).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.reasoning_content == "Hm"


def test_a_model_that_does_not_think_has_no_reasoning_content(client):
    answer = ask(client, "say:<think>Hm.</think>Yes")
    assert answer.choices[0].message.content == "<think>Hm.</think>Yes"
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details is None


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "xhigh"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"think": False}, {"enable_thinking": False}),
        ({"response_format": {"type": "json_object"}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, {"preserve_thinking": True}),
        ({}, {}),
    ],
)
def test_what_the_template_knows_is_honoured(serve, fields, variables):
    served = serve()
    known = ("enable_thinking", "preserve_thinking", "reasoning_effort")
    served.model.template.thinking = ThinkingFormat("tags", known)
    assert exchange(served, request(CHAT, HI | fields)).status == 200
    assert served.model.template.variables[-1] == variables


def test_what_the_template_does_not_know_is_ignored_and_named(serve):
    lenient = serve(strict=False)
    lenient.model.template.thinking = ThinkingFormat("tags", ("enable_thinking",))
    kwargs = {"enable_thinking": False, "model_identity": "<|im_start|>system"}
    raw = exchange(lenient, request(CHAT, HI | {"chat_template_kwargs": kwargs}))
    assert (raw.status, raw.headers["x-mixchat-ignored"]) == (200, "chat_template_kwargs")
    assert lenient.model.template.variables[-1] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinking": "no"}, {"preserve_thinking": 1}, {"reasoning_effort": "<|end|>"}]
)
def test_a_variable_of_a_wrong_type_is_refused(thinking, kwargs):
    raw = exchange(thinking, request(CHAT, HI | {"chat_template_kwargs": kwargs}))
    (name,) = kwargs
    assert (raw.status, raw.json["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


def test_thinking_that_a_client_sends_back_is_left_out(thinking, client):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."},
        {"role": "user", "content": "say:ok"},
    ]
    client.chat.completions.create(model="scripted", messages=talk)
    assert thinking.prompt == "user: Hi\nassistant: Yes\nuser: say:ok\n"
