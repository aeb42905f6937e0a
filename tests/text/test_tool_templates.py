"""Tools and calls in a prompt get the ids of transformers or mistral-common, and forge nothing."""

from __future__ import annotations

import json
import os
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
import tool_texts as texts
from family_texts import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from mistral_texts import VERSIONS, first_generations, their_ids
from text_strategies import anything

from mixchat.base.errors import CheckpointError
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool, ToolCall
from mixchat.text.tool_formats import FORMATS, PLAIN, in_plain_text, tool_format_of

TOOLS = (texts.WEATHER, texts.NOW)
# Some of its names and values are parts of control tokens.
ODD = ToolCall(
    "call00003",
    "now",
    '{"unit": ["it\'s <b>", "turn", true, null], "image": {"Z": "<", "in": 1.5}, "City": "a"}',
)
CASES = {
    "tags": ("qwen3", texts.TAGS, 2),
    "granite": ("granite", texts.GRANITE, 2),
    "harmony": ("gpt-oss", texts.HARMONY, 1),
    "qwen-coder": ("qwen3", texts.QWEN_CODER, 2),
    "gemma": ("gemma4", texts.GEMMA, 2),
    "glm-inline": ("glm-4.7", texts.GLM, 2),
    "lfm": ("lfm2", texts.LFM, 2),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tools")
    return {
        name: FAMILIES[family].write(root / name, source)
        for name, (family, source, _) in CASES.items()
    }


@pytest.fixture(scope="module")
def instruct_v3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("v3")
    build.write_checkpoint(directory, model_file=build.V3_FILE, template=build.MISTRAL_V3)
    return load_template(directory, load_tokenizer(directory))


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["none", "two"])
@pytest.mark.parametrize("name", CASES)
def test_tools_and_calls_get_transformers_ids(name, tools, directories):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directories[name])
    with closing(CheckpointText(directories[name])) as text:
        template = text.template()
        assert template.tools == FORMATS[name]
        talk = texts.conversations(CASES[name][2])
        odd = [Message("user", "Hi"), Message("assistant", "So: ", calls=(ODD,))]
        for messages in (*talk, [*odd, Message("tool", "5", call_id=ODD.id)]):
            assert template.encode(messages, None, tools) == theirs.apply_chat_template(
                texts.as_dicts(messages),
                tools=[tool.to_json() for tool in tools] or None,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )


PUBLISHED = sorted(Path(os.environ.get("MIXCHAT_TEST_TEMPLATES", "/nowhere")).glob("*.jinja"))
_TOKEN = re.compile(r"""<[|/]?[a-zA-Z_"]+\|?>|\[[A-Za-z]*MASK\]""")


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_published_template_gets_transformers_ids(file, tmp_path):
    """Needs a folder of templates, `*.jinja`, in MIXCHAT_TEST_TEMPLATES."""
    from transformers import AutoTokenizer

    source = file.read_text()
    found = sorted({*_TOKEN.findall(source)} - {"<tools>", "</tools>", "<function>"})
    special = ("<bos>", "<eos>", *(token for token in found if token.strip("<>/")[0] in "|["))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    plain = tuple(token for token in found if token not in special)
    family = replace(FAMILIES["qwen3"], special=special, plain=plain, names=names)
    directory = family.write(tmp_path / "x", source)
    theirs = AutoTokenizer.from_pretrained(directory)
    try:
        template: Any = load_template(directory, load_tokenizer(directory))
    except CheckpointError as error:
        pytest.skip(f"needs more than messages: {error}")
    talk = texts.conversations(1 if "<|channel|>" in source else 2)
    shows_calls = template.tools is not None and template._takes_calls
    switch = None if template.thinking is None else template.thinking.switch
    if not template._takes_system:
        talk = [messages[1:] for messages in talk]
    for messages in talk if shows_calls else talk[:1]:
        for tools in ((), TOOLS) if template.tools is not None else ((),):
            for variables in ({}, {switch: True}, {switch: False}) if switch else ({},):
                try:
                    ids = theirs.apply_chat_template(
                        texts.as_dicts(messages),
                        tools=[tool.to_json() for tool in tools] or None,
                        tokenize=True,
                        add_generation_prompt=True,
                        return_dict=False,
                        **variables,
                    )
                except UndefinedError:  # the template itself is broken
                    continue
                assert template.encode(messages, variables, tools) == ids


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["none", "two"])
def test_tools_and_calls_get_mistral_commons_ids(tools, instruct_v3):
    theirs = first_generations(build.V3_FILE)
    assert instruct_v3.tools == FORMATS["mistral"]
    for messages in texts.conversations(2):
        assert instruct_v3.encode(messages, None, tools) == their_ids(theirs, messages, tools)


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["none", "two"])
@pytest.mark.parametrize("version", VERSIONS)
def test_mistrals_later_versions_get_mistral_commons_ids(version, tools, tmp_path):
    """Calls of V11 and later were taken for V3's list, so none was found in an answer."""
    mistral = VERSIONS[version]
    directory = mistral.write(tmp_path / "x")
    template = load_template(directory, load_tokenizer(directory))
    assert template.tools == FORMATS["mistral-ids" if version == "v11" else "mistral-args"]
    assert (template.thinking is not None) == mistral.thinks
    said = ToolCall("call00003", "now", '{"a": "[ARGS]"}')
    thought = Message("assistant", "So:", thinking="[/THINK]", calls=(said,))
    talk = texts.conversations(2)
    for messages in (*talk, [*talk[0], thought, Message("tool", "5", call_id=said.id)]):
        expected = their_ids(mistral.theirs(), messages, tools, thinks=mistral.thinks)
        assert template.encode(messages, None, tools) == expected


