"""Templates built from ids: Mistral's instruct format and plain completion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import anything

from mixchat.base.errors import PromptError
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.messages import Message
from mixchat.text.template import CompletionTemplate, InstructTemplate


@pytest.fixture(scope="session")
def instruct(v1: Any) -> InstructTemplate:
    return InstructTemplate(v1)


@pytest.fixture(scope="session")
def instruct_v3(tmp_path_factory: pytest.TempPathFactory) -> InstructTemplate:
    directory = tmp_path_factory.mktemp("v3")
    build.write_checkpoint(directory, model_file=build.V3_FILE, template=build.MISTRAL_V3)
    template = load_template(directory, load_tokenizer(directory))
    assert isinstance(template, InstructTemplate)
    return template


def mistral_common(kind: str, file: Path) -> Callable[[list[Message]], list[int]]:
    """Return mistral-common's ids of a conversation that ends with a question."""
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    tokenizer = getattr(instruct, kind)(SentencePieceTokenizer(str(file)))
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}

    def encode(messages: list[Message]) -> list[int]:
        request = ChatCompletionRequest(
            messages=[kinds[m.role](content=m.content) for m in messages]
        )
        normal = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
        return list(tokenizer.encode_instruct(normal).tokens)

    return encode


@pytest.fixture(scope="session")
def oracle() -> Callable[[list[Message]], list[int]]:
    return mistral_common("InstructTokenizerV1", build.V1_FILE)


@pytest.fixture(scope="session")
def oracle_v3() -> Callable[[list[Message]], list[int]]:
    return mistral_common("InstructTokenizerV3", build.V3_FILE)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A system prompt or none, then one to four questions with the answers between them."""
    # mistral-common takes no empty answer.
    answers = anything.filter(bool)
    messages = [Message("system", draw(anything))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        messages += [Message("user", draw(anything)), Message("assistant", draw(answers))]
    return [*messages, Message("user", draw(anything))]


@settings(max_examples=60)
@given(messages=conversations())
def test_the_ids_are_mistral_commons(messages, instruct, oracle):
    assert instruct.encode(messages) == oracle(messages)


@settings(max_examples=60)
@given(messages=conversations())
def test_the_ids_of_the_third_generation_are_mistral_commons(messages, instruct_v3, oracle_v3):
    assert instruct_v3.encode(messages) == oracle_v3(messages)


def test_from_the_third_generation_the_system_text_is_in_the_last_question(instruct_v3):
    """An answer's own ids are taken as they are, with their last space."""
    ids = (1, 2, 29473)
    first, answer = Message("user", "a"), Message("assistant", "b", ids)
    assert instruct_v3.encode([Message("system", "S"), first, answer, Message("user", "c")]) == (
        instruct_v3.encode([first, answer, Message("user", "S\n\nc")])
    )
    assert instruct_v3.encode([first, answer, first])[4:8] == [*ids, 2]


def test_a_worked_example(instruct, v1):
    """As one string, the answer loses the leading space that the model was trained with."""
    assert v1.encode("[INST] Hi [/INST]Hello")[-1] == 16230
    question = [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    again = [733, 16289, 28793, 1984, 733, 28748, 16289, 28793]
    hi, hello = Message("user", "Hi"), Message("assistant", "Hello")
    assert instruct.encode([hi]) == question
    assert instruct.encode([hi, hello, Message("user", "My")]) == [*question, 22557, 2, *again]


def test_an_answers_own_ids_go_into_the_next_prompt(instruct):
    """Encoding its text again can give other ids, which the KV cache would not match."""
    ids = (16230, 28705, 13)
    messages = [Message("user", "Hi"), Message("assistant", "Hello", ids), Message("user", "Hi")]
    prompt, again = instruct.encode(messages[:1]), instruct.encode(messages)
    assert again[: len(prompt) + 4] == [*prompt, *ids, 2]
    empty = [Message("user", "Hi"), Message("assistant", "", ()), Message("user", "Hi")]
    assert instruct.encode(empty)[: len(prompt) + 1] == [*prompt, 2]


def test_the_system_text_goes_in_front_of_the_first_question(instruct):
    rest = [Message("assistant", "b"), Message("user", "c")]
    assert instruct.encode([Message("system", "S"), Message("user", "a"), *rest]) == (
        instruct.encode([Message("user", "S\n\na"), *rest])
    )
    both = [Message("system", ""), Message("system", "S"), Message("system", "T")]
    assert instruct.encode([*both, Message("user", "a")]) == (
        instruct.encode([Message("user", "S\n\nT\n\na")])
    )


@pytest.mark.parametrize("roles", [[], ["system"], ["user", "assistant"]])
def test_there_must_be_a_question(roles, instruct, checkpoints):
    directory = checkpoints["byte-level"]
    jinja = load_template(directory, load_tokenizer(directory))
    for template in (instruct, jinja):
        with pytest.raises(PromptError, match="nothing to answer"):
            template.encode([Message(role, "x") for role in roles])


def test_a_base_model_continues_the_text(v1):
    template = CompletionTemplate(v1)
    assert template.continues_prompt
    assert template.encode([Message("user", "Once upon</s>")]) == [1, *v1.encode("Once upon</s>")]
    assert CompletionTemplate(v1, add_bos=False).encode([Message("user", "a")]) == v1.encode("a")
    assert template.encode([Message("system", "S"), Message("user", "a")]) == (
        template.encode([Message("user", "S\n\na")])
    )
    assert template.encode([Message("system", "S")]) == template.encode([Message("user", "S")])


def test_a_base_models_own_text_is_inserted_as_its_ids(v1):
    template = CompletionTemplate(v1)
    ids = tuple(v1.encode("a time"))
    messages = [Message("user", "Once upon"), Message("assistant", "a time", ids)]
    assert template.encode(messages) == [1, *v1.encode("Once upon"), *ids]
    more = template.encode([*messages, Message("user", ", there was </s>")])
    assert v1.decode(more) == "Once upon a time, there was </s>"
    assert more == [1, *v1.encode("Once upon a time, there was </s>")]


@settings(max_examples=100)
@given(parts=st.lists(anything, min_size=1, max_size=3))
def test_a_base_models_text_yields_no_control_token(parts, v1):
    ids = CompletionTemplate(v1).encode([Message("user", part) for part in parts])
    assert ids == [1, *v1.encode("".join(parts))]
    assert min(ids[1:], default=3) > 2
