"""A checkpoint's tokenizer and template as the rest of mixchat has them: both run in a cage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.text.cage import Cage, Request
from mixchat.text.messages import Message, Template
from mixchat.text.tokenizer import Insert, Tokenizer
from mixchat.text.tokenizer_files import template_file


class CheckpointText:
    """The tokenizer and the template of one checkpoint.

    They load from the moment this is made, beside whatever else is done until one is asked for.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = f"{directory}: the tokenizer"
        self._either = f"{directory}: the chat template or the tokenizer"
        self._cage = Cage(
            directory,
            [
                Request(self._tokenizer, "load_tokenizer"),
                Request(f"{template_file(directory)}: the chat template", "load_template"),
            ],
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, when both are ready.

        Raises `CheckpointError` where one is damaged, or goes beyond its limits.
        """
        facts, _ = self._cage.opened()
        with _trusting_nothing(self._tokenizer):
            return _CagedTokenizer(self._cage, self._tokenizer, facts)

    def template(self, eos_token_ids: Collection[int] = ()) -> Template:
        """The template, when both are ready. `eos_token_ids` are those of config.json.

        Raises `CheckpointError` as `tokenizer` does.
        """
        _, facts = self._cage.opened()
        with _trusting_nothing(self._either):
            return _CagedTemplate(self._cage, self._either, facts, eos_token_ids)

    def close(self) -> None:
        """End the process in which they run."""
        self._cage.close()


class _CagedTokenizer:
    """A `Tokenizer` whose work is done in the cage."""

    def __init__(self, cage: Cage, blame: str, facts: Any) -> None:
        self._cage, self._blame = cage, blame
        self.vocab_size = int(facts["vocab_size"])
        self.bos_id, self.eos_id = (_optional_int(facts[name]) for name in ("bos_id", "eos_id"))
        self.adds_bos = bool(facts["adds_bos"])
        self.control_tokens: Mapping[str, int] = {
            str(token): int(i) for token, i in facts["control_tokens"].items()
        }

    def encode(self, text: str) -> list[int]:
        return self._ids("encode", text)

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        return self._ids("encode_template", text, dict(inserts or {}))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._cage.ask(Request(self._blame, "decode", (list(ids),))))

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def _ids(self, method: str, *arguments: object) -> list[int]:
        return _ids(self._cage.ask(Request(self._blame, method, arguments)), self._blame)


class _CagedTemplate:
    """A `Template` whose work is done in the cage."""

    def __init__(self, cage: Cage, blame: str, facts: Any, eos_token_ids: Collection[int]) -> None:
        self._cage, self._blame = cage, blame
        self.continues_prompt = bool(facts["continues_prompt"])
        self.stop_ids = frozenset([*eos_token_ids, *_ids(facts["stop_ids"], blame)])

    def encode(self, messages: Sequence[Message]) -> list[int]:
        said = [(m.role, m.content, m.ids) for m in messages]
        return _ids(self._cage.ask(Request(self._blame, "encode_messages", (said,))), self._blame)


@contextmanager
def _trusting_nothing(blame: str) -> Iterator[None]:
    """For what a child said of itself: whoever broke it may say anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise CheckpointError(f"{blame} gives an answer that cannot be used") from None


def _ids(value: Any, blame: str) -> list[int]:
    if isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
        return value
    raise CheckpointError(f"{blame} gives an answer that cannot be used")


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
