"""A checkpoint's tokenizer and template. The rest of mixchat uses these.

Both are parsed and run in a sandbox, because their files are programs: a template can loop, and so
can a tokenizer's regular expressions. The sandbox sends the bytes of every token once. This process
turns tokens into text by that table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixchat.text.detokenizer import TokenBytes
from mixchat.text.messages import Message, Variables, as_parts
from mixchat.text.sandbox import Sandbox, SandboxCall, unusable
from mixchat.text.template import Template
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tokenizer import Insert, Tokenizer
from mixchat.text.tokenizer_files import template_file
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import FORMATS


def check_text(checkpoint: Path) -> None:
    """Raise `CheckpointError` if a checkpoint's tokenizer or template cannot be used."""
    with closing(CheckpointText(checkpoint)) as text:
        text.template()


class CheckpointText:
    """The tokenizer and the template of one checkpoint.

    Both load in the background as soon as the object is created.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer_subject = f"{directory}: the tokenizer"
        self._both_subject = f"{directory}: the chat template or the tokenizer"
        self._sandbox = Sandbox(
            "mixchat.text.sandbox_child",
            [
                SandboxCall(self._tokenizer_subject, "load_tokenizer"),
                SandboxCall(f"{template_file(directory)}: the chat template", "load_template"),
            ],
            str(directory),
        )

    def tokenizer(self) -> Tokenizer:
        """Wait until both are loaded, and return the tokenizer.

        Raises `CheckpointError` if one of them is damaged or exceeds its limits.
        """
        facts, _ = self._sandbox.opened()
        with _checking_facts(self._tokenizer_subject):
            return _SandboxedTokenizer(self._sandbox, self._tokenizer_subject, facts)

    def template(self, eos_token_ids: Collection[int] = ()) -> Template:
        """Wait until both are loaded, and return the template.

        `eos_token_ids` come from config.json. Raises `CheckpointError` as `tokenizer` does.
        """
        _, facts = self._sandbox.opened()
        with _checking_facts(self._both_subject):
            return _SandboxedTemplate(self._sandbox, self._both_subject, facts, eos_token_ids)

    def close(self) -> None:
        self._sandbox.close()


class _Sandboxed:
    """An object in the sandbox. Errors about it begin with `subject`."""

    def __init__(self, sandbox: Sandbox, subject: str) -> None:
        self._sandbox = sandbox
        self._subject = subject

    def _ask_ids(self, method: str, *arguments: object) -> list[int]:
        call = SandboxCall(self._subject, method, arguments)
        return _checked_ids(self._sandbox.ask(call), self._subject)


class _SandboxedTokenizer(_Sandboxed, Tokenizer):
    """Encodes in the sandbox, and decodes by a table, which no text can slow down."""

    def __init__(self, sandbox: Sandbox, subject: str, facts: Any) -> None:
        super().__init__(sandbox, subject)
        first, names = (
            {int(i): str(text).encode("latin-1") for i, text in facts[name]}
            for name in ("first", "names")
        )
        within = [str(text).encode("latin-1") for text in facts["within"]]
        self.token_bytes = TokenBytes(within, first, names)
        self.vocab_size = int(facts["vocab_size"])
        ids = (facts[name] for name in ("bos_id", "eos_id"))
        self.bos_id, self.eos_id = (None if i is None else int(i) for i in ids)
        self.adds_bos = bool(facts["adds_bos"])
        self.control_tokens: Mapping[str, int] = {
            str(token): int(i) for token, i in facts["control_tokens"].items()
        }

    def encode(self, text: str) -> list[int]:
        return self._ask_ids("encode", text)

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        return self._ask_ids("encode_template", text, dict(inserts or {}))


class _SandboxedTemplate(_Sandboxed):
    def __init__(
        self, sandbox: Sandbox, subject: str, facts: Any, eos_token_ids: Collection[int]
    ) -> None:
        super().__init__(sandbox, subject)
        self.continues_prompt = bool(facts["continues_prompt"])
        self.stop_ids = frozenset([*eos_token_ids, *_checked_ids(facts["stop_ids"], subject)])
        style, *variables = facts["thinking"] or [None]
        self.thinking = None if style is None else ThinkingFormat(style, tuple(variables))
        name = facts["tools"]
        self.tools = None if name is None else FORMATS[name]

    def encode(
        self, messages: Sequence[Message], variables: Variables = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        parts = [as_parts(message, variables) for message in messages]
        offered = [asdict(tool) for tool in tools]
        return self._ask_ids("encode_messages", parts, dict(variables or {}), offered)


@contextmanager
def _checking_facts(subject: str) -> Iterator[None]:
    """Raise `CheckpointError` for facts of the wrong form. A broken child may send anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise unusable(subject) from None


def _checked_ids(value: Any, subject: str) -> list[int]:
    if isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
        return value
    raise unusable(subject)
