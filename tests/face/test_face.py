"""The face alone lets a program load a model, ask it, and read its answers."""

import doctest
import json
import subprocess
import sys
import threading

import pytest
from tiny_tokenizer import write_tokenizer

import mixchat
from mixchat.base.errors import ModelNotFoundError, PromptError, UsageError

QUESTION = [{"role": "user", "content": "hell"}]


@pytest.fixture(scope="module")
def directory(make_checkpoint, install):
    return str(install(write_tokenizer(make_checkpoint(vocab_size=262))))


@pytest.fixture(scope="module")
def model(directory):
    with mixchat.load(directory, device="cpu", parallel=3) as model:
        yield model


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, mixchat.Piece))


def test_an_answer_is_events_and_ends_with_its_counts_and_message(model):
    *events, end = model.chat(QUESTION, temperature=0, max_tokens=5)
    assert isinstance(events[0], mixchat.Reading)
    assert isinstance(end, mixchat.End)
    assert (end.reason, end.stats.generated_tokens) == ("length", 5)
    assert end.stats.prompt_tokens == events[0].total + end.stats.reused_tokens
    assert end.message.content == text_of(events)
    assert len(end.message.ids) == 5


def test_the_next_question_reads_only_what_is_new(model):
    *_, first = model.chat(QUESTION, temperature=0, max_tokens=5)
    follow_up = [*QUESTION, first.message, {"role": "user", "content": "o"}]
    *_, second = model.chat(follow_up, temperature=0, max_tokens=5)
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + 4


def test_a_seed_repeats_an_answer_and_none_draws_one(model):
    ends = [list(model.chat(QUESTION, seed=seed, max_tokens=8))[-1] for seed in (3, 3, None, None)]
    assert ends[0].message == ends[1].message
    assert ends[2].seed != ends[3].seed


def test_a_text_or_ids_are_continued_without_a_template(model):
    ids = model.tokenizer.encode("hello")
    *_, from_ids = model.generate(ids, temperature=0, max_tokens=4)
    assert from_ids.stats.prompt_tokens == len(ids)
    *_, from_text = model.generate("hello", temperature=0, max_tokens=4)
    assert from_text.message.content == from_ids.message.content


def test_an_answer_that_nobody_holds_ends(model):
    answer = model.chat(QUESTION, temperature=0, max_tokens=0)
    next(answer)
    del answer
    before = model.stats.cancelled
    *_, end = model.chat(QUESTION, temperature=0, max_tokens=1)
    assert end.reason == "length"
    assert model.stats.cancelled >= before
    assert model.stats.running == 0


def test_several_threads_ask_at_once_and_get_what_one_gets_alone(model):
    def answer(number):
        events = model.chat([{"role": "user", "content": "x" * number}], seed=1, max_tokens=12)
        answers[number] = text_of(events)

    alone, answers = {}, {}
    for number in range(1, 6):
        answer(number)
    alone, answers = answers, {}
    threads = [threading.Thread(target=answer, args=[number]) for number in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "temprature"),
        ({"top_p": 0}, "top-p"),
        ({"max_tokens": -1}, "max-tokens"),
        ({"tools": [{}]}, "a tool is"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(model, options, message):
    with pytest.raises(UsageError, match=message):
        model.chat(QUESTION, **options)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "sage", "content": "x"}]])
def test_a_conversation_that_is_none_is_refused(model, messages):
    with pytest.raises(PromptError):
        model.chat(messages)


def test_a_schema_holds_the_answer_to_its_form(model):
    form = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    *_, end = model.chat(QUESTION, form=form | {"additionalProperties": False}, max_tokens=60)
    assert json.loads(end.message.content)["a"] in (1, 2)


def test_a_model_that_is_not_installed_is_not_found():
    with pytest.raises(ModelNotFoundError):
        mixchat.load("nothing")


def test_importing_mixchat_loads_nothing_large():
    code = "import mixchat, sys; print({'torch', 'typer', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_example_runs(directory, monkeypatch, capsys):
    """The example of the package's docstring, with a tiny model in place of the demo."""
    load = mixchat.load
    monkeypatch.setattr(mixchat, "load", lambda name, **options: load(directory, context_size=64))
    (example,) = doctest.DocTestFinder(recurse=False).find(mixchat)
    assert example.examples
    for step in example.examples:
        exec(compile(step.source, "example", "exec"), example.globs)
    assert capsys.readouterr().out.split()[-2] in ("length", "stop", "context")
