"""Makes the prompt of a request: the ids that fit the context, and how to read the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeAlias

from mixchat.base.context import BYTES_PER_TOKEN, Context
from mixchat.base.errors import PromptError
from mixchat.face.request import FormError, Request, ToolOffer
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.messages import Message
from mixchat.text.template import CompletionTemplate
from mixchat.text.tool_formats import PLAIN, ToolFormat, in_plain_text
from mixchat.text.tool_parser import answer_parser

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.face.forms import FormCompiler
    from mixchat.text.template import Template
    from mixchat.text.thinking import ThinkingParser
    from mixchat.text.tokenizer import Tokenizer

MakeConstraint: TypeAlias = "Callable[[ThinkingParser, int], Constraint]"
# Returns the ids of a prompt from this message on, and how many of them begin the answer.
_Encode: TypeAlias = "Callable[[int], tuple[list[int], int]]"
LEAVE_OUT_HINT = (
    "The oldest turns can be left out: --overflow drop-oldest, or in a chat /set overflow "
    "drop-oldest; /clear starts a new chat."
)
# Fractions of the context, as divisors. Old turns are left out if less room is left than the answer
# may need. That is --max-tokens, but at most 1/2, or 1/8 without it. Turns are then left out until
# 1/4 is free, because all that stays has to be prefilled again, which should be rare.
_MAX_NEEDED_DIVISOR = 2
_DEFAULT_NEEDED_DIVISOR = 8
_FREED_DIVISOR = 4
_HARMONY_TOKENS = ("<|channel|>", "<|constrain|>", "<|message|>")


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, of which the last `begun` begin the answer.

    continues: the answer's text continues the prompt's, so that its first word keeps its space.
    answered: the message that the answer is joined to. left_out: the messages that did not fit.
    tools: the form of calls of the tools `offered`. thinks: whether the answer may think.
    """

    ids: tuple[int, ...]
    begun: int = 0
    continues: bool = False
    thinks: bool = False
    answered: Message | None = None
    left_out: Sequence[Message] = ()
    tools: ToolFormat | None = None
    offered: ToolOffer | None = None
    constraint: MakeConstraint | None = None


