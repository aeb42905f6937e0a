"""Templates built from ids: Mistral's instruct format and plain completion."""

from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_texts import first_generations, their_ids
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


@pytest.fixture(scope="session")
def oracles() -> dict[Path, Any]:
    """mistral-common's tokenizers by their file."""
    return {file: first_generations(file) for file in (build.V1_FILE, build.V3_FILE)}


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A system prompt or none, then one to four questions with the answers between them."""
    # mistral-common takes no empty answer.
    answers = anything.filter(bool)
    messages = [Message("system", draw(anything))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        messages += [Message("user", draw(anything)), Message("assistant", draw(answers))]
    return [*messages, Message("user", draw(anything))]


@pytest.mark.parametrize("file", [build.V1_FILE, build.V3_FILE], ids=["v1", "v3"])
@settings(max_examples=60)
@given(messages=conversations())
def test_the_ids_are_mistral_commons(messages, file, instruct, instruct_v3, oracles):
    template = instruct if file == build.V1_FILE else instruct_v3
    assert template.encode(messages) == their_ids(oracles[file], messages)


def test_a_worked_example(instruct, v1):
    """As one string, the answer loses the leading space that the model was trained with."""
    assert v1.encode("[INST] Hi [/INST]Hello")[-1] == 16230
    question = [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    again = [733, 16289, 28793, 1984, 733, 28748, 16289, 28793]
    hi, hello = Message("user", "Hi"), Message("assistant", "Hello")
    assert instruct.encode([hi]) == question
    assert instruct.encode([hi, hello, Message("user", "My")]) == [*question, 22557, 2, *again]


def test_an_answers_own_ids_go_into_the_next_prompt(instruct, instruct_v3):
    """Encoding its text again can give other ids, which the KV cache would not match."""
    for template in (instruct, instruct_v3):
        for text, ids in (("Hello", (16230, 28705, 13)), ("", ())):  # with their last space
            messages = [Message("user", "Hi"), Message("assistant", text, ids)]
            prompt = template.encode(messages[:1])
            again = template.encode([*messages, Message("user", "Hi")])
            assert again[: len(prompt) + len(ids) + 1] == [*prompt, *ids, 2]


def test_several_system_texts_go_in_front_of_the_first_question(instruct):
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
