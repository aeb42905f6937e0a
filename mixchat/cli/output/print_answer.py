"""Prints one answer on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mixchat.base.errors import NoCodeError, UsageError
from mixchat.base.progress import Note
from mixchat.chat.printing import cut_off_note, left_out_note, show, show_piece

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession
    from mixchat.face.events import End, Event


@dataclass(frozen=True)
class OutputOptions:
    """The options of printing an answer."""

    as_json: bool = False
    extract: bool = False
    stream: bool = True
    raw: bool = False

    def check(self, is_chat: bool) -> None:
        """Raise `UsageError` for flags that do not go together."""
        if self.as_json and self.extract:
            raise UsageError("--json and --extract exclude each other")
        if is_chat and (self.as_json or self.extract):
            flag = "--json" if self.as_json else "--extract"
            raise UsageError(f"{flag} needs a question, not a chat", hint="Give a PROMPT.")
        if is_chat and not sys.stdout.isatty():
            raise UsageError("a chat needs a terminal to write to", hint="Give a PROMPT.")


def print_answer(
    session: ChatSession, question: str, output: OutputOptions, model: str, note: Note
) -> End:
    """Ask the question, print the answer, and return how it ended.

    Raises `KeyboardInterrupt` if interrupted, and `NoCodeError` if there is no code to extract.
    """
    if output.as_json or output.extract or not output.stream:
        end = _collect(session, question, lambda text: None, note)
        if end.reason != "interrupted":
            show(_formatted(session, end, output, model))
    elif sys.stdout.isatty():
        from mixchat.chat.terminal.screen import Screen

        events = session.ask(question)
        shows_thinking = session.shows_thinking
        end = Screen(raw=output.raw).show(events, shows_thinking=shows_thinking)
    else:
        # A shell's prompt must not follow the answer in its last line.
        last = ""

        def take(text: str) -> None:
            nonlocal last
            last = text or last
            show_piece(text)

        end = _collect(session, question, take, note)
        show_piece("" if last.endswith("\n") else "\n")
    if end.reason == "interrupted":
        raise KeyboardInterrupt
    for name in sorted(session.tools.refused) if session.tools is not None else ():
        note(f"a call of {name} was refused; --allow {name} lets it run")
    if end.reason == "stop" and end.is_thinking:
        note("the model thought, but ended without an answer")
    if end.reason == "context" and session.context is not None:
        size = session.context.tokens
        moment = " while the model was thinking" if end.is_thinking else ""
        note(f"the answer is cut off{moment}: the context of {size} tokens is full")
    if end.reason == "length" and (session.max_tokens is None or end.is_thinking):
        tokens = end.stats.generated_tokens
        is_thinking = end.is_thinking
        note(cut_off_note(tokens, "-n N", is_thinking=is_thinking))
    return end


def _collect(session: ChatSession, question: str, take: Callable[[str], object], note: Note) -> End:
    from mixchat.chat.terminal.screen import call_line
    from mixchat.chat.tools.toolbox import ToolStart
    from mixchat.face.events import End, LeftOut, Piece

    with closing(cast("Generator[Event, None, None]", session.ask(question))) as events:
        for event in events:
            if isinstance(event, Piece):
                take(event.text)
            elif isinstance(event, LeftOut):
                note(left_out_note(event.turns))
            elif isinstance(event, ToolStart):
                note(call_line(event.call))
            elif isinstance(event, End):
                return event
    raise AssertionError("an answer has an end")


def _formatted(session: ChatSession, end: End, output: OutputOptions, model: str) -> str:
    """Return the last answer, as JSON or its first code block if that was requested."""
    answer = session.history[-1].content
    if output.as_json:
        # A terminal would obey some characters.
        return json.dumps(as_json(session, end, model), ensure_ascii=sys.stdout.isatty())
    if not output.extract:
        return answer
    from mixchat.chat.saved.chat_text import code_blocks

    blocks = code_blocks(answer)
    if not blocks:
        raise NoCodeError(
            "the answer contains no code block",
            hint="Without -x, the whole answer is printed.",
        )
    return blocks[0]


def as_json(session: ChatSession, end: End, model: str) -> dict[str, Any]:
    """Return the last answer as JSON. The ids are null from a server, or if cut within a token.

    The key `thinking` is there if the model thought before it answered.
    """
    stats = end.stats
    answer = session.history[-1]
    context = session.context
    # The prefill generates the first token.
    decoded = stats.generated_tokens - 1
    seconds = stats.decode_seconds
    ids = answer.content_ids
    return {
        "model": model,
        "answer": answer.content,
        "ids": None if ids is None else list(ids),
        **({"thinking": answer.thinking} if answer.thinking else {}),
        "stop_reason": end.reason,
        "seed": end.seed,
        "usage": {
            "prompt_tokens": stats.prompt_tokens or None,  # a server may not tell
            "cached_tokens": stats.reused_tokens,
            "generated_tokens": stats.generated_tokens,
            "context_tokens": None if context is None else context.tokens,
        },
        "timings": {
            "prefill_seconds": round(stats.prefill_seconds, 4),
            "decode_seconds": round(seconds, 4),
            "tokens_per_second": round(decoded / seconds, 2) if decoded > 0 < seconds else None,
        },
    }
