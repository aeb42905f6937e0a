"""A conversation as a list of messages, and what every template asks of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from mixchat.errors import PromptError

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """What somebody said.

    `ids` are the tokens that the model generated for an answer, without the one that ended it.
    They go into the next prompt as they are: encoding the text again can give other tokens.
    `partial` marks an answer that was stopped before its end.
    """

    role: Role
    content: str
    ids: tuple[int, ...] | None = None
    partial: bool = False


class Template(Protocol):
    """Turns a conversation into the ids after which the model answers."""

    stop_ids: frozenset[int]  # any of these ends an answer
    continues_prompt: bool  # whether the answer's text goes on where the prompt's text ends

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the conversation, ready for the model to answer.

        Raises `PromptError` where the template has no way to say it.
        """
        ...


def require_question(messages: Sequence[Message]) -> None:
    """Raises `PromptError` unless the conversation ends with something to answer."""
    if not messages or messages[-1].role != "user":
        raise PromptError("there is nothing to answer: the conversation must end with a question")


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The text of all system messages, empty ones left out, and the other messages."""
    system = [m.content for m in messages if m.role == "system" and m.content]
    return "\n\n".join(system), [m for m in messages if m.role != "system"]


def system_in_first_question(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its system text in front of the first question.

    That is Mistral's own way, and the way out where a template knows no system role.
    """
    system, rest = split_system(messages)
    first = next((i for i, message in enumerate(rest) if message.role == "user"), None)
    if system and first is not None:
        rest[first] = replace(rest[first], content=f"{system}\n\n{rest[first].content}")
    return rest
