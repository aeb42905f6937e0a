"""Templates built from ids: Mistral's instruct format, plain completion, and the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import anything

from mixchat.errors import CheckpointError, PromptError
from mixchat.text.template import (
    CompletionTemplate,
    InstructTemplate,
    JinjaTemplate,
    Message,
    load_template,
)
from mixchat.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def instruct(v1: Any) -> InstructTemplate:
    return InstructTemplate(v1)


@pytest.fixture(scope="session")
def oracle() -> Callable[[list[Message]], list[int]]:
    """mistral-common's ids of a conversation that ends with a question."""
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    tokenizer = InstructTokenizerV1(SentencePieceTokenizer(str(build.V1_FILE)))
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}

    def encode(messages: list[Message]) -> list[int]:
        request = ChatCompletionRequest(
            messages=[kinds[m.role](content=m.content) for m in messages]
        )
        normal = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
        return list(tokenizer.encode_instruct(normal).tokens)

    return encode


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A system prompt or none, then one to four questions with the answers between them."""
    # mistral-common takes no empty answer.
    answers = anything.filter(bool)
    messages = [Message("system", draw(anything))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        messages += [Message("user", draw(anything)), Message("assistant", draw(answers))]
    return [*messages, Message("user", draw(anything))]


@settings(deadline=None, max_examples=600)
@given(messages=conversations())
def test_the_ids_are_mistral_commons(
    messages: list[Message], instruct: InstructTemplate, oracle: Any
) -> None:
    assert instruct.encode(messages) == oracle(messages)


@settings(deadline=None, max_examples=100)
@given(messages=conversations())
def test_no_control_token_but_one_bos_and_an_eos_after_each_answer(
    messages: list[Message], instruct: InstructTemplate
) -> None:
    ids = instruct.encode(messages)
    answers = sum(m.role == "assistant" for m in messages)
    assert [i for i in ids if i <= 2] == [1] + [2] * answers


def test_a_worked_example(instruct: InstructTemplate) -> None:
    question = [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    again = [733, 16289, 28793, 1984, 733, 28748, 16289, 28793]
    hi, hello = Message("user", "Hi"), Message("assistant", "Hello")
    assert instruct.encode([hi]) == question
    assert instruct.encode([hi, hello, Message("user", "My")]) == [*question, 22557, 2, *again]


def test_the_segments_are_not_one_string(instruct: InstructTemplate, v1: Any) -> None:
    """As one string, the answer loses the leading space that the model was trained with."""
    assert v1.encode("[INST] Hi [/INST]Hello")[-1] == 16230
    messages = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "")]
    assert 22557 in instruct.encode(messages)
    assert 16230 not in instruct.encode(messages)
    assert 28705 not in instruct.encode([Message("user", "Hi")])


def test_an_answers_own_ids_go_into_the_next_prompt(instruct: InstructTemplate) -> None:
    """Encoding its text again can give other ids, and the model's memory would not fit them."""
    ids = (16230, 28705, 13)
    messages = [Message("user", "Hi"), Message("assistant", "Hello", ids), Message("user", "Hi")]
    prompt, again = instruct.encode(messages[:1]), instruct.encode(messages)
    assert again[: len(prompt) + 4] == [*prompt, *ids, 2]
    empty = [Message("user", "Hi"), Message("assistant", "", ()), Message("user", "Hi")]
    assert instruct.encode(empty)[: len(prompt) + 1] == [*prompt, 2]


def test_the_system_text_goes_in_front_of_the_first_question(instruct: InstructTemplate) -> None:
    rest = [Message("assistant", "b"), Message("user", "c")]
    assert instruct.encode([Message("system", "S"), Message("user", "a"), *rest]) == (
        instruct.encode([Message("user", "S\n\na"), *rest])
    )
    both = [Message("system", ""), Message("system", "S"), Message("system", "T")]
    assert instruct.encode([*both, Message("user", "a")]) == (
        instruct.encode([Message("user", "S\n\nT\n\na")])
    )
    assert instruct.encode([Message("system", ""), Message("user", "a")]) == (
        instruct.encode([Message("user", "a")])
    )


@pytest.mark.parametrize("roles", [[], ["system"], ["user", "assistant"]])
def test_there_must_be_a_question(
    roles: list[Any], instruct: InstructTemplate, checkpoints: Any
) -> None:
    directory = checkpoints["byte-level"]
    jinja = load_template(directory, load_tokenizer(directory))
    for template in (instruct, jinja):
        with pytest.raises(PromptError, match="nothing to answer"):
            template.encode([Message(role, "x") for role in roles])


def test_a_base_model_goes_on_from_the_text(v1: Any) -> None:
    template = CompletionTemplate(v1)
    assert template.continues_prompt
    assert template.encode([Message("user", "Once upon</s>")]) == [1, *v1.encode("Once upon</s>")]
    assert CompletionTemplate(v1, add_bos=False).encode([Message("user", "a")]) == v1.encode("a")
    assert template.encode([Message("system", "S"), Message("user", "a")]) == (
        template.encode([Message("user", "S\n\na")])
    )
    assert template.encode([Message("system", "S")]) == template.encode([Message("user", "S")])


