"""A backend that answers with an engine, and fits a conversation into its context."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from mixchat.base.errors import PromptTooLongError
from mixchat.base.model_config import BYTES_PER_TOKEN, Context
from mixchat.chat.answer import Answer, AnswerLimits, Reason
from mixchat.chat.backend import LEAVE_OUT_HINT
from mixchat.text.detokenizer import Detokenizer
from mixchat.text.messages import Message
from mixchat.text.thinking import AnswerText, parser_of

if TYPE_CHECKING:
    from mixchat.base.options import SamplingOptions
    from mixchat.chat.backend import OnPrefill, Turn
    from mixchat.engine.generate import Engine
    from mixchat.engine.sampling import Constraint
    from mixchat.engine.stats import GenerationStats
    from mixchat.text.form.constraint import StartConstraint
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

# Fractions of the context, as divisors. Old turns are left out if less room is left than the answer
# may need. That is --max-tokens, but at most 1/2, or 1/8 without it. Turns are then left out until
# 1/4 is free, because all that stays has to be prefilled again, which should be rare.
_MAX_NEEDED_DIVISOR, _DEFAULT_NEEDED_DIVISOR, _FREED_DIVISOR = 2, 8, 4


@dataclass(frozen=True)
class _Prompt:
    """The ids that a template has `made`, then the ids of the `begun` answer."""

    made: Sequence[int]
    begun: Sequence[int]

    @cached_property
    def ids(self) -> list[int]:
        return [*self.made, *self.begun]


class EngineBackend:
    """A `Backend`.

    advised_tokens: the length of answers that the model's makers advise. form: starts the
    constraint of each answer, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        advised_tokens: int | None = None,
        form: StartConstraint | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self._advised_tokens, self._form = advised_tokens, form

    @property
    def identity(self) -> str:
        return self.engine.identity

    @property
    def context(self) -> Context:
        return self.engine.context

    @property
    def stats(self) -> GenerationStats:
        return self.engine.stats

    @property
    def can_skip_thinking(self) -> bool:
        return self.template.thinking is not None and self.template.thinking.switch is not None

    def about(self) -> dict[str, str]:
        from mixchat.engine.report import slots_in_words

        return {"experts": slots_in_words(self.engine.slots_by_tier)}

    def longest_answer(self, max_tokens: int | None) -> int | None:
        # A small model may never end by itself, so there is a limit by default.
        if max_tokens is None:
            max_tokens = self._advised_tokens or self.context.usual_answer
        return max_tokens or None

    def used_tokens(self, messages: Sequence[Message]) -> int:
        """Return how many tokens the messages take, which may be more than fit."""
        least = _tokens_at_least(messages)
        if least > self.engine.context_size:
            return least
        *before, last = messages
        return len(self.template.encode(before)) + len(self._content_ids(last))

    def reply(self, turn: Turn, on_prefill: OnPrefill) -> EngineReply:
        prompt, first = self._fitted(turn)
        if len(prompt.ids) >= self.context.tokens:
            raise self._too_long(turn, first, len(prompt.ids))
        return EngineReply(
            self._generated(turn, prompt.ids, self._start_constraint(turn.before), on_prefill),
            self._start_answer(turn, prompt),
            turn.before,
            first,
        )

    def _generated(
        self,
        turn: Turn,
        prompt_ids: Sequence[int],
        constraint: Constraint | None,
        on_prefill: OnPrefill,
    ) -> Generator[int, None, None]:
        on_prefill(0, self._unread(prompt_ids))
        yield from self.engine.generate(
            prompt_ids,
            sampling=cast("SamplingOptions", turn.sampling),  # of which each option has a value
            stop_ids=self.template.stop_ids,
            max_tokens=self.longest_answer(turn.max_tokens),
            constraint=constraint,
            on_prefill=on_prefill,
        )

    def _content_ids(self, answer: Message) -> Sequence[int]:
        ids = answer.content_ids
        return self.tokenizer.encode(answer.content) if ids is None else ids

    def _prompt(self, turn: Turn, first: int) -> _Prompt:
        """Return the prompt of the messages from `first` on."""
        form, before = self.template.thinking, turn.before
        off = form is not None and (self._form is not None or not turn.may_think)
        variables = {form.switch: False} if form is not None and form.switch and off else {}
        ids = self.template.encode([*turn.system, *turn.messages[first:]], variables)
        if before is not None and before.ids is not None and before.thinking_tokens and not off:
            return _Prompt(ids, before.ids)
        begun = () if before is None else self._content_ids(before)
        if form is not None and (before is not None or self._form is not None):
            begun = (*form.to_answer(self.tokenizer, ids), *begun)
        return _Prompt(ids, begun)

    def _fitted(self, turn: Turn) -> tuple[_Prompt, int]:
        """Return the prompt, and the number of the first message in it."""
        first, size, messages = turn.first, self.engine.context_size, turn.messages
        later = turn.questions_after_first()
        while (known := _tokens_at_least(messages[first:])) > size:  # it need not be encoded
            if turn.overflow == "stop" or not later:
                raise self._too_long(turn, first, known)
            first = later.pop(0)
        whole = self._prompt(turn, first)
        limit = turn.max_tokens
        default = size // _DEFAULT_NEEDED_DIVISOR
        needed = min(limit, size // _MAX_NEEDED_DIVISOR) if limit else default
        if turn.overflow == "stop" or len(whole.ids) + max(needed, 1) <= size:
            return whole, first
        freed = max(needed, size // _FREED_DIVISOR)
        for at in later:
            prompt = self._prompt(turn, at)
            tokens = len(prompt.ids)
            if tokens + freed <= size or (at == later[-1] and tokens < size):
                return prompt, at
        return whole, first  # not even the last question fits

    def _too_long(self, turn: Turn, first: int, tokens: int) -> PromptTooLongError:
        """Return the error for a prompt that does not fit. Its hint says if old turns could go."""
        error, asked = self.context.prompt_too_long(tokens), turn.messages
        if len(asked) - first == 1:
            return error
        if len(self._prompt(turn, len(asked) - 1).ids) < self.context.tokens:
            error.hint = f"{LEAVE_OUT_HINT} {error.hint}"
        return error

    def _start_answer(self, turn: Turn, prompt: _Prompt) -> Answer:
        # A completion, or an answer that is continued, starts in the middle of a text, and its
        # spaces depend on the text before.
        context: Sequence[int] = ()
        if self.template.continues_prompt:
            context = prompt.ids
        elif turn.before is not None:
            context = prompt.begun
        limits = AnswerLimits(
            self.template.stop_ids,
            turn.stop,
            self.longest_answer(turn.max_tokens),
            self.context.tokens - len(prompt.ids),
        )
        parser = parser_of(self.template.thinking, self.tokenizer, prompt.made, prompt.begun)
        return Answer(Detokenizer(self.tokenizer.token_bytes, context), limits, parser)

    def _start_constraint(self, before: Message | None) -> Constraint | None:
        if self._form is None:
            return None
        start = () if before is None else self._content_ids(before)
        return self._form(start, continued=self.template.continues_prompt)

    def _unread(self, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt the engine has to process."""
        from mixchat.engine.passes import shared_beginning

        held, _ = self.engine.held()
        return max(len(prompt_ids) - shared_beginning(held, prompt_ids), 1)


class EngineReply:
    """A `Reply` of an engine, which generates `ids`. before: the answer that is continued."""

    def __init__(
        self, ids: Generator[int, None, None], answer: Answer, before: Message | None, first: int
    ) -> None:
        self.first, self._ids = first, ids
        self._answer, self._before = answer, before

    @property
    def reason(self) -> Reason:
        return self._answer.reason

    def texts(self) -> Iterator[AnswerText]:
        for token in self._ids:
            yield self._answer.add(token)
            if self._answer.has_ended:
                return

    def message(self) -> Message | None:
        return self._answer.message(self._before)

    def close(self) -> None:
        self._ids.close()


def _tokens_at_least(messages: Sequence[Message]) -> int:
    """Return the least number of tokens that these can have, without encoding them."""
    return sum(
        len(message.content) // BYTES_PER_TOKEN
        if (ids := message.content_ids) is None
        else len(ids)
        for message in messages
    )
