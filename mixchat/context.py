"""The context of a model: how many tokens it holds, and which texts are too long for it."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.errors import PromptError, UsageError
from mixchat.model_config import ModelConfig
from mixchat.quantities import format_size

DEFAULT_TOKENS = 8192  # Mixtral can do 32768, at 128 KiB each
# More than the tokens of any text stand for: Mistral's longest has 16 characters, the demo's 81,
# GPT-4's 128 spaces.
BYTES_PER_TOKEN = 128


@dataclass(frozen=True)
class Context:
    """The tokens that prompt and answer may have together, and the most that the model can do."""

    tokens: int
    largest: int

    @classmethod
    def of(cls, config: ModelConfig, wanted: int | None) -> Context:
        """The context of `wanted` tokens; None chooses.

        Raises `UsageError` for what the model cannot do.
        """
        largest = config.max_position_embeddings
        if wanted is None:
            return cls(min(DEFAULT_TOKENS, largest), largest)
        if not 1 < wanted <= largest:
            raise UsageError(f"--ctx-size {wanted}: this model can do 2 to {largest} tokens")
        return cls(wanted, largest)

    @property
    def longest_text(self) -> int:
        """Bytes: a text that has more cannot fit, and need not be read to its end."""
        return self.tokens * BYTES_PER_TOKEN

    def check_text(self, text: str, what: str) -> None:
        """Raise `PromptError` where a text cannot fit, which its tokens would say much later."""
        if len(text) > self.longest_text:
            raise self.text_too_long(what)

    def text_too_long(self, what: str) -> PromptError:
        """The error for a text that has more bytes than can fit."""
        return self._too_long(what, f"more than {format_size(self.longest_text)}")

    def prompt_too_long(self, tokens: int) -> PromptError:
        """The error for a prompt that leaves no room for an answer."""
        return self._too_long("the prompt", f"{tokens} tokens", tokens)

    def _too_long(self, what: str, size: str, tokens: int = 0) -> PromptError:
        hint = f"Shorten it: this model reads {self.largest - 1} tokens at most."
        if max(self.tokens, tokens) < self.largest:
            hint = f"--ctx-size can be up to {self.largest}."
        holds = f"the context holds {self.tokens} tokens, the answer included"
        return PromptError(f"{what} is too long: {size}, {holds}", hint=hint)
