"""A checkpoint's tokenizer and template, run in a sandbox; the rest of mixchat uses these."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixchat.text.messages import Message
from mixchat.text.sandbox import Request, Sandbox, unusable
from mixchat.text.template import Template
from mixchat.text.tokenizer import Insert, TokenBytes, Tokenizer
from mixchat.text.tokenizer_files import template_file


class CheckpointText:
    """The tokenizer and the template of one checkpoint.

    Both load in the background from the moment this is created.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer_subject = f"{directory}: the tokenizer"
        self._both_subject = f"{directory}: the chat template or the tokenizer"
        self._sandbox = Sandbox(
            "mixchat.text.sandbox_child",
            [
                Request(self._tokenizer_subject, "load_tokenizer"),
                Request(f"{template_file(directory)}: the chat template", "load_template"),
            ],
            str(directory),
        )

    def tokenizer(self) -> Tokenizer:
        """Wait until both are loaded, and return the tokenizer.

        Raises `CheckpointError` where one is damaged, or exceeds its limits.
        """
        facts, _ = self._sandbox.opened()
        with _checking_facts(self._tokenizer_subject):
            return _SandboxedTokenizer(self._sandbox, self._tokenizer_subject, facts)

    def template(self, eos_token_ids: Collection[int] = ()) -> Template:
        """Wait until both are loaded, and return the template.

        `eos_token_ids` are those of config.json. Raises `CheckpointError` as `tokenizer` does.
        """
        _, facts = self._sandbox.opened()
        with _checking_facts(self._both_subject):
            return _SandboxedTemplate(self._sandbox, self._both_subject, facts, eos_token_ids)

    def close(self) -> None:
        """End the sandbox."""
        self._sandbox.close()


class _SandboxedTokenizer:
    """A `Tokenizer` that runs in the sandbox."""

    def __init__(self, sandbox: Sandbox, subject: str, facts: Any) -> None:
        self._sandbox, self._subject = sandbox, subject
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
        return str(self._sandbox.ask(Request(self._subject, "decode", (list(ids),))))

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def token_bytes(self) -> TokenBytes:
        value = self._sandbox.ask(Request(self._subject, "token_bytes"))
        with _checking_facts(self._subject):
            within = [str(text).encode("latin-1") for text in value["within"]]
            first = {int(i): str(text).encode("latin-1") for i, text in value["first"]}
        return TokenBytes(within, first)

    def _ids(self, method: str, *arguments: object) -> list[int]:
        return _ids(self._sandbox.ask(Request(self._subject, method, arguments)), self._subject)


class _SandboxedTemplate:
    """A `Template` that runs in the sandbox."""

    def __init__(
        self, sandbox: Sandbox, subject: str, facts: Any, eos_token_ids: Collection[int]
    ) -> None:
        self._sandbox, self._subject = sandbox, subject
        self.continues_prompt = bool(facts["continues_prompt"])
        self.stop_ids = frozenset([*eos_token_ids, *_ids(facts["stop_ids"], subject)])

    def encode(self, messages: Sequence[Message]) -> list[int]:
        plain = [(m.role, m.content, m.ids) for m in messages]
        return _ids(
            self._sandbox.ask(Request(self._subject, "encode_messages", (plain,))), self._subject
        )


@contextmanager
def _checking_facts(subject: str) -> Iterator[None]:
    """Raise `CheckpointError` for facts of the wrong form: a broken child may send anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise unusable(subject) from None


def _ids(value: Any, subject: str) -> list[int]:
    if isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
        return value
    raise unusable(subject)


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
