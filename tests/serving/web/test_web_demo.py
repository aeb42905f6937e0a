"""The openai package against `mixchat serve -m demo`: a real model in a real process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

pytestmark = [pytest.mark.demo, pytest.mark.slow]
HANGS = 300  # seconds
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Say hello to Ann.",
    "How many legs has a cat?",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The URL of a server whose first command ever this was, with the demo model."""
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-m", "mixchat", "serve", "-m", "demo", "--port", "0", "--queue", "40"],
        env=os.environ | {"MIXCHAT_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "it ended"
            found = re.match(r"(http://\S+): serving demo", line)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANGS) == 143
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(home)  # 0.5 GB, which pytest would keep


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server, api_key="none", max_retries=0, timeout=HANGS) as client:
        yield client


def ask(client, number, **options):
    messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    return client.chat.completions.create(
        **{"model": "demo", "messages": messages, "seed": number, "max_tokens": 24} | options
    )


def post(client, path, **body):
    url = str(client.base_url).replace("v1/", path)
    request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=HANGS) as response:
        return json.load(response)


def test_it_answers_a_question(client):
    answer = ask(client, 0, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_the_tokens_of_an_answer_are_its_text(client):
    (choice,) = ask(client, 1, logprobs=True, top_logprobs=3).choices
    tokens = [token for token in choice.logprobs.content if token.token != "<|im_end|>"]
    assert "".join(token.token for token in tokens) == choice.message.content
    assert bytes(b for token in tokens for b in token.bytes) == choice.message.content.encode()
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_a_bias_of_minus_100_forbids_a_token(client):
    (plain,) = ask(client, 0, temperature=0, logprobs=True).choices
    ids = post(client, "tokenize", content=plain.logprobs.content[0].token)["tokens"]
    biased = ask(client, 0, temperature=0, logit_bias={str(ids[0]): -100}, max_tokens=4)
    assert not biased.choices[0].message.content.startswith(plain.logprobs.content[0].token)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["name", "legs"],
    "additionalProperties": False,
}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": PERSON}}


@pytest.mark.parametrize("number", range(4))
def test_an_answer_has_the_form_that_is_asked_for(client, number):
    done = ask(client, number, response_format=BY_SCHEMA, n=2, max_tokens=300)
    for choice in done.choices:
        answer = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(answer) == {"name", "legs"}
        assert 0 <= answer["legs"] <= 8


TOOL = {"type": "function", "function": {"name": "describe", "parameters": PERSON}}


@pytest.mark.parametrize("number", range(4))
def test_a_call_that_is_required_keeps_to_its_schema(client, number):
    done = ask(client, number, tools=[TOOL], tool_choice="required", n=2, max_tokens=300)
    for choice in done.choices:
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls:
            assert call.function.name == "describe"
            jsonschema.validate(json.loads(call.function.arguments), PERSON)


@pytest.mark.parametrize("grammar", ['root ::= "yes" | "no"', 'start: "yes" | "no"'])
def test_an_answer_keeps_to_a_grammar_as_at_the_server_of_llama_cpp(client, grammar):
    done = ask(client, 0, extra_body={"grammar": grammar})
    assert done.choices[0].message.content in ("yes", "no")
    with pytest.raises(BadRequestError, match="the grammar cannot be used") as error:
        ask(client, 0, extra_body={"grammar": grammar + " ("})
    assert (error.value.param, error.value.code) == ("grammar", "invalid_grammar")


def test_an_answer_of_a_form_is_continued_in_it(client):
    """The beginning that a client sends back counts: the rest alone is no JSON."""
    begun = '{"name": "Cat", "le'
    messages = [
        {"role": "user", "content": "Describe a cat as JSON."},
        {"role": "assistant", "content": begun},
    ]
    done = ask(client, 0, messages=messages, response_format=BY_SCHEMA, max_tokens=300)
    assert json.loads(begun + done.choices[0].message.content)["name"] == "Cat"
