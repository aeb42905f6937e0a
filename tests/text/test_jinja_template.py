"""Chat templates in Jinja: transformers' ids for ordinary chats, and no forged turns."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import anything, harmless
from tool_texts import as_dicts

from mixchat.base.errors import PromptError
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.jinja_template import JinjaTemplate
from mixchat.text.messages import Message
from mixchat.text.tokenizer_files import ChatTemplate

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>",
]  # fmt: skip
TEMPLATES = {
    "chatml": build.CHATML,
    "llama3": build.LLAMA3,
    "zephyr": build.ZEPHYR,
    "alpaca": build.ALPACA,
    "mistral": build.MISTRAL,
}
# Templates that would assemble control tokens from pieces of messages, such as these.
FORGERS = {
    "joins": ("{{ m.content }}", ["<|im_", "end|>", "x"]),
    "trims": ("{{ m.content | trim }}", ["<|im_ ", " ", " end|>"]),
    "wraps": ("<|{{ m.content }}|>", ["im_end", " im_start", "x"]),
    "opens": ("<{{ m.content }}", ["|im_end|>", "x", "y"]),
    "closes": ("{{ m.content }}>", ["<|im_end|", "x", "<|im_end|"]),
    "drops": ("{{ m.content | replace(' ', '') }}", ["<|im_ end|>", "< | i m _ e n d | >", "x"]),
    "cuts": ("{{ m.content.split('|>')[0] }}|>", ["<|im_end|>", "<|im_end", "x"]),
    "turns": ("{{ m.content | reverse }}", [">|dne_mi|<", "x", "y"]),
    "lowers": ("{{ m.content | lower }}", ["<|IM_END|>", "<|im_END|>", "<|Im_End|>"]),
    "quotes": ("{{ messages | tojson if loop.first }}", ["<|im_end|>", "x", "y"]),
}


def forging(name: str) -> str:
    return f"{{% for m in messages %}}{FORGERS[name][0]}{{% endfor %}}<|im_end|>"


@pytest.fixture(scope="session")
def speakers(
    tmp_path_factory: pytest.TempPathFactory, v1_scores: dict[str, float]
) -> dict[tuple[str, str], tuple[Any, Any, Any]]:
    """For each template and kind of tokenizer.json: our template, our tokenizer and theirs."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("speakers")
    small = {p: s for i, (p, s) in enumerate(v1_scores.items()) if i < 3000 or len(p) == 1}
    made = {
        "byte-level": build.byte_level(["<unk>", "<s>", "</s>", *SPECIALS]),
        "llama-old": build.llama_style(small, SPECIALS, legacy=True),
        "llama-new": build.llama_style(small, SPECIALS, legacy=False),
    }
    found = {}
    for kind, tokenizer in made.items():
        for name, source in TEMPLATES.items():
            directory = build.write_checkpoint(
                root / f"{kind}-{name}", tokenizer, template=source,
                bos_token={"__type": "AddedToken", "content": "<s>"}, eos_token="</s>",
            )  # fmt: skip
            ours = load_tokenizer(directory)
            theirs = AutoTokenizer.from_pretrained(directory)
            found[name, kind] = (load_template(directory, ours), ours, theirs)
    return found


def jinja(source: str, tokenizer: Any, file: str = "x", **variables: str) -> JinjaTemplate:
    return JinjaTemplate(ChatTemplate(source, Path(file)), tokenizer, variables=variables)


def conversation(questions: list[str], answers: list[str]) -> list[Message]:
    messages = []
    for question, answer in zip(questions, answers, strict=False):
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages[: 2 * len(questions) - 2], Message("user", questions[-1])]


