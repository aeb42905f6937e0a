"""The tokens that a prompt and its answer may have together."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.base.errors import PromptTooLongError, UsageError
from mixchat.base.model_config import DEFAULT_TOKENS, ModelConfig
from mixchat.base.quantities import format_size

# An upper bound: Mistral's longest token has 16 characters, the demo's 81, GPT-4's 128 spaces.
BYTES_PER_TOKEN = 128
_USUAL = 4  # an answer may take 1/4 of the context by default


@dataclass(frozen=True)
class Context:
    """The tokens of prompt and answer together, and the model's largest number."""

    tokens: int
    largest: int
    is_chosen: bool = True  # by a person; if not, free memory decided

    @classmethod
    def of(cls, config: ModelConfig, tokens: int | None) -> Context:
        """Return a context of `tokens`, None for the least that loading takes by itself.

        Raises `UsageError`.
        """
        largest = config.largest_context
        if tokens is None:
            return cls(config.default_contexts[0], largest, is_chosen=False)
        if not 1 < tokens <= largest:
            hint = "For more, which agents need, take another model: 'mixchat plan' recommends one."
            raise UsageError(
                f"--ctx-size {tokens}: this model takes 2 to {largest} tokens",
                hint=hint if tokens > largest else None,
            )
        return cls(tokens, largest)

    @property
    def usual_answer(self) -> int:
        """Return the default length of an answer in tokens.

        Free memory must not change answers, so it has no part in their length.
        """
        return (self.tokens if self.is_chosen else min(self.tokens, DEFAULT_TOKENS)) // _USUAL

    @property
    def in_words(self) -> str:
        size = f"{self.tokens:,} tokens"
        if self.tokens == self.largest:
            return f"{size}, the most that this model takes"
        reason = "" if self.is_chosen else ", chosen by the free memory"
        return f"{size}{reason}; --ctx-size can be up to {self.largest:,}"

    @property
    def longest_text(self) -> int:
        """Return the bytes that a text may have."""
        return self.tokens * BYTES_PER_TOKEN

    def check_text(self, text: str, name: str) -> None:
        """Raise `PromptTooLongError` if a text cannot fit."""
        if len(text) > self.longest_text:
            raise self.text_too_long(name)

    def text_too_long(self, name: str) -> PromptTooLongError:
        """Return the error for a text that has too many bytes."""
        return self._too_long(name, f"more than {format_size(self.longest_text)}")

    def prompt_too_long(self, tokens: int) -> PromptTooLongError:
        """Return the error for a prompt without room for an answer."""
        return self._too_long("the prompt", f"{tokens:,} tokens", tokens)

    def _too_long(self, name: str, size: str, tokens: int | None = None) -> PromptTooLongError:
        """Return the error. `tokens` is None if they were not counted."""
        if max(self.tokens, tokens or 0) >= self.largest:
            hint = f"Shorten it: this model reads {self.largest - 1:,} tokens at most."
        elif tokens is None:
            hint = f"Shorten it, or use a larger --ctx-size, up to {self.largest}."
        else:  # a power of two that leaves the usual part of the context to the answer
            wanted = tokens * _USUAL // (_USUAL - 1)
            hint = f"Shorten it, or use --ctx-size {min(1 << wanted.bit_length(), self.largest)}."
        holds = f"but the context holds {self.tokens:,} tokens, the answer included"
        return PromptTooLongError(f"{name} is too long: {size}, {holds}", hint=hint)


UNKNOWN_CONTEXT = Context(2**20, 2**20)
"""A context of unknown size. No model is known to have a larger one."""
