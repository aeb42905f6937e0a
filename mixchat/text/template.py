"""The interface of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mixchat.text.messages import Message


class Template(Protocol):
    """Turns a conversation into the ids after which the model answers."""

    stop_ids: frozenset[int]  # any of these ends an answer
    continues_prompt: bool  # whether the answer's text continues the prompt's text

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the conversation, ready for the model to answer.

        Raises `PromptError` where the template cannot express it.
        """
        ...
