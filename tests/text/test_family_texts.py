"""The templates and tokenizers of the families that people run give transformers' ids."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from family_texts import FAMILIES
from fed_answers import answer_read_by, feed
from tool_texts import as_dicts

from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.messages import Message
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tool_formats import FORMATS
from mixchat.text.tool_parser import answer_parser

CASES = [(family, name) for family, text in FAMILIES.items() for name in text.templates]
CONVERSATIONS = 200
WORDS = [
    *build.CORPUS[0].split(), *build.CORPUS[2].split(), "don't", "DON'T", "I'll", "we're", "12345",
    "3.14", "naïve", "cafe\u0301", "Grüße", "здравствуй", "你好", "🙂", "👩‍🚀", "١٢٣", "e\u0301e",
    "\r\n", "\n\n", "\n", "\t", "  ", "       ", "\u00a0", "def f(x):", "://", "a/b\n", "ǅ", "ﬁ",
    "HTTPServer", "<b>", "|||", "[x]", "</p>",
]  # fmt: skip


def conversations(count: int) -> Any:
    """Random talk, with a system prompt in half of it."""
    draw = random.Random(5)

    def text() -> str:
        words = draw.choices(WORDS, k=draw.randrange(1, 30))
        return "".join(word + draw.choice(["", " ", " ", "\n"]) for word in words)

    for _ in range(count):
        talk = [Message("system", text())] * draw.randrange(2)
        for _ in range(draw.randrange(4)):
            talk += [Message("user", text()), Message("assistant", text())]
        yield [*talk, Message("user", text())]


@pytest.fixture(scope="module")
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our template and tokenizer, and transformers' tokenizer of the same directory."""
    from transformers import AutoTokenizer

    family, name = request.param
    text = FAMILIES[family]
    directory = text.write(tmp_path_factory.mktemp("family"), text.templates[name])
    ours = load_tokenizer(directory)
    return load_template(directory, ours), ours, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("speaker", CASES, indirect=True, ids="-".join)
def test_talk_gets_transformers_ids(speaker):
    template, tokenizer, theirs = speaker
    switch = None if template.thinking is None else template.thinking.switch
    for messages in conversations(CONVERSATIONS):
        variables = {switch: len(messages) % 3 == 0} if switch else {}
        assert template.encode(messages, variables) == theirs.apply_chat_template(
            as_dicts(messages),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **variables,
        )
        text = messages[-1].content
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def loaded(directory: Path, family: str, name: str) -> tuple[Any, Any]:
    text = FAMILIES[family]
    tokenizer = load_tokenizer(text.write(directory, text.templates[name]))
    return load_template(directory, tokenizer), tokenizer


@pytest.mark.parametrize(
    ("family", "name", "thinking", "ends"),
    [
        ("qwen3", "instruct", None, ["<|im_end|>"]),
        ("qwen3", "hybrid", ThinkingFormat("tags", ("enable_thinking",)), ["<|im_end|>"]),
        ("qwen3", "thinking", ThinkingFormat("tags"), ["<|im_end|>"]),
        (
            "gpt-oss",
            "harmony",
            ThinkingFormat("harmony", ("reasoning_effort",)),
            ["<|return|>", "<|call|>"],  # not <|end|>, which only ends the thinking
        ),
        ("granite", "3.1", None, ["<|end_of_text|>"]),
        ("olmoe", "0125", None, ["<|endoftext|>"]),
        (
            "gemma4",
            "4",
            ThinkingFormat("channel", ("enable_thinking",)),
            ["<eos>", "<turn|>", "<|tool_response>"],  # which would begin the answer to a call
        ),
    ],
)
def test_a_template_tells_how_its_model_thinks_and_ends(family, name, thinking, ends, tmp_path):
    template, tokenizer = loaded(tmp_path, family, name)
    assert template.thinking == thinking
    assert template.stop_ids == {tokenizer.control_tokens[token] for token in ends}


def test_an_answers_thinking_is_in_no_later_prompt(tmp_path):
    template, tokenizer = loaded(tmp_path, "qwen3", "hybrid")
    ids = tokenizer.encode_template("<think>\nHm\n</think>\n\nYes")
    thought = len(ids) - len(tokenizer.encode("Yes"))
    before, after = Message("user", "a"), Message("user", "b")
    answer = Message("assistant", "Yes", tuple(ids), thinking="Hm", thinking_tokens=thought)
    assert template.encode([before, answer, after]) == (
        template.encode([before, Message("assistant", "Yes"), after])
    )


def test_an_answers_thinking_is_in_later_prompts_if_a_client_asks_for_it(tmp_path):
    shown = "{% if preserve_thinking %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    source = f"{{% for m in messages %}}{shown}{{{{ m.content }}}}{{% endfor %}}"
    directory = FAMILIES["qwen3"].write(tmp_path / "x", source)
    tokenizer = load_tokenizer(directory)
    template = load_template(directory, tokenizer)
    talk = [Message("assistant", "a", thinking="Hm"), Message("user", "b")]
    for variables, text in (({}, "ab"), ({"preserve_thinking": True}, "<think>Hm</think>a")):
        ids = template.encode(talk, variables)
        start = tokenizer.encode_template(text)
        assert ids[: len(start)] == start


def answered(template: Any, tokenizer: Any, said: str, tools: Any = None) -> tuple[Any, Any]:
    """Return an answer of Gemma 4 that is over, and its calls."""
    prompt = template.encode([Message("user", "Hi")], {"enable_thinking": True})
    parser = answer_parser(template.thinking, tools, tokenizer, prompt)
    answer = answer_read_by(parser, tokenizer, template.stop_ids)
    for token in tokenizer.encode_template(said):
        feed(answer, token)
    message = answer.message()
    assert message is not None
    return answer, message.calls


def test_gemmas_thinking_between_tokens_without_text_is_in_no_later_prompt(tmp_path):
    template, tokenizer = loaded(tmp_path, "gemma4", "4")
    answer, _ = answered(template, tokenizer, "<|channel>thought\nHm.\n<channel|>Yes <b><turn|>")
    message = answer.message()
    assert (answer.thinking, answer.text, answer.reason) == ("Hm.", "Yes <b>", "stop")
    assert tokenizer.decode(message.content_ids) == "Yes <b>"
    talk = [Message("user", "a"), message, Message("user", "b")]
    plain = [Message("user", "a"), Message("assistant", "Yes <b>"), Message("user", "b")]
    assert template.encode(talk) == template.encode(plain)


@pytest.mark.parametrize("thinking", ["", "<|channel>thought\nHm.\n<channel|>"])
def test_gemmas_call_ends_where_its_response_would_begin(tmp_path, thinking):
    """An opening without text, right after a thinking, was no call: no answer had begun."""
    template, tokenizer = loaded(tmp_path, "gemma4", "4")
    said = f'{thinking}<|tool_call>call:f{{a:<|"|>x, {{"<|"|>,b:[1]}}<tool_call|><|tool_response>'
    answer, (call,) = answered(template, tokenizer, said, FORMATS["gemma"])
    assert (answer.reason, answer.text) == ("tool_calls", "")
    assert (call.name, json.loads(call.arguments)) == ("f", {"a": 'x, {"', "b": [1]})
    assert answer.thinking == ("Hm." if thinking else "")
