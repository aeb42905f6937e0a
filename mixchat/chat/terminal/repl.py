"""The chat in the terminal: reads a line, obeys or answers, until somebody leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from mixchat import interrupts
from mixchat.chat.answer import cut_off
from mixchat.chat.printing import one_line
from mixchat.chat.session import ChatSession, Finished
from mixchat.chat.terminal import commands
from mixchat.chat.terminal.status import NEARLY_FULL, Figures, status_line
from mixchat.chat.terminal.typeahead import unseen_keys
from mixchat.errors import MixchatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import Event
    from mixchat.chat.terminal.completion import CommandCompletion
    from mixchat.chat.terminal.screen import Screen

# `/etc/hosts is empty` is a question, `/exit` is not. What has several lines is one, too, unless it
# is a system prompt.
_COMMAND = re.compile(r"/(\w*|\?)(?:[ \t]+(.*))?")
_SYSTEM = re.compile(r"/(?:set[ \t]+)?(system)[ \t]+(\S.*)", re.DOTALL)

_ENDINGS = {
    "interrupted": "(stopped)",
    "context": "(cut off: the context is full; /clear begins anew)",
}


class Prompt(Protocol):
    """What a person types."""

    typed: bool  # something, when Ctrl-C came
    quoted: bool  # the text that was read: no command then

    def read(self, default: str = "") -> str: ...


class Cache(Protocol):
    """Keeps the engine's KV cache with the chat that the saver has now."""

    def load(self) -> None: ...

    def save(self) -> None: ...


class _NoCache:
    def load(self) -> None: ...

    def save(self) -> None: ...


# What completes after a slash, and the bottom line, to what reads lines with them.
MakePrompt = Callable[["Mapping[str, CommandCompletion]", Callable[[], str]], Prompt]