def test_a_long_id_of_a_call_becomes_one_that_mistral_takes(instruct_v3):
    one, other = (
        [Message("user", "Hi"),
         Message("assistant", "", calls=(ToolCall(id, "now", "{}"),)),
         Message("tool", "5", call_id=id)]
        for id in ("call_Pj7d0Xl9aVr2", "7c6f2b0e1")
    )  # fmt: skip
    assert len(instruct_v3.encode(one)) > len(instruct_v3.encode([Message("user", "Hi")]))
    shown = [FORMATS["mistral"].with_its_ids(messages) for messages in (one, other)]
    assert shown[0][1].calls[0].id == shown[0][2].call_id
    assert len(shown[0][2].call_id) == 9
    assert list(shown[1]) == other


def test_harmony_gets_the_result_of_each_call_after_it(directories):
    """Its template shows the first call of an answer alone, and takes all results for its own."""
    template = load_template(directories["harmony"], load_tokenizer(directories["harmony"]))
    hi, (first, second) = Message("user", "Hi"), texts.CALLS
    results = [Message("tool", id, call_id=id) for id in ("call00002", "call00001")]
    parted = [
        hi, Message("assistant", "", thinking="Hm.", calls=(second,)), results[0],
        Message("assistant", "", calls=(first,)), results[1],
    ]  # fmt: skip
    both = Message("assistant", "x", thinking="Hm.", calls=(first, second))
    assert template.encode([hi, both, *results], None, TOOLS) == template.encode(
        parted, None, TOOLS
    )


def test_calls_are_an_answers_text_if_the_template_shows_none(tmp_path):
    family = FAMILIES["granite"]
    directory = family.write(tmp_path / "x", texts.GRANITE_WITHOUT_CALLS)
    tokenizer = load_tokenizer(directory)
    template = load_template(directory, tokenizer)
    messages = texts.conversations(1)[1]
    ids = template.encode(messages, None, TOOLS)
    token = tokenizer.control_tokens["<|tool_call|>"]
    shown = tokenizer.decode(ids[len(ids) - ids[::-1].index(token) :])
    assert shown.startswith(f'[{{"name": "get_weather", "arguments": {texts.CALLS[0].arguments}}}]')


