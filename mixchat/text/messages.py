"""A conversation as a list of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, TypeAlias

from mixchat.base.errors import PromptError
from mixchat.text.tool_call import ToolCall

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Variables: TypeAlias = "Mapping[str, Any] | None"  # of a chat template
PRESERVES = "preserve_thinking"  # a variable of Qwen3.6's template, true or false


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    `ids` are the tokens that the model generated for an answer, without the token that ended it.
    The next prompt has these ids, because encoding the text again can give other ids. `partial`
    marks an answer that was stopped before its end. The first `thinking_tokens` ids are the
    `thinking` before an answer, which later prompts leave out. An answer may have `calls` of tools.
    Each result is a message of the role tool, with the id of its call. The thinking of an answer
    with calls stays in the prompts with the calls' results.
    """

    role: Role
    content: str
    ids: tuple[int, ...] | None = None
    partial: bool = False
    thinking: str = ""
    thinking_tokens: int = 0
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""

    @property
    def content_ids(self) -> tuple[int, ...] | None:
        """Return the ids of the content alone."""
        return None if self.ids is None else self.ids[self.thinking_tokens :]


def shown_thinking(message: Message, variables: Variables) -> str:
    """Return the thinking of an answer that a template reads.

    Templates read the thinking before calls, or of all answers if a variable says so.
    """
    return message.thinking if message.calls or (variables or {}).get(PRESERVES) else ""


def as_parts(message: Message, variables: Variables = None) -> list[Any]:
    """Return the parts of a message that a template with these variables reads, as JSON."""
    calls = [astuple(call) for call in message.calls]
    thinking = shown_thinking(message, variables)
    return [message.role, message.content, message.content_ids, thinking, calls, message.call_id]


def from_parts(parts: Sequence[Any]) -> Message:
    """Return the message with these parts."""
    role, content, ids, thinking, calls, call_id = parts
    return Message(
        role,
        content,
        None if ids is None else tuple(ids),
        thinking=thinking,
        calls=tuple(ToolCall(*call) for call in calls),
        call_id=call_id,
    )


def require_question(messages: Sequence[Message]) -> None:
    """Raise `PromptError` unless the conversation ends with something to answer."""
    if not messages or messages[-1].role not in ("user", "tool"):
        raise PromptError("there is nothing to answer: the conversation must end with a question")


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Return the text of all system messages, without empty ones, and the other messages."""
    system = [m.content for m in messages if m.role == "system" and m.content]
    return "\n\n".join(system), [m for m in messages if m.role != "system"]


def system_in_question(messages: Sequence[Message], number: int = 0) -> list[Message]:
    """Return the conversation with its system text in its first question, or in its last (-1).

    Mistral's own formats have the system text there, and templates without a system role need it
    there.
    """
    system, talk = split_system(messages)
    questions = [i for i, message in enumerate(talk) if message.role == "user"]
    if system and questions:
        index = questions[number]
        talk[index] = replace(talk[index], content=f"{system}\n\n{talk[index].content}")
    return talk
