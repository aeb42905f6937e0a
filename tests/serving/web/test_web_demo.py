"""The openai package against `mixchat serve -m demo`: a real model in a real process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

pytestmark = [pytest.mark.demo, pytest.mark.slow]
HANGS = 300  # seconds
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Say hello to Ann."]


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
    messages = [{"role": "user", "content": QUESTIONS[number]}]
    return client.chat.completions.create(
        **{"model": "demo", "messages": messages, "seed": number, "max_tokens": 24} | options
    )


def test_it_answers_a_question(client):
    answer = ask(client, 0, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


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


def test_an_answer_has_the_form_that_is_asked_for(client):
    done = ask(client, 1, response_format=BY_SCHEMA, n=2, max_tokens=300)
    for choice in done.choices:
        answer = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(answer) == {"name", "legs"}
        assert 0 <= answer["legs"] <= 8


TOOL = {"type": "function", "function": {"name": "describe", "parameters": PERSON}}


def test_a_call_that_is_required_keeps_to_its_schema(client):
    done = ask(client, 2, tools=[TOOL], tool_choice="required", n=2, max_tokens=300)
    for choice in done.choices:
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls:
            assert call.function.name == "describe"
            jsonschema.validate(json.loads(call.function.arguments), PERSON)


def test_an_answer_keeps_to_a_grammar_as_at_the_server_of_llama_cpp(client):
    grammar = 'root ::= "yes" | "no"'
    done = ask(client, 0, extra_body={"grammar": grammar})
    assert done.choices[0].message.content in ("yes", "no")
    with pytest.raises(BadRequestError, match="the grammar cannot be used") as error:
        ask(client, 0, extra_body={"grammar": grammar + " ("})
    assert (error.value.param, error.value.code) == ("grammar", "invalid_grammar")
