"""A chat, whichever API asks for it, turned into a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mixchat.serving.requests.errors import field_error, to_json
from mixchat.serving.requests.forms import FormFields, MakeConstraint, compiled, constraint_of
from mixchat.serving.requests.options import LoadedModel
from mixchat.serving.requests.tools import ToolOffer
from mixchat.serving.service import Job, Service
from mixchat.text.form.call_form import CallForm
from mixchat.text.messages import Message
from mixchat.text.tool_formats import PLAIN, ToolFormat, in_plain_text

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.text.thinking import ThinkingParser

_HARMONY_TOKENS = ("<|channel|>", "<|constrain|>", "<|message|>")


def chat_job(
    job: Job,
    model: LoadedModel,
    messages: list[Message],
    variables: dict[str, Any],
    offer: ToolOffer | None,
    form: FormFields,
) -> Job:
    """Return `job` with the prompt of a chat. This takes seconds for a long conversation.

    A last message of the assistant begins the answer. `variables` are for the template's thinking.
    `offer` is None if no tool may be called. Raises `RequestError` and `PromptError`.
    """
    service, compile_form = model.service, model.compile_form
    template, tokenizer, thinking = service.template, service.tokenizer, service.template.thinking
    messages, variables = list(messages), dict(variables)
    if _characters(messages, offer) > service.context.longest_text:
        raise service.context.text_too_long("the prompt")
    continued = messages[-1].role == "assistant"
    begun = tokenizer.encode(messages.pop().content) if continued else []
    continues = template.continues_prompt
    format = None if offer is None else template.tools or PLAIN
    if offer is None or format is None:
        constraint = constraint_of(form, compile_form, begun, continues)
        skips_thinking = constraint is not None
    else:
        calls = _call_form(offer, format, form, service)
        constraint = _call_constraint(calls, begun, model)
        skips_thinking = calls.must_call
    if skips_thinking and thinking is not None and thinking.switch is not None:
        variables[thinking.switch] = False
    ids = _encoded(messages, variables, offer, service)
    has_channels = format is not None and format.kind == "harmony" and skips_thinking
    if thinking is not None and (continued or skips_thinking) and not has_channels:
        begun = [*thinking.to_answer(tokenizer, ids), *begun]
    return replace(
        job,
        prompt_ids=(*ids, *begun),
        constraint=constraint,
        continues_prompt=continued or continues,
        thinking=thinking,
        begun=len(begun),
        tools=format,
        offered=() if offer is None else offer.callable,
    )


def _characters(messages: Sequence[Message], offer: ToolOffer | None) -> int:
    """Return the characters of a prompt. Many messages may share the same thinking."""
    count = sum(len(message.content) for message in messages)
    for message in messages:
        if message.calls:
            count += len(message.thinking) + sum(len(call.arguments) for call in message.calls)
    tools = () if offer is None else offer.tools
    return count + sum(len(to_json(tool.to_json())) for tool in tools)


def _encoded(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    offer: ToolOffer | None,
    service: Service,
) -> list[int]:
    template, tools = service.template, () if offer is None else offer.tools
    if not tools and not any(message.calls for message in messages):
        return template.encode(messages, variables)
    if template.tools is None:
        return template.encode(in_plain_text(messages, tools), variables)
    return template.encode(messages, variables, tools)


def _call_form(
    offer: ToolOffer, format: ToolFormat, form: FormFields, service: Service
) -> CallForm:
    if form.grammar:
        raise field_error("grammar", "and tools exclude each other")
    known = service.tokenizer.control_tokens
    harmony = _HARMONY_TOKENS if format.kind == "harmony" else ()
    tokens = {name: known[name] for name in (*format.marks, *harmony) if name in known}
    answer = None if offer.must_call else form.answer_schema()
    must_call = offer.must_call or answer is not None
    return CallForm(format, offer.callable, tokens, must_call, offer.parallel, answer)


def _call_constraint(form: CallForm, begun: Sequence[int], model: LoadedModel) -> MakeConstraint:
    start = compiled(form, model.compile_form, "tools", "invalid_schema")
    service = model.service
    tokenizer, continues = service.tokenizer, service.template.continues_prompt

    def make(parser: ThinkingParser) -> Constraint:
        from mixchat.text.form.constraint import CallConstraint

        if form.must_call:
            return start(begun, continued=continues)
        return CallConstraint(start(continued=True), parser, form.format.opening, tokenizer)

    return make
