"""The chat that is open in the terminal, on which the loop and the commands act."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mixchat.base import interrupts
from mixchat.chat.printing import cut_off_note, one_line
from mixchat.chat.terminal.status_line import NEARLY_FULL, Figures
from mixchat.chat.terminal.typeahead import unseen_keys
from mixchat.face.reading_time import ReadingTime

if TYPE_CHECKING:
    from mixchat.chat.saved.cache_saver import CacheSaver
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.terminal.screen import Screen
    from mixchat.face.events import End, Event

AfterTurn = Callable[["End"], None]
_ENDINGS = {
    "interrupted": "(stopped)",
    "context": "(cut off: the context is full; /clear starts a new chat)",
}


class ChatModels(Protocol):
    """The models that a chat may change to, and their `place`."""

    place: str

    def others(self) -> list[str]:
        """Return the names of the other models. It is called while a name is typed."""

    def check(self, name: str) -> None:
        """Raise `MixchatError` if the chat cannot change to a model. Changes nothing."""

    def change(self, name: str) -> tuple[AfterTurn, ReadingTime]:
        """Put a model in place of the chat's. Returns its `after_turn` and `reading_time`.

        Raises `MixchatError` if it cannot be loaded. Then the old model is loaded again. If that
        fails as well, the session's engine stays closed.
        """


class ActiveChat:
    """A chat on a screen, with its session, its saver, its KV cache and its models.

    An error of a turn is passed to `report`, the end of an answer to `after_turn`. `attached` has
    the texts that go before the next question, by the names of their files.
    """

    def __init__(
        self,
        saver: ChatSaver,
        screen: Screen,
        cache: CacheSaver,
        *,
        models: ChatModels,
        report: Callable[[Exception], object],
        after_turn: AfterTurn,
        reading_time: ReadingTime | None = None,
    ) -> None:
        self.session, self.saver, self.screen = saver.session, saver, screen
        self.report, self._after_turn = report, after_turn
        self.attached: dict[str, str] = {}
        self.left = False  # this turn is the last one
        self.draft = ""  # the last question, offered at the prompt, whose text replaces it
        self._cache, self.models = cache, models
        self._warned = False
        self._figures = Figures(self.session)
        self._reading = reading_time or ReadingTime()

    def resume(self, chat: SavedChat) -> None:
        self._cache.leave_chat()
        with interrupts.deferred():  # else one chat's turns could be saved as another's
            self.saver.resume(chat)
            self.attached.clear()
        self._cache.enter_chat()
        self.show_last_turn()

    def start_new(self) -> None:
        """Start a new chat. The old one stays as it was saved."""
        self._cache.leave_chat()
        with interrupts.deferred():
            self.session.clear()
            self.saver.start_new()
            self.attached.clear()

    def change_model(self, name: str) -> None:
        """Continue with another model. Raises `MixchatError` if it cannot be loaded."""
        try:
            self.models.check(name)
            with self._cache.changing_model():
                self._after_turn, self._reading = self.models.change(name)
        except KeyboardInterrupt:
            self.screen.say(f"(stopped; the model is still {one_line(self.saver.model)})")
            return
        finally:
            self.left = self.session.is_closed
        self._figures, self._warned = Figures(self.session), False
        self.saver.save()
        self.screen.say(f"(the model is {one_line(name)} from here on)")
        self._warn_of_context()

    def show_last_turn(self) -> None:
        """Show the last turn of a chat that was resumed, and how many came before it."""
        self.count_figures()
        history = self.session.history
        turns = sum(message.role == "user" for message in history)
        if turns > 1:
            self.screen.say(f"({turns - 1} earlier {'turn' if turns == 2 else 'turns'})")
        self.screen.show_turns(history[-2:])

    def attach(self, path: Path, text: str) -> None:
        """Put the text of a file before the next question."""
        self.attached[str(path)] = text
        count = f"{len(text):,} characters"
        self.screen.say(f"({one_line(path.name)}, {count}, goes before the next question)")

    def ask(self, text: str, *, instead: bool) -> None:
        """Ask, with the texts of files before it. With `instead`, replace the last question."""
        question = "\n\n".join(part for part in (*self.attached.values(), text) if part)
        before = self.session.history
        ask = self.session.ask_instead if instead else self.session.ask
        try:
            self.answer(ask(question))
        finally:  # Ctrl-C may come when the answer is there
            if self.session.history is not before:
                self.attached.clear()
        self._note_attached()

    def stopped(self) -> None:
        """Note that Ctrl-C came before what was typed was begun."""
        self.screen.say("(stopped)\n")
        self._note_attached()

    def answer(self, events: Iterator[Event], said: str = "") -> None:
        """Show an answer, or the rest of one that has `said` something, and save the chat."""
        before = self.session.history
        try:
            with (
                interrupts.stopping(self.session.interrupt),
                unseen_keys(self.screen.pause),
            ):
                end = self.screen.show(
                    events,
                    said,
                    self._status_now,
                    shows_thinking=self.session.think == "show",
                    expected=self._reading.seconds,
                )
        except KeyboardInterrupt:
            self.screen.say("(stopped)\n")
        except Exception as error:
            self.report(error)
            if self.session.history is not before:  # the server has gone in the middle
                self.screen.say("(what came is kept; /continue resumes it)\n")
        else:
            self._ended(end, said, remembered=self.session.history is not before)
        finally:  # also if the terminal has been closed
            if self.session.history is not before:
                with interrupts.deferred(), interrupts.saving():
                    self.saver.save()

    def _note_attached(self) -> None:
        if self.attached:  # without an answer, nothing is lost, and nothing hidden
            names = one_line(", ".join(self.attached))
            self.screen.say(f"({names} still goes before the next question; /read none drops it)\n")

    def count_figures(self) -> None:
        """Count what the status line shows again, after a command may have changed it."""
        if not self.left:
            self._figures.count()

    def status(self) -> str:
        """Return the status line, as wide as the terminal is now."""
        return self._figures.line(self.saver.model, shutil.get_terminal_size().columns)

    def _status_now(self) -> str:
        return self._figures.line_now(self.saver.model, shutil.get_terminal_size().columns)

    def _ended(self, end: End, said: str, remembered: bool) -> None:
        note = _ENDINGS.get(end.reason)
        if end.reason == "interrupted" and remembered:
            note = "(stopped; /continue resumes it)"
        elif end.reason == "length":
            more = "/continue resumes it, /set max-tokens N"
            tokens = end.stats.generated_tokens
            note = f"({cut_off_note(tokens, more, is_thinking=end.is_thinking)})"
        elif end.reason == "context" and self.session.overflow == "drop-oldest":
            note = "(cut off: the context is full; /continue leaves the oldest turns out)"
        elif end.reason == "stop" and end.is_thinking:
            note = "(the model thought, but ended without an answer)"
        elif end.reason == "stop" and self.session.history[-1].content == said:
            note = "(the model ended the answer at once)"
        self.screen.say(f"{note}\n" if note else "")
        self._figures.turn(end)
        self._reading.note(end.stats)
        self._warn_of_context()
        self._after_turn(end)

    def _warn_of_context(self) -> None:
        used, size = self._figures.used, self._figures.size
        if used is None or size is None:
            return
        full = used >= NEARLY_FULL * size
        if full and not self._warned:
            policy = (
                "the oldest turns will be left out"
                if self.session.overflow == "drop-oldest"
                else "/clear starts a new chat, /set overflow drop-oldest leaves old turns out"
            )
            self.screen.say(f"({used:,} of {size:,} tokens of the context are used: {policy})\n")
        self._warned = full
