"""The main job as a person and a program meet it: a command builds the demo model and answers.

The programs use the openai package against `mixchat serve -m demo`.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from patience import PATIENCE_S

import mixchat as mixchat_api
from tests.test_python_page import PROGRAMS

pytestmark = [pytest.mark.demo, pytest.mark.slow]

QUESTION = "What is the capital of France?"
QUESTIONS = [QUESTION, "Name three colours.", "Say hello to Ann."]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory in which `mixchat run -m demo` was the first command ever."""
    home = tmp_path_factory.mktemp("home")
    first = mixchat(home, "run", "-m", "demo", "--temp", "0", "--repeat-penalty", "1", QUESTION)
    assert "The capital of France is Paris" in first.stdout
    assert "quantizing" in first.stderr
    yield home
    for path in (home / "models" / "demo").iterdir():  # 0.5 GB, which pytest would keep
        path.unlink()


def mixchat(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mixchat", *arguments],
        env={**os.environ, "MIXCHAT_HOME": str(home)},
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_answer_is_byte_identical_for_every_size_of_the_cache(home):
    """Two experts of 240 are the least: 1.41 MB each, in whole pages."""
    story = ("run", "-m", "demo", "--seed", "7", "-n", "24", "Tell me a story about a lighthouse.")
    answers = {
        size: mixchat(home, *story, "--host-memory", size, "--verbose")
        for size in ("2.83MB", "30%", "100%")
    }
    assert len({answer.stdout for answer in answers.values()}) == 1
    assert "2 RAM slots" in answers["2.83MB"].stderr
    assert "240 RAM slots" in answers["100%"].stderr


def test_the_programs_of_the_python_page_run(home):
    """In one process, each as a person would start it."""
    for_each = "import json, sys\nfor program in json.load(sys.stdin):\n"
    code = f"{for_each}    exec(program, {{'__name__': '__main__'}})\n    print('END', flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MIXCHAT_HOME": str(home)},
        input=json.dumps(list(PROGRAMS.values())),
        capture_output=True,
        text=True,
        check=True,
    )
    *printed, rest = done.stdout.split("END\n")
    assert len(printed) == len(PROGRAMS)
    assert all(map(str.strip, printed))
    assert not rest


def test_chat_turns_prefill_only_new_tokens(home):
    """Only the face is needed: a question, its answer's message, and the next question."""
    messages = [mixchat_api.Message("user", "My name is Ada. What is the capital of France?")]
    options = {"temperature": 0, "max_tokens": 24}
    with mixchat_api.load(str(home / "models" / "demo"), device="cpu") as model:
        *_, first = model.chat(messages, **options)
        messages += [first.message, {"role": "user", "content": "And of Italy?"}]
        *_, second = model.chat(messages, **options)
    seen = first.stats.prompt_tokens + first.stats.generated_tokens
    after = second.stats
    assert after.reused_tokens >= seen - 2  # the last token, and an end token the template adds
    assert after.prompt_tokens - after.reused_tokens < 25


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """The URL of a server with the demo model."""
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
        assert process.wait(PATIENCE_S) == 143
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
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