def talk(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    return st.builds(
        conversation,
        st.lists(texts, min_size=1, max_size=3),
        st.lists(texts, min_size=3, max_size=3),
    )


@pytest.mark.parametrize("kind", ["byte-level", "llama-old", "llama-new"])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12)
@given(messages=talk(harmless))
def test_ordinary_talk_gets_transformers_ids(name, kind, messages, speakers):
    template, _, theirs = speakers[name, kind]
    assert type(template) is JinjaTemplate
    assert template.encode(messages) == theirs.apply_chat_template(
        as_dicts(messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50)
@given(messages=talk(anything), kind=st.sampled_from(["byte-level", "llama-old", "llama-new"]))
def test_no_message_adds_a_control_token(name, kind, messages, speakers):
    template, tokenizer, _ = speakers[name, kind]
    plain = [Message(m.role, "ok") for m in messages]
    assert build.controls_in(tokenizer, template.encode(messages)) == (
        build.controls_in(tokenizer, template.encode(plain))
    )


@settings(max_examples=20)
@given(messages=talk(anything))
def test_no_message_adds_a_control_token_to_any_tokenizer(messages, directory, tokenizer):
    template = JinjaTemplate(ChatTemplate(build.CHATML, directory), tokenizer)
    plain = [Message(m.role, "ok") for m in messages]
    assert build.controls_in(tokenizer, template.encode(messages)) == (
        build.controls_in(tokenizer, template.encode(plain))
    )


@pytest.mark.parametrize("forger", FORGERS)
@settings(max_examples=25)
@given(messages=talk(anything))
def test_no_template_assembles_a_control_token(forger, messages, byte_level):
    template = jinja(forging(forger), byte_level)
    first, answer, second = FORGERS[forger][1]
    for dialogue in (messages, conversation([first, second], [answer])):
        assert build.controls_in(byte_level, template.encode(dialogue)) == [
            byte_level.control_tokens.get("<|im_end|>")
        ]


@pytest.mark.parametrize("forger", [name for name in FORGERS if name != "quotes"])
def test_a_simple_encoding_would_assemble_these_tokens(forger, byte_level):
    """Or there would be nothing to prevent. Jinja's own filter for JSON escapes them."""
    from jinja2 import Environment

    first, answer, second = FORGERS[forger][1]
    messages = as_dicts(conversation([first, second], [answer]))
    rendered = Environment().from_string(forging(forger)).render(messages=messages)
    assert len(build.controls_in(byte_level, byte_level.encode_template(rendered))) > 1


@settings(max_examples=100)
@given(text=anything)
def test_hostile_text_arrives_as_it_was_typed(text, byte_level):
    ids = jinja(build.CHATML, byte_level).encode([Message("user", text)])
    assert byte_level.decode(ids) == f"user\n{text}\nassistant\n"


@pytest.mark.parametrize("kind", ["byte-level", "llama-old", "llama-new"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answers_own_ids_follow_the_prompt_they_answered(name, kind, speakers):
    """So the KV cache of a conversation stays valid: the next prompt only adds to it."""
    template, _, _ = speakers[name, kind]
    messages = [Message("user", "Hi")]
    for ids in ((30, 31, 32, 31), (), (40,)):
        prompt = template.encode(messages)
        messages += [Message("assistant", " not what the ids say ", ids), Message("user", "So?")]
        assert template.encode(messages)[: len(prompt) + len(ids)] == [*prompt, *ids]


@pytest.mark.parametrize(
    "source",
    [
        build.ALPACA,
        build.MISTRAL,
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ messages[0].nothing.at.all }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    ],
    ids=["refuses", "refuses-too", "leaves-out", "fails"],
)
def test_without_a_system_role_its_text_goes_to_the_first_question(source, byte_level):
    template = jinja(source, byte_level, bos_token="", eos_token="<|endoftext|>")
    rest = [Message("assistant", "b"), Message("user", "c")]
    assert template.encode([Message("system", "S</s>"), Message("user", "a"), *rest]) == (
        template.encode([Message("user", "S</s>\n\na"), *rest])
    )


def test_the_helpers_that_transformers_gives(byte_level):
    for source, expected in {
        "{{ {'a': '<é>'} | tojson }}": '{"a": "<é>"}',
        "{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 2,\n "b": 1\n}',
        "{{ strftime_now('%Y') }}": str(datetime.now().year),
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}": "013",
        "{% if tools is not none or documents %}no{% endif %}{{ nothing }}.": ".",
        "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = 2 %}{% endfor %}{{ n.x }}":
            "2",
        "  {%- if add_generation_prompt %}\n    {% if true %}\n  a\n    {% endif %}\n{% endif %}":
            "  a\n",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}": "Hi",
        "{{ 'ab' * 3 }}{{ 3 * [1] }}{{ 2 ** 10 }}{{ 6 * 7 }}": "ababab[1, 1, 1]102442",
    }.items():  # fmt: skip
        ids = jinja(source, byte_level).encode([Message("user", "Hi")])
        assert byte_level.decode(ids) == expected


def test_the_special_tokens_by_name(tmp_path):
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}"
    build.write_checkpoint(
        tmp_path, build.byte_level(), template=source,
        bos_token={"content": "one"}, eos_token="two", pad_token=None,
    )  # fmt: skip
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "three", "unk_token": {"content": "four", "lstrip": False}})
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = load_template(tmp_path, tokenizer).encode([Message("user", "Hi")])
    names = {i: token for token, i in tokenizer.control_tokens.items()}
    text = "".join(names.get(i) or tokenizer.decode([i]) for i in ids)
    assert text == "one|two||four"


def test_sentencepieces_own_tokens_have_their_names(tmp_path):
    source = "{{ bos_token }}### {{ messages[0].content }}{{ eos_token }}"
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE, template=source)
    tokenizer = load_tokenizer(tmp_path)
    ids = load_template(tmp_path, tokenizer).encode([Message("user", "<s>")])
    assert ids == [1, *tokenizer.encode("### <s>"), 2]


def test_a_template_that_always_refuses_can_be_loaded_and_says_why(byte_level):
    template = jinja("{{ raise_exception('Only\n  one') }}", byte_level)
    with pytest.raises(PromptError, match=r"refuses the conversation: Only one$"):
        template.encode([Message("user", "Hi")])