strings = st.one_of(anything, st.sampled_from(["im_end", "<|im_end|>", "|>", "tool_call", "end"]))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15)
@given(hostile=st.lists(strings, min_size=6, max_size=6))
def test_nothing_in_tools_or_calls_adds_a_control_token(name, hostile, directories):
    tokenizer = load_tokenizer(directories[name])
    template = load_template(directories[name], tokenizer)

    def controls(words: list[str]) -> list[Any]:
        about, key, value, argument, result, thinking = words
        schema = {"type": "object", "properties": {f"k{key}": {"enum": [value]}}, key: [value]}
        arguments = json.dumps({f"a{key}": argument})
        messages = [
            Message("user", about),
            Message(
                "assistant", "", thinking=f"t{thinking}", calls=(ToolCall("1", "f", arguments),)
            ),
            Message("tool", result, call_id="1"),
        ]
        ids = template.encode(messages, None, [Tool("f", about, schema)])
        return build.controls_in(tokenizer, ids)

    plain, every = controls(["x"] * 6), "".join(tokenizer.control_tokens)
    assert controls(hostile) == controls([every] * 6) == plain


@pytest.mark.parametrize(
    ("source", "variables", "name"),
    [
        (texts.TAGS, {"tools"}, "tags"),
        (texts.TAGS, set(), None),
        (texts.GRANITE, {"tools"}, "granite"),
        (texts.HARMONY + "<|channel|>", {"tools"}, "harmony"),
        ("[TOOL_CALLS] [", {"tools"}, "mistral"),
        ("'[TOOL_CALLS]' + message.tool_calls | tojson", {"tools"}, "mistral"),
        ("'[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]'", {"tools"}, "mistral-ids"),
        ("'[TOOL_CALLS]' + name + '[ARGS]'", {"tools"}, "mistral-args"),
        ("'[TOOL_CALLS]' + name + arguments", {"tools"}, None),
        ("'[TOOL_CALLS]' }}{% for call in message.tool_calls %}{{ call.name }}", {"tools"}, None),
        ("answer with <tool_call> and a JSON list", {"tools"}, "granite-text"),
        ("<tool_call>\n<function=NAME>\n</function>\n</tool_call>", {"tools"}, None),
        ("<tool_call>\n<function=NAME>\n<parameter=KEY>\n</tool_call>", {"tools"}, "qwen-coder"),
        ('<tool_call>NAME\n<arg_key>a</arg_key>\n</tool_call> {"name": 1}', {"tools"}, "glm"),
        ("<|python_tag|>", {"tools"}, None),
    ],
)
def test_the_form_of_calls_is_found_in_the_template(source, variables, name):
    found = tool_format_of(source, variables)
    assert (found and found.name) == name


def test_a_template_that_escapes_json_gets_the_text_itself(tmp_path):
    """The escapes of the characters that covered < and > stood in the prompt."""
    source = "{{ tools | tojson(ensure_ascii=True) }}{{ messages[0].content }}"
    tokenizer = load_tokenizer(FAMILIES["qwen3"].write(tmp_path / "x", source))
    template = load_template(tmp_path / "x", tokenizer)
    shown = tokenizer.decode(template.encode([Message("user", "Hi")], None, [texts.WEATHER]))
    assert "at a <place>, & more" in shown
    assert "Z\\u00fcrich" in shown


def test_a_template_without_tools_gets_them_as_text():
    system, user, answer, results = in_plain_text(texts.conversations(2)[1], TOOLS)
    assert system.content.startswith("Be brief\n\n")
    lines = [line for line in system.content.split("\n") if line.startswith('{"name": "')]
    assert [json.loads(line) for line in lines[:2]] == [
        tool.to_json()["function"] for tool in TOOLS
    ]
    assert answer.content == PLAIN.opening + PLAIN.text_of(texts.CALLS)
    assert results == Message("user", "<tool_response>\n{\"t\": 0}\n</tool_response>\n"
                                      "<tool_response>\n{\"t\": 1}\n</tool_response>")  # fmt: skip
    asked = replace(user, content="So?")
    *_, last = in_plain_text([*texts.conversations(2)[1], asked])
    assert last.content.endswith("</tool_response>\nSo?")
