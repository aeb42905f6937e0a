"""The context of a model: its size in tokens, and the check for texts that are too long."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.base.errors import PromptTooLongError, UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.base.quantities import format_size

DEFAULT_TOKENS = 8192  # Mixtral can do 32768, at 128 KiB each
# An upper bound: Mistral's longest token has 16 characters, the demo's 81, GPT-4's 128 spaces.
BYTES_PER_TOKEN = 128
_USUAL = 4  # fraction of the context that an answer may take by default


@dataclass(frozen=True)
class Context:
    """The tokens that prompt and answer may have together, and the largest number of this model."""

    tokens: int
    largest: int

    @classmethod
    def of(cls, config: ModelConfig, tokens: int | None) -> Context:
        """Return a context of `tokens`, or of the default size for None.

        Raises `UsageError` where the model cannot do that many.
        """
        largest = config.max_position_embeddings
        if tokens is None:
            return cls(min(DEFAULT_TOKENS, largest), largest)
        if not 1 < tokens <= largest:
            raise UsageError(f"--ctx-size {tokens}: this model takes 2 to {largest} tokens")
        return cls(tokens, largest)

    @property
    def usual_answer(self) -> int:
        """Return how many tokens an answer may have where nobody says: some models never end."""
        return self.tokens // _USUAL

    @property
    def longest_text(self) -> int:
        """Return how many bytes a text may have; a longer one need not be read to its end."""
        return self.tokens * BYTES_PER_TOKEN

    def check_text(self, text: str, name: str) -> None:
        """Raise `PromptTooLongError` where a text cannot fit; its tokens would show it later."""
        if len(text) > self.longest_text:
            raise self.text_too_long(name)

    def text_too_long(self, name: str) -> PromptTooLongError:
        """Return the error for a text that has more bytes than can fit."""
        return self._too_long(name, f"more than {format_size(self.longest_text)}")

    def prompt_too_long(self, tokens: int) -> PromptTooLongError:
        """Return the error for a prompt that leaves no room for an answer."""
        return self._too_long("the prompt", f"{tokens} tokens", tokens)

    def _too_long(self, name: str, size: str, tokens: int = 0) -> PromptTooLongError:
        hint = f"Shorten it: this model reads {self.largest - 1} tokens at most."
        if max(self.tokens, tokens) < self.largest:
            hint = f"--ctx-size can be up to {self.largest}."
        holds = f"the context holds {self.tokens} tokens, the answer included"
        return PromptTooLongError(f"{name} is too long: {size}, {holds}", hint=hint)


UNKNOWN = Context(2**20, 2**20)
"""In place of a context whose size is not known: no model is known to have a larger one."""