def test_a_base_models_own_words_go_in_as_its_ids(v1: Any) -> None:
    template = CompletionTemplate(v1)
    ids = tuple(v1.encode("a time"))
    messages = [Message("user", "Once upon"), Message("assistant", "a time", ids)]
    assert template.encode(messages) == [1, *v1.encode("Once upon"), *ids]
    more = template.encode([*messages, Message("user", ", there was </s>")])
    assert v1.decode(more) == "Once upon a time, there was </s>"
    assert more == [1, *v1.encode("Once upon a time, there was </s>")]


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(anything, min_size=1, max_size=3))
def test_a_base_models_text_holds_no_control_token(parts: list[str], v1: Any) -> None:
    ids = CompletionTemplate(v1).encode([Message("user", part) for part in parts])
    assert ids == [1, *v1.encode("".join(parts))]
    assert min(ids[1:], default=3) > 2


def chosen(directory: Path, **options: Any) -> Any:
    return load_template(directory, load_tokenizer(directory), **options)


@pytest.mark.parametrize(
    "template", [build.MISTRAL, build.MISTRAL.replace("'[INST] '", "' [INST] '")]
)
def test_mistrals_own_template_is_built_from_ids(template: str, tmp_path: Path) -> None:
    build.write_checkpoint(
        tmp_path, build.byte_level(), model_file=build.V1_FILE, template=template
    )
    assert type(chosen(tmp_path)) is InstructTemplate


@pytest.mark.parametrize("template", [build.CHATML, build.LLAMA2, build.ALPACA])
@pytest.mark.parametrize("model_file", [build.V1_FILE, None])
def test_another_template_is_rendered(template: str, model_file: Any, tmp_path: Path) -> None:
    build.write_checkpoint(tmp_path, build.byte_level(), model_file=model_file, template=template)
    assert type(chosen(tmp_path)) is JinjaTemplate


def test_instruct_tokens_of_the_third_generation_are_left_to_its_template(tmp_path: Path) -> None:
    build.write_checkpoint(tmp_path, model_file=build.V3_FILE, template=build.MISTRAL)
    template = chosen(tmp_path)
    assert type(template) is JinjaTemplate
    assert template.encode([Message("user", "[INST]")]).count(3) == 1


def test_no_template_is_a_base_model_unless_one_says_otherwise(checkpoints: Any) -> None:
    assert type(chosen(checkpoints["spm"])) is CompletionTemplate
    template = chosen(checkpoints["spm"], kind="instruct")
    assert type(template) is InstructTemplate
    assert not template.continues_prompt
    assert type(chosen(checkpoints["byte-level"], kind="instruct")) is InstructTemplate


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    build.write_checkpoint(tmp_path, build.byte_level(), template=build.MISTRAL)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    ids = load_template(tmp_path, tokenizer).encode([Message("user", "Hi")])
    assert tokenizer.decode(ids) == "Hi!"


def test_a_base_model_that_wants_no_bos_gets_none(tmp_path: Path) -> None:
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE, add_bos_token=False)
    assert chosen(tmp_path).encode([Message("user", "Hi")]) == [15359]


def test_what_ends_an_answer_is_gathered_from_everywhere(tmp_path: Path) -> None:
    build.write_checkpoint(
        tmp_path, build.byte_level(), template=build.CHATML, eos_token="<|endoftext|>"
    )
    assert chosen(tmp_path).stop_ids == {0, 2}, "the tokenizer's own, and the end of a turn"
    assert chosen(tmp_path, eos_token_ids=[7, 8]).stop_ids == {0, 2, 7, 8}
    file = tmp_path / "generation_config.json"
    for value, ids in ((9, {9}), ([9, 10], {9, 10}), (None, set())):
        file.write_text(json.dumps({"eos_token_id": value}))
        assert chosen(tmp_path).stop_ids == {0, 2} | ids
        assert chosen(tmp_path, kind="instruct").stop_ids == {0} | ids


def test_a_token_that_closes_no_turn_of_this_template_ends_no_answer(tmp_path: Path) -> None:
    build.write_checkpoint(
        tmp_path, build.byte_level(), template=build.ALPACA, eos_token="<|endoftext|>"
    )
    assert chosen(tmp_path).stop_ids == {0}


@pytest.mark.parametrize("content", ['{"eos_token_id": "2"}', '{"eos_token_id": [true]}', "[", ""])
def test_a_damaged_generation_config_is_named(content: str, tmp_path: Path) -> None:
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        chosen(tmp_path)


def test_a_models_own_eos_ends_an_answer(v1: Any) -> None:
    assert InstructTemplate(v1).stop_ids == CompletionTemplate(v1).stop_ids == {2}
    assert InstructTemplate(v1, stop_ids=[5]).stop_ids == {2, 5}
