"""A checkpoint's own chat template, in Jinja, safe against messages that forge a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from mixchat.base.errors import CheckpointError, PromptError, short_message
from mixchat.text.messages import (
    Message,
    Variables,
    as_parts,
    require_question,
    shown_thinking,
    system_in_question,
)
from mixchat.text.thinking import format_of
from mixchat.text.tokenizer import Insert, Tokenizer
from mixchat.text.tokenizer_files import ChatTemplate
from mixchat.text.tool_call import Tool, ToolCall
from mixchat.text.tool_formats import ToolFormat, one_call_each, tool_format_of

# Names and values in tools that templates compare, so they stay as they are. They are part of no
# control token.
_SCHEMA_WORDS = frozenset(
    [
        *("type", "function", "name", "description", "parameters", "arguments", "id"),
        *("properties", "required", "items", "enum", "default", "title", "format", "nullable"),
        *("anyOf", "oneOf", "allOf", "additionalProperties", "string", "number", "integer"),
        *("boolean", "array", "object", "null"),
    ]
)
_PRIVATE_USE = range(0x100000, 0x10FFFE)
_ESCAPED_COVER = re.compile(r"\\udb[c-f][0-9a-f]\\ud[c-f][0-9a-f]{2}")  # escapes of these


class JinjaTemplate:
    """A chat template, rendered as transformers' `apply_chat_template` does, for ids.

    The rendered text is encoded as one string. The template's control tokens count in it, control
    tokens in the messages do not (see `_Cover`). Answers with ids are inserted as these ids.
    """

    continues_prompt = False

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Compile `template` and render it once.

        `variables` are the special tokens by name (`bos_token`). Raises `CheckpointError` if the
        template has an error or tries to leave its sandbox.
        """
        self._file = template.file
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self.stop_ids: frozenset[int] = frozenset()
        # The template has these characters, so they cannot stand for characters of a message.
        self._reserved = {*template.source, *"".join(self._variables.values())}
        try:
            self._compiled, unset = compile_template(template.source)
        except MemoryError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self._file}: the chat template has an error: {short_message(error)}"
            ) from None
        self.thinking = format_of(template.source, unset)
        self.tools = tool_format_of(template.source, unset, tokenizer.control_tokens)
        with suppress(PromptError):  # the template may need other messages; `encode` reports that
            self._render([{"role": "user", "content": "Hi"}])

    def encode(
        self, messages: Sequence[Message], variables: Variables = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Encode as `Template` says. Raises `CheckpointError` if the template itself fails."""
        require_question(messages)
        # If a template omits the system text, it would be lost without a note.
        if any(m.role == "system" for m in messages) and not self._takes_system:
            messages = system_in_question(messages)
        if self.tools is not None:
            messages = self._with_its_calls(messages, self.tools)
        offered = [tool.to_json() for tool in tools]
        if self.tools is not None and self.tools.kind == "harmony":
            for tool in offered:  # harmony's template fails without a description
                tool["function"].setdefault("description", "")
        parts = [as_parts(message, variables) for message in messages]
        extras = json.dumps([offered, parts], ensure_ascii=False)
        used = self._reserved.union(*(message.content for message in messages), extras)
        cover = _Cover(self._tokenizer.control_tokens, used)
        covered = [
            cover.message(message, shown_thinking(message, variables)) for message in messages
        ]
        if self.thinking is not None and self.thinking.kind == "brackets":
            covered = [_in_chunks(message) for message in covered]
        text = self._render(covered, variables, cover.value(offered) or None)
        return self._tokenizer.encode_template(text, cover.inserts)

    def _with_its_calls(self, messages: Sequence[Message], format: ToolFormat) -> Sequence[Message]:
        """Return the conversation with calls that the template takes."""
        messages = format.with_its_ids(messages)
        if format.kind == "harmony":
            return one_call_each(messages)
        if not any(message.calls for message in messages) or self._takes_calls:
            return messages
        # Then the ids of an answer are those of its content and its calls, as a model writes them.
        encode = self._tokenizer.encode
        encoded = []
        opening, closing = map(self._tokenizer.encode_template, (format.opening, format.closing))
        for message in messages:
            if message.calls:
                calls = encode(format.text_of(message.calls).removesuffix(format.closing))
                ids = (*encode(message.content), *opening, *calls, *closing)
                message = Message("assistant", "", ids)
            encoded.append(message)
        return encoded

    @cached_property
    def _takes_calls(self) -> bool:
        """Return whether the template shows the calls of an answer. Some take them as its text."""
        probe = "mixchat_call_probe"
        call = ToolCall("123456789", probe, "{}").to_json()
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "123456789"},
        ]
        return self._shows(probe, messages)

    @cached_property
    def _takes_system(self) -> bool:
        """Return whether the template shows a system message. Some refuse it, some omit it."""
        probe = "mixchat-system-probe"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "Hi"}]
        return self._shows(probe, messages)

    def _shows(self, probe: str, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return probe in self._render(messages)
        except (PromptError, CheckpointError):
            return False

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Variables = None,
        tools: Sequence[Any] | None = None,
    ) -> str:
        try:
            return self._compiled(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
                **(variables or {}),
            )
        except TemplateRefusal as refusal:
            raise PromptError(
                f"the model's chat template refuses the conversation: {short_message(refusal)}"
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # foreign code can raise anything
            reason = short_message(error) or type(error).__name__
            raise CheckpointError(f"{self._file}: the chat template fails: {reason}") from None


class _Cover:
    """Hides characters of the messages that could become a control token while the template runs.

    Each character of a message that begins or ends any control token is replaced by a character
    that occurs nowhere, and only the tokenizer restores it, inside plain text. Then no token can
    begin or end in a message, whatever a template trims, cuts or joins. A token may also take only
    its middle from a message ("<|" + "im_end" + "|>"). So a message that is part of a control token
    is replaced as a whole.

    Lengths stay the same, white space stays white space, and a message without such characters
    stays as it is. With `<|im_end|>` known, "a < b" is rendered as "a \U00100000 b".
    """

    def __init__(self, control_tokens: Iterable[str], used: Collection[str]) -> None:
        self._tokens = [token.strip() for token in control_tokens if token.strip()]
        self._ends = {token[0] for token in self._tokens} | {token[-1] for token in self._tokens}
        self._spare = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._replaced: dict[str, str] = {}
        self.inserts: dict[str, Insert] = {}

    def content(self, message: Message) -> str:
        """Return a message's covered content, or one character that stands for its ids."""
        ids = message.content_ids
        if ids is None:
            return self._text(message.content)
        char = next(self._spare)
        self.inserts[char] = ids
        return char

    def message(self, message: Message, thinking: str) -> dict[str, Any]:
        """Return a message as templates know it, with its thinking if they may show it."""
        covered = {"role": message.role, "content": self.content(message)}
        if message.calls:
            covered["tool_calls"] = self.value([call.to_json() for call in message.calls])
        if thinking:
            covered |= dict.fromkeys(("reasoning_content", "thinking"), self._text(thinking))
        return covered | ({"tool_call_id": self._text(message.call_id)} if message.call_id else {})

    def value(self, json_value: Any) -> Any:
        """Return JSON with its texts covered, except for words that templates look for."""
        if isinstance(json_value, dict):
            return {self.value(name): self.value(value) for name, value in json_value.items()}
        if isinstance(json_value, list):
            return [self.value(item) for item in json_value]
        if isinstance(json_value, str) and json_value not in _SCHEMA_WORDS:
            return self._text(json_value)
        return json_value

    def _text(self, content: str) -> str:
        """Return `content` with its dangerous characters replaced."""
        core = content.strip()
        whole = core != "" and any(core in token for token in self._tokens)
        covered = "".join(
            self._replace(char) if (whole or char in self._ends) and not char.isspace() else char
            for char in content
        )
        return content if covered == content else _CoveredText(covered, content, self._text)

    def _replace(self, char: str) -> str:
        if char not in self._replaced:
            self._replaced[char] = spare = next(self._spare)
            self.inserts[spare] = char
        return self._replaced[char]


def _in_chunks(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its thinking in its content, where Mistral's templates look for it."""
    thinking = message.get("thinking")
    if thinking is None:
        return message
    text = [{"type": "text", "text": message["content"]}] if message["content"] else []
    content = [{"type": "thinking", "thinking": thinking, "closed": True}, *text]
    rest = {name: value for name, value in message.items() if name in ("role", "tool_calls")}
    return rest | {"content": content}


class _CoveredText(str):
    """A covered text that sorts as the text itself does. Its `repr` is the text's, covered.

    Gemma's template sorts the names of arguments. LFM2's writes a list as Python does, which would
    escape the characters of the cover.
    """

    # Jinja's sandbox denies templates these names.
    _plain: str
    _cover: Callable[[str], str]

    def __new__(cls, covered: str, plain: str, cover: Callable[[str], str]) -> _CoveredText:
        text = super().__new__(cls, covered)
        text._plain = plain
        text._cover = cover
        return text

    def __lt__(self, other: str) -> bool:
        return self._plain < getattr(other, "_plain", other)

    def __gt__(self, other: str) -> bool:
        return self._plain > getattr(other, "_plain", other)

    def __repr__(self) -> str:
        return self._cover(repr(self._plain))

    def lower(self) -> str:
        return self._cover(self._plain.lower())


class TemplateRefusal(Exception):
    """The template called `raise_exception`, because it cannot express this conversation."""


def compile_template(source: str) -> tuple[Callable[..., str], Collection[str]]:
    """Return a function that renders a chat template with transformers' helpers, and its variables.

    Only the sandbox process limits its time and memory. Rendering raises `TemplateRefusal` if the
    template refuses the messages, and any other exception if it is broken or hostile.
    """
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training. Here it only has content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it like this)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateRefusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    variables = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source).render, variables


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # The characters of a cover stand for ASCII ones.
    return _ESCAPED_COVER.sub(lambda match: json.loads(f'"{match[0]}"'), text)
