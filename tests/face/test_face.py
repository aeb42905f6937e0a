"""The face alone lets a program load a model, ask it, and read its answers."""

import doctest
import json
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_tokenizer import write_tokenizer

import mixchat
from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ModelNotFoundError,
    PromptError,
    UsageError,
    short_repr,
)
from mixchat.base.options import LoadOptions
from mixchat.face.arguments import request_of
from mixchat.face.load import check_model
from mixchat.install.models import default_model
from mixchat.text.tool_call import ToolCall

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


def test_a_model_that_a_program_or_a_server_used_is_the_default(directory, tmp_path, monkeypatch):
    """Only a chat's use counted, so that after `serve` a run asked which model to take."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    for name in ("first", "second"):
        shutil.copytree(directory, tmp_path / "models" / name)
    with mixchat.load("first", device="cpu"):
        pass  # it answers nothing
    with pytest.raises(UsageError, match="none has run yet"):
        default_model()
    with mixchat.load("second", device="cpu") as model:
        list(model.chat(QUESTION, max_tokens=2))
    assert default_model() == "second"


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": Fraction(1, 10**400)}, "top_p"),
        ({"temperature": 10**5000}, "temperature has to be 0 or more, not a value of the type int"),
        ({"seed": 3.0}, "seed"),
        ({"temperature": np.array([1, 2])}, "temperature"),
        ({"presence_penalty": 1e39}, "presence_penalty"),
        ({"logit_bias": {1: 1e39}}, "logit_bias of a token has to be between -1000000000 and"),
        ({"logit_bias": np.array(5)}, "logit_bias"),
        ({"stop": np.array(["a", "b"])}, "stop"),
        ({"overflow": np.array(["stop", "drop-oldest"])}, "overflow"),
        ({"sampling": np.array([1, 2])}, "sampling"),
        ({"sampling": {"heat": 1}}, "no option 'heat' of sampling"),
        ({"form": {"type": object}}, "the schema is not JSON"),
        ({"form": {"maximum": math.nan}}, "the schema is not JSON"),
        ({"form": np.array([1, 2])}, "the schema is not JSON"),
        ({"tools": [{"function": {"name": "f", "parameters": {"a": object}}}]}, "not JSON"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "token ids are 0 to 261, not -1"),
        ({"logit_bias": {262: 1.0}}, "token ids"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"think": "yes"}, "think"),
        ({"variables": {"messages": 1}}, "variable"),
        ({"sampling": 5}, "sampling"),
        ({"tools": 5}, "tools"),
        ({"tools": [{}]}, "a tool is"),
        ({"tools": [{"function": {"name": "two words"}}]}, "name"),
        ({"tools": [{"function": {"name": "f"}}] * 2}, "same name"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}, "object"),
    ],
    ids=short_repr,
)
def test_an_option_that_cannot_be_used_is_refused(model, options, message):
    """Some ended in errors of Python or of torch, in the midst of an answer."""
    with pytest.raises(UsageError, match=message):
        model.chat(QUESTION, **options)


@pytest.mark.parametrize("prompt", [[-1], [262], [10**30], ["a"], [None], 5, b"text", {1: 2}])
def test_a_prompt_that_is_neither_text_nor_tokens_is_refused(model, prompt):
    with pytest.raises(UsageError, match="token ids"):
        model.generate(prompt)
    with pytest.raises(UsageError, match="token ids"):
        model.ask(mixchat.Request(prompt=prompt))


def test_numbers_may_be_those_of_another_library(model):
    """A seed of numpy's and a temperature of 1/2 ended in errors of Python and of torch."""
    options = {"top_k": 3, "seed": 1, "max_tokens": 4, "temperature": 0.5, "min_p": 0.25}
    expected = list(model.generate([5, 6], **options, logit_bias={7: 2.0}))[-1].message
    numpys = {name: np.array([value])[0] for name, value in options.items()}
    numpys |= {"temperature": Fraction(1, 2), "min_p": np.float32(0.25)}
    for ids in (np.array([5, 6]), torch.tensor([5, 6]), (np.int64(5), 6), iter([5, 6])):
        *_, end = model.generate(ids, **numpys, logit_bias={np.int64(7): np.float32(2)})
        assert end.message == expected
    earlier = mixchat.Message("assistant", "a", ids=np.array(model.tokenizer.encode("a")))
    assert list(model.chat([*QUESTION, earlier, *QUESTION], max_tokens=1))[-1].reason == "length"


def test_the_largest_amounts_that_are_added_to_logits_leave_them_finite(model):
    """From 1e39 on, torch refused them in the midst of an answer."""
    most = {"presence_penalty": 1e9, "frequency_penalty": -1e9, "logit_bias": {7: 1e9, 8: -1e9}}
    for options in (most, {**most, "frequency_penalty": 1e9, "presence_penalty": -1e9}):
        *_, end = model.generate([5, 6], **options, temperature=1e-5, top_p=0.9, max_tokens=6)
        assert end.stats.generated_tokens == 6


def test_a_model_that_is_closed_says_so(directory):
    model = mixchat.load(directory, device="cpu")
    model.close()
    for use in (model.about, lambda: model.chat(QUESTION), lambda: model.generate("x")):
        with pytest.raises(MixchatError, match="the model is closed"):
            use()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "sage", "content": "x"}],
        ["hello"],
        [mixchat.Message("user", 5)],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, *QUESTION],
        [{"role": "assistant", "content": "", "tool_calls": 5}, *QUESTION],
        [{"role": np.array(["user", "user"]), "content": "x"}],
        [{"role": "assistant", "content": "", "tool_calls": np.array([1, 2])}, *QUESTION],
        [mixchat.Message("assistant", "", calls=(ToolCall("1", "f", "[1]"),)), *QUESTION],
    ],
    ids=str,
)
def test_a_conversation_that_is_none_is_refused(model, messages):
    with pytest.raises(PromptError):
        model.chat(messages)