class PromptMaker:
    """Makes prompts for one model, in any thread."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, context: Context, forms: FormCompiler
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._context = context
        self._forms = forms

    def parser(self, prompt: Prompt) -> ThinkingParser:
        """Return the parser of the answer to a prompt."""
        start = len(prompt.ids) - prompt.begun
        return answer_parser(
            self._template.thinking if prompt.thinks else None,
            prompt.tools,
            self._tokenizer,
            prompt.ids[:start],
            prompt.ids[start:],
            () if prompt.offered is None else prompt.offered.callable,
        )

    def make(self, request: Request, at_end: ExitStack | None = None) -> Prompt:
        """Return the prompt of a request, which takes seconds for a long conversation.

        `at_end` ends the check of a form if it is closed. Raises `PromptError` if the conversation
        is empty or too long, and `FormError`.
        """
        if request.prompt is not None:
            return self._continued(request, at_end)
        messages = list(request.messages)
        if not messages:
            raise PromptError("there is nothing to answer: the conversation is empty")
        answered = messages.pop() if messages[-1].role == "assistant" else None
        begun = self._content_ids(answered)
        thinking = self._template.thinking
        variables = dict(request.variables)
        tools = None if request.tools is None else self._template.tools or PLAIN
        constraint, must_match = self._constraint(request, tools, begun, at_end)
        think = False if must_match else request.think
        if thinking is not None and thinking.switch is not None and think is not None:
            variables[thinking.switch] = think

        # Calls in harmony's channels follow a prompt that leads to no channel yet.
        has_channel = tools is not None and tools.kind == "harmony" and must_match
        leads = thinking is not None and (answered is not None or must_match) and not has_channel
        thought = answered is not None and answered.thinking_tokens and answered.ids
        if thought and think is not False:
            begun = thought
            leads = False
        system = list(takewhile(lambda message: message.role == "system", messages))
        talk = messages[len(system) :]

        def encoded(first: int) -> tuple[list[int], int]:
            ids = self._encoded([*system, *talk[first:]], variables, request.tools)
            lead = thinking.to_answer(self._tokenizer, ids) if thinking and leads else []
            return [*ids, *lead, *begun], len(lead) + len(begun)

        ids, own, first = self._fitted(request, talk, encoded)
        return Prompt(
            tuple(ids),
            own,
            continues=answered is not None or self._template.continues_prompt,
            thinks=True,
            answered=answered,
            left_out=talk[:first],
            tools=tools,
            offered=request.tools,
            constraint=constraint,
        )

    def used_tokens(self, messages: Sequence[Message]) -> int:
        """Return how many tokens the messages take, which may be more than fit."""
        least = _tokens_at_least(messages)
        if least > self._context.tokens:
            return least
        *earlier, last = messages
        return len(self._encoded(earlier, {}, None)) + len(self._content_ids(last))

    def _continued(self, request: Request, at_end: ExitStack | None) -> Prompt:
        """Return the prompt of a text or of ids, which the answer continues."""
        assert request.prompt is not None
        if isinstance(request.prompt, str):
            self._context.check_text(request.prompt, "the prompt")
            template = CompletionTemplate(self._tokenizer, add_bos=self._tokenizer.adds_bos)
            ids = template.encode([Message("user", request.prompt)])
        else:
            ids = list(request.prompt)
        if not ids:
            raise PromptError("the prompt is empty")
        if request.form is None:
            return Prompt(tuple(ids), continues=True)
        start = self._forms.compile(request.form, at_end)
        return Prompt(
            tuple(ids),
            continues=True,
            constraint=lambda parser, room: start((), continued=True, room=room),
        )

    def _content_ids(self, answer: Message | None) -> Sequence[int]:
        if answer is None:
            return ()
        ids = answer.content_ids
        return self._tokenizer.encode(answer.content) if ids is None else ids

    def _constraint(
        self,
        request: Request,
        tools: ToolFormat | None,
        begun: Sequence[int],
        at_end: ExitStack | None,
    ) -> tuple[MakeConstraint | None, bool]:
        """Return what makes the answer's constraint, and whether it begins with the answer.

        An answer that may call a tool is free until it opens a call. All others have their form
        from the start, and so no thinking.
        """
        offer = request.tools
        continued = self._template.continues_prompt
        if offer is None or tools is None:
            if request.form is None:
                return None, False
            start = self._forms.compile(request.form, at_end)
            return lambda parser, room: start(begun, continued=continued, room=room), True
        schema = request.form
        if isinstance(schema, OutputConstraint):
            schema = schema.text if schema.schema is None else dict(schema.schema)
        if schema is not None and not isinstance(schema, dict):
            raise FormError("a grammar and tools exclude each other")
        known = self._tokenizer.control_tokens
        names = (*tools.marks, *(_HARMONY_TOKENS if tools.kind == "harmony" else ()))
        answer = None if offer.must_call else schema
        calls = CallForm(
            tools,
            offer.callable,
            {name: known[name] for name in names if name in known},
            offer.must_call or answer is not None,
            offer.parallel,
            answer,
        )
        start = self._forms.compile(calls, at_end)
        if calls.must_call:
            return lambda parser, room: start(begun, continued=continued), True

        def until_call(parser: ThinkingParser, room: int) -> Constraint:
            from mixchat.text.form.constraint import CallConstraint

            return CallConstraint(start(continued=True), parser, tools.opening, self._tokenizer)

        return until_call, False

    def _encoded(
        self, messages: Sequence[Message], variables: dict[str, object], offer: ToolOffer | None
    ) -> list[int]:
        template = self._template
        tools = () if offer is None else offer.tools
        if not tools and not any(message.calls for message in messages):
            return template.encode(messages, variables)
        if template.tools is None:
            return template.encode(in_plain_text(messages, tools), variables)
        return template.encode(messages, variables, tools)

    def _fitted(
        self, request: Request, talk: Sequence[Message], encoded: _Encode
    ) -> tuple[list[int], int, int]:
        """Return the ids that fit the context, those of the answer, and the first message in them.

        With "drop-oldest", the prompt may begin at any question. `encoded` takes the first message.
        """
        size = self._context.tokens
        first = 0
        drops = request.overflow == "drop-oldest"
        later = [i for i, message in enumerate(talk) if i and message.role == "user"]
        tools = () if request.tools is None else request.tools.tools
        extra = sum(len(json.dumps(tool.to_json())) for tool in tools) // BYTES_PER_TOKEN
        while (known := _tokens_at_least(talk[first:]) + extra) > size:  # it need not be encoded
            if not drops or not later:
                raise self._too_long(talk, first, known, encoded)
            first = later.pop(0)
        ids, begun = encoded(first)
        if drops:
            limit = request.max_tokens
            default = size // _DEFAULT_NEEDED_DIVISOR
            needed = min(limit, size // _MAX_NEEDED_DIVISOR) if limit else default
            freed = 0 if len(ids) + max(needed, 1) <= size else max(needed, size // _FREED_DIVISOR)
            for start in later if freed else ():
                shorter, own = encoded(start)
                if len(shorter) + freed <= size or (start == later[-1] and len(shorter) < size):
                    return shorter, own, start
        if len(ids) >= size:
            raise self._too_long(talk, first, len(ids), encoded)
        return ids, begun, first

    def _too_long(
        self, talk: Sequence[Message], first: int, tokens: int, encoded: _Encode
    ) -> PromptError:
        """Return the error for a prompt that does not fit. Its hint says if old turns could go."""
        error = self._context.prompt_too_long(tokens)
        last = len(talk) - 1
        if first < last and talk[last].role == "user":
            size = self._context.tokens
            if _tokens_at_least(talk[last:]) < size and len(encoded(last)[0]) < size:
                error.hint = f"{LEAVE_OUT_HINT} {error.hint}"
        return error


def _tokens_at_least(messages: Sequence[Message]) -> int:
    """Return the least number of tokens that these can have, without encoding them.

    Many messages may share the same thinking, so a prompt can be larger than its request.
    """
    tokens = characters = 0
    for message in messages:
        ids = message.content_ids
        tokens += len(message.content) // BYTES_PER_TOKEN if ids is None else len(ids)
        if message.calls:
            characters += len(message.thinking) + sum(len(c.arguments) for c in message.calls)
    return tokens + characters // BYTES_PER_TOKEN
