"""`mixchat run`: a chat in the terminal, or one answer for a prompt or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mixchat.chat.sanitize import sanitize
from mixchat.cli import options
from mixchat.cli.arguments import checked, read_prompt
from mixchat.cli.opening import Opening
from mixchat.cli.prompt_cache import checked_place, keeping
from mixchat.cli.report import note, report
from mixchat.errors import UsageError
from mixchat.experts.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession, Event, Finished


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to ask. Standard input goes before it."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="NAME",
            envvar="MIXCHAT_MODEL",
            help="base, instruct, demo, ORG/NAME, or one that 'mixchat list' shows.",
        ),
    ] = "instruct",
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT", help="The system prompt.")
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    ctx_size: options.ContextSize = None,
    kv_bits: options.KVBits = None,
    host_memory: options.HostMemory = None,
    device_memory: options.DeviceMemory = None,
    device: options.Device = None,
    cache_policy: options.CachePolicy = DEFAULT_POLICY,
    prompt_cache: options.PromptCache = None,
    trace: options.Trace = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print rates and the experts' cache afterwards.")
    ] = False,
) -> None:
    """Chat with a model; or, with a PROMPT or a pipe, print one answer."""
    sampling = options.Sampling(temperature, top_p, top_k, min_p, repeat_penalty, seed)
    sampling.check()
    options.check_lengths(max_tokens, ctx_size)
    opening = Opening(
        model=checked(model, "the model's name"),
        system=checked(system, "--system") if system else None,
        stop=[checked(text, "--stop") for text in stop or []],
        sampling=sampling,
        max_tokens=max_tokens,
        context_size=ctx_size,
        kv_bits=options.checked_bits(kv_bits),
        host_memory=options.budget(host_memory),
        device_memory=options.budget(device_memory),
        device=device,
        cache_policy=options.checked_policy(cache_policy),
        trace=trace,
    )
    cache_file = checked_place(prompt_cache)
    question = read_prompt(prompt)
    if question is None and not sys.stdout.isatty():
        raise UsageError("a chat needs a terminal to write to", hint="Give a PROMPT.")
    session = opening.open()
    after_turn = _verbose_report(session) if verbose else _nothing
    try:
        with keeping(cache_file, session.engine):
            if question is None:
                _chat(session, model, after_turn)
            else:
                after_turn(_answer(session, question))
    finally:
        _keep_report(session, model)


def _keep_report(session: ChatSession, model: str) -> None:
    """For `mixchat stats`. A full disk is no reason to complain about a good answer."""
    from mixchat.cli.reports import report_path, save_report

    with suppress(OSError):
        save_report(report_path(model), session.engine.expert_report(model))


def _chat(session: ChatSession, model: str, after_turn: Callable[[Finished], None]) -> None:
    from mixchat.chat.repl import Repl

    print(f"{sanitize(model)}; /help shows the commands, Ctrl-D leaves")
    Repl(session, report=report, after_turn=after_turn, model=model).run()


def _answer(session: ChatSession, question: str) -> Finished:
    """Print the answer as it comes: a reader that goes away is noticed at the next token."""
    from mixchat.chat.session import TextDelta

    # A program that reads gets what the model wrote; a terminal would act on it.
    clean = sanitize if sys.stdout.isatty() else str
    last = ""
    with closing(cast("Generator[Event, None, None]", session.ask(question))) as events:
        for event in events:
            if isinstance(event, TextDelta):
                last = event.text
                print(clean(last), end="", flush=True)
            else:
                print(end="" if last.endswith("\n") else "\n", flush=True)
                return _checked_ending(session, event)
    raise AssertionError("an answer has an end")


def _checked_ending(session: ChatSession, finished: Finished) -> Finished:
    if finished.reason == "interrupted":
        raise KeyboardInterrupt
    if finished.reason == "context":
        size = session.engine.context_size
        note(f"cut off, the context of {size} tokens is full")
    return finished


def _verbose_report(session: ChatSession) -> Callable[[Finished], None]:
    from mixchat.cli.verbose import VerboseReport

    return VerboseReport(session.engine)


def _nothing(finished: Finished) -> None:
    """What follows a turn unless --verbose asks for more."""