def test_a_text_is_one_question_and_a_content_may_have_parts(model):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "ll"}]
    questions = ["hell", QUESTION, [{"role": "user", "content": parts}]]
    ends = [list(model.chat(each, temperature=0, max_tokens=3))[-1] for each in questions]
    assert ends[0].message == ends[1].message == ends[2].message


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {}}], ["hell"], [{"type": "text", "text": 5}]]
)
def test_a_content_with_parts_that_are_no_text_is_refused(model, content):
    with pytest.raises(PromptError, match="text alone"):
        model.chat([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("schema", "write form"),
        ("temp", "write temperature"),
        ("max_new_tokens", "write max_tokens"),
        ("system", 'begin the messages with {"role": "system"'),
        ("stream", "iterate over the answer"),
        ("n_ctx", "mixchat.load takes it, as context_size"),
        ("temprature", "did you mean temperature?"),
        ("x", "; there are form, frequency_penalty"),
    ],
)
def test_an_argument_by_another_library_s_name_is_a_type_error_that_names_ours(model, name, advice):
    """The names stood in a hint, which a traceback does not show."""
    with pytest.raises(TypeError, match=f"there is no argument '{name}'") as raised:
        model.chat("hell", **{name: 1})
    assert advice in str(raised.value)


def test_an_argument_of_loading_by_another_library_s_name_names_ours(directory):
    for name in ("n_ctx", "contextsize"):
        with pytest.raises(TypeError, match=f"no argument '{name}'.* context_size"):
            mixchat.load(directory, **{name: 512})


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("one", "two")]


@pytest.mark.parametrize(
    ("choice", "usable", "must_call"),
    [
        (None, ["one", "two"], False),
        ("auto", ["one", "two"], False),
        ("required", ["one", "two"], True),
        ("two", ["two"], True),
        ({"type": "function", "function": {"name": "two"}}, ["two"], True),
    ],
)
def test_a_tool_choice_is_openai_s_or_the_name_of_a_tool(choice, usable, must_call):
    offer = request_of("Hi", tools=TOOLS, tool_choice=choice).tools
    assert [tool.name for tool in offer.tools] == ["one", "two"]
    assert [tool.name for tool in offer.callable] == usable
    assert offer.must_call == must_call


def test_the_tool_choice_none_offers_no_tool():
    assert request_of("Hi", tools=TOOLS, tool_choice="none").tools is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "three"}, "the name of a tool, not 'three'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "the name of a tool"),
        ({"tools": TOOLS, "tool_choice": 5}, "the name of a tool, not 5"),
        ({"tool_choice": "required"}, "needs tools"),
    ],
)
def test_a_tool_choice_that_cannot_be_met_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        request_of("Hi", **options)


@pytest.mark.parametrize("messages", [None, 5, {"role": "user", "content": "x"}])
def test_messages_that_are_no_list_are_refused(model, messages):
    with pytest.raises(UsageError, match="a text or a list of messages"):
        model.chat(messages)


def test_calls_of_tools_in_a_conversation_are_in_its_prompt(model):
    """Those of a dict were left out in silence."""
    function = {"name": "find", "arguments": '{"city": "Oslo'}
    made = {"id": "1", "type": "function", "function": function}
    whole = mixchat.Message("assistant", "", calls=(ToolCall("1", "find", '{"city": "Oslo"}'),))
    result = {"role": "tool", "tool_call_id": "1", "content": "cut off"}
    counts = []
    for answer in (whole, {"role": "assistant", "content": None, "tool_calls": [made]}):
        *_, end = model.chat([*QUESTION, answer, result], max_tokens=1)
        counts.append(end.stats.prompt_tokens)
    *_, end = model.chat([*QUESTION, {"role": "assistant", "content": ""}, result], max_tokens=1)
    assert counts[0] == counts[1] > end.stats.prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "2"},
        {"context_size": 1.5},
        {"workers": np.array(5)},
        {"least_context": np.array([1, 2])},
        {"device": 0},
        {"device_memory": 5},
        {"workers": "192.168.1.5"},
        {"host_memory": 8e9},
        {"exact_prompts": "yes"},
        {"expert_memory": "8GB"},
        {"memory": "8GB"},
    ],
    ids=str,
)
def test_an_option_of_loading_that_cannot_be_used_is_refused(directory, options):
    """Some ended in errors of Python or of LLVM, after seconds of loading."""
    with pytest.raises(UsageError, match=next(iter(options))):
        mixchat.load(directory, **options)


def test_a_model_is_loaded_from_a_path_and_on_the_cpu_by_its_number(directory):
    with mixchat.load(Path(directory), device="cpu:0", exact_prompts=True) as model:
        assert list(model.generate([5], max_tokens=1))[-1].reason == "length"
    with pytest.raises(UsageError):
        mixchat.load(5)


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


@pytest.mark.parametrize("damaged", ["config.json", "tokenizer.json", "experts-000.safetensors"])
def test_a_damaged_model_is_found_without_being_loaded(installed, tmp_path, damaged):
    directory = Path(shutil.copytree(installed, tmp_path / "model"))
    check_model(directory, LoadOptions())
    file = directory / damaged
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(str(directory))):
        check_model(directory, LoadOptions())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_closed_model_has_no_file_open_although_somebody_keeps_it(load, installed):
    """An unloaded model kept 61 files, so a server with few files could not load it again."""

    def open_files():
        return [file.path for file in psutil.Process().open_files() if installed.name in file.path]

    before = open_files()
    model = load()
    assert len(open_files()) > len(before)
    model.close()
    assert len(open_files()) <= len(before)