class Repl:
    """One chat, with `model` as its name for the model.

    What fails in a turn is handed to `report`; a turn's end to `after_turn`.
    """

    def __init__(
        self,
        session: ChatSession,
        screen: Screen,
        saver: ChatSaver,
        make_prompt: MakePrompt,
        *,
        report: Callable[[Exception], object],
        after_turn: Callable[[Finished], None] = lambda finished: None,
        model: str = "",
    ) -> None:
        self.session, self.screen, self.saver, self.model = session, screen, saver, model
        self._report, self._after_turn = report, after_turn
        self._prompt = make_prompt(commands.completions(self), self._status)
        self.cache: Cache = _NoCache()
        self._about_to_leave = self._left = False
        self.attached: dict[str, str] = {}  # texts that go before the next question, by their names
        self._draft = ""
        self._warned = False
        self._figures = Figures(session)

    def run(self) -> None:
        """Read and answer until Ctrl-D, `/bye`, or Ctrl-C twice."""
        while not self._left:
            try:
                self._turn()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._after_ctrl_c()

    def leave(self) -> None:
        """This turn is the last one."""
        self._left = True

    def resume(self, chat: SavedChat) -> None:
        """Go on with a kept chat."""
        self.cache.save()
        with interrupts.held():  # else one chat's turns could be saved as another's
            self.saver.resume(chat)
            self.attached.clear()
        self.cache.load()
        self.show(chat)

    def begin(self) -> None:
        """A new conversation; the old one stays as it is kept."""
        self.cache.save()
        with interrupts.held():
            self.session.clear()
            self.saver.begin()
            self.attached.clear()

    def show(self, chat: SavedChat) -> None:
        """Show the last turns of the chat that is gone on with."""
        self._figures.count()
        turns = sum(message.role == "user" for message in chat.messages)
        if turns > 1:
            self.screen.say(f"({turns - 1} earlier {'turn' if turns == 2 else 'turns'})")
        self.screen.show_turns(chat.messages[-2:])

    def attach(self, path: Path, text: str) -> None:
        """Put the text of a file before the next question."""
        self.attached[str(path)] = text
        count = f"{len(text):,} characters"
        self.screen.say(f"({one_line(path.name)}, {count}: goes before the next question)")

    def edit(self, question: str) -> None:
        """Offer the last question to be changed; it is replaced when that is sent."""
        self._draft = question

    def answer(self, events: Iterator[Event], said: str = "") -> None:
        """Show an answer, or the rest of one that has `said` something; and keep it."""
        before = self.session.history
        try:
            with interrupts.stopping(self.session.interrupt), unseen_keys(self.screen.pause):
                finished = self._shown(events, said)
        except KeyboardInterrupt:
            self.screen.say("(stopped)\n")
        except Exception as error:
            self._report(error)
        else:
            self._ended(finished, said=self.session.history is not before)
        finally:  # also where the terminal has been closed
            if self.session.history is not before:
                with interrupts.held(), interrupts.saving():
                    self.saver.save()

    def _shown(self, events: Iterator[Event], said: str) -> Finished:
        with self.screen.waiting() as self.session.engine.reading:
            return self.screen.show(events, said)

    def _turn(self) -> None:
        """Read a text and act on it."""
        draft, self._draft = self._draft, ""
        text = self._prompt.read(draft).strip()
        self._about_to_leave = False
        command = _COMMAND.fullmatch(text) or _SYSTEM.fullmatch(text)
        typed = not self._prompt.quoted and text != draft
        if typed and text.lower() in commands.LEAVING:
            self.leave()
        elif command and typed:
            self._obey(command[1], (command[2] or "").strip())
        elif text or self.attached:
            self._ask(text, instead=bool(draft))

    def _ask(self, text: str, *, instead: bool) -> None:
        question = "\n\n".join(part for part in (*self.attached.values(), text) if part)
        before = self.session.history
        try:
            events = (self.session.ask_instead if instead else self.session.ask)(question)
        except MixchatError as error:
            self._report(error)
            return
        try:
            self.answer(events)
        finally:  # Ctrl-C may come when the answer is there
            if self.session.history is not before:
                self.attached.clear()
        if self.attached:  # it was not answered: nothing is lost, and nothing hidden
            names = one_line(", ".join(self.attached))
            self.screen.say(f"({names}: still before the next question; /read none drops that)\n")

    def _obey(self, name: str, argument: str) -> None:
        try:
            with unseen_keys():
                commands.run(self, name, argument)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            self._report(error)
        self._figures.count()

    def _after_ctrl_c(self) -> None:
        """The first Ctrl-C clears the line, a second one leaves, unless something was typed."""
        if self._about_to_leave and not self._prompt.typed:
            self.leave()
            return
        self._about_to_leave = True
        self.screen.say("(Ctrl-C again, Ctrl-D or /bye leaves)")

    def _ended(self, finished: Finished, said: bool) -> None:
        note = _ENDINGS.get(finished.reason)
        if finished.reason == "interrupted" and said:
            note = "(stopped; /continue goes on)"
        elif finished.reason == "length":
            more = "/continue continues, /set max-tokens N"
            note = f"({cut_off(finished.stats.generated_tokens, more)})"
        elif finished.reason == "context" and self.session.overflow == "drop-oldest":
            note = "(cut off: the context is full; /continue leaves the oldest turns out)"
        elif finished.reason == "stop" and finished.stats.generated_tokens <= 1:
            note = "(the model has nothing to say)"
        self.screen.say(f"{note}\n" if note else "")
        self._figures.turn(finished)
        self._warn_of_context()
        self._after_turn(finished)

    def _warn_of_context(self) -> None:
        used, size = self._figures.used, self.session.engine.context_size
        full = used >= NEARLY_FULL * size
        if full and not self._warned:
            policy = (
                "the oldest turns will be left out"
                if self.session.overflow == "drop-oldest"
                else "/clear begins anew, /set overflow drop-oldest leaves the oldest turns out"
            )
            self.screen.say(f"({used:,} of {size:,} tokens of the context are used: {policy})\n")
        self._warned = full

    def _status(self) -> str:
        figures, width = self._figures, shutil.get_terminal_size().columns
        return status_line(
            self.model,
            figures.used,
            self.session.engine.context_size,
            speed=figures.speed,
            hit_rate=figures.hit_rate,
            memory=figures.memory,
            width=width,
        )
