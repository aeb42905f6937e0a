"""The chat in the terminal: reads a line, streams the answer, until somebody leaves."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory

from mixchat.chat.sanitize import sanitize
from mixchat.chat.session import ChatSession, Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Generator

    from mixchat.chat.session import Event

HELP = """\
/help    show this
/clear   forget the conversation
/experts show which experts were used, and where they are
/bye     leave (so does Ctrl-D)
Ctrl-C   stop the answer; at the prompt, clear the line, and twice: leave"""

# `/etc/hosts is empty` is a question, `/exit` is not.
_COMMAND = re.compile(r"/(\w*|\?)(?=\s|$)")

_ENDINGS = {
    "interrupted": "(stopped)",
    "length": "(cut off at --max-tokens)",
    "context": "(cut off: the context is full; /clear begins anew)",
}


class Repl:
    """One chat, with `model` as its name for the model.

    What fails in a turn is handed to `report`; a turn's end to `after_turn`.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        report: Callable[[Exception], object],
        after_turn: Callable[[Finished], None] = lambda finished: None,
        prompt: PromptSession[str] | None = None,
        out: TextIO | None = None,
        model: str = "",
    ) -> None:
        self.session = session
        self._model = model
        self._report = report
        self._after_turn = after_turn
        self._prompt = prompt or PromptSession(history=InMemoryHistory())
        self._out = out or sys.stdout
        self._about_to_leave = False

    def run(self) -> None:
        """Read and answer until Ctrl-D, `/bye`, or Ctrl-C twice."""
        stays = True
        while stays:
            try:
                stays = self._turn()
            except EOFError:
                return
            except KeyboardInterrupt:
                stays = self._stays_after_ctrl_c()

    def _turn(self) -> bool:
        """Read a line and act on it. False if it was the one to leave."""
        text = self._prompt.prompt(">>> ").strip()
        self._about_to_leave = False
        if command := _COMMAND.match(text):
            return self._obey(command[1])
        if text:
            self._answer(text)
        return True

    def _stays_after_ctrl_c(self) -> bool:
        """The first Ctrl-C clears the line, a second one leaves, unless something was typed."""
        if self._about_to_leave and not self._prompt.default_buffer.text:
            return False
        self._about_to_leave = True
        self._say("(Ctrl-C again, Ctrl-D or /bye leaves)")
        return True

    def _obey(self, command: str) -> bool:
        """Carry out a command. False if it was the one to leave."""
        if command in ("bye", "exit", "quit"):
            return False
        if command == "clear":
            self.session.clear()
            self._say("(a new conversation)")
        elif command == "experts":
            self._show_experts()
        elif command in ("help", "?"):
            self._say(HELP)
        else:
            self._say(f"/{command} is no command; /help shows them all")
        return True

    def _show_experts(self) -> None:
        from mixchat.chat.heatmap import drawn

        self._say(drawn(self.session.engine.expert_report(self._model), self._out))

    def _answer(self, text: str) -> None:
        try:
            with _ctrl_c_stops(self.session):
                finished = self._stream(text)
        except KeyboardInterrupt:
            self._say("\n(stopped)\n")
        except Exception as error:
            self._say("")
            self._report(error)
        else:
            self._after_turn(finished)

    def _stream(self, text: str) -> Finished:
        """Show the answer as it comes."""
        events = cast("Generator[Event, None, None]", self.session.ask(text))
        with closing(events):
            for event in events:
                if isinstance(event, TextDelta):
                    self._out.write(sanitize(event.text))
                    self._out.flush()
                else:
                    note = _ENDINGS.get(event.reason)
                    self._say(f"\n{note}\n" if note else "\n")
                    return event
        raise AssertionError("an answer has an end")

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


@contextmanager
def _ctrl_c_stops(session: ChatSession) -> Iterator[None]:
    """Ctrl-C ends the answer after the next token; if that may take long, at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not session.interrupt():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
