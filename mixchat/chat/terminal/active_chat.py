"""The chat in the terminal: reads a text, runs a command or asks, shows the answer, saves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.base import interrupts
from mixchat.base.errors import MixchatError
from mixchat.base.quantities import format_count
from mixchat.chat.plain_text import is_url
from mixchat.chat.printing import cut_off_note, one_line
from mixchat.chat.terminal.open_chat import OpenChat
from mixchat.chat.terminal.status_line import NEARLY_FULL, Figures
from mixchat.chat.terminal.typeahead import unseen_keys

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.saved.saved_chat import SavedChat
    from mixchat.chat.session import ChatEvent, ChatSession
    from mixchat.chat.terminal.prompt import ChatPrompt
    from mixchat.chat.terminal.screen import Screen
    from mixchat.face.events import End
    from mixchat.text.messages import Message

RunCommand = Callable[["ActiveChat", str, str], None]
LEAVING = ("bye", "exit", "quit")
"""Words that leave without a slash, as in a shell or Python."""
# `/etc/hosts is empty` is a question, `/exit` is not. What has several lines is one, too, unless it
# is a system prompt or the input of a prompt.
_COMMAND = re.compile(r"/(\w*|\?)(?:[ \t]+(.*))?")
_LONG = re.compile(r"/(?:set[ \t]+(?=system\b))?(system|prompt)[ \t]+(\S.*)", re.DOTALL)


class ActiveChat:
    """A chat on a screen. Its model may still be loading, and is waited for when it is needed.

    `attached` has the texts that go before the next question, by the names of their files. `at_end`
    saves the KV cache.
    """

    def __init__(self, opened: OpenChat, screen: Screen, at_end: ExitStack) -> None:
        self._opened = opened
        self.screen = screen
        self._at_end = at_end
        self.store = opened.store
        self.models = opened.models
        self.attached: dict[str, str] = {}
        self.left = False  # this turn is the last one
        self.draft = ""  # the last question, offered at the prompt, whose text replaces it
        self._warned = self._is_open = False
        self._given_up: list[Message] = []  # turns that a person was told cannot be saved

    def open(self) -> OpenChat:
        """Wait for the model and for its KV cache, unless they are there."""
        if not self._is_open:
            try:
                self._opened.wait()
                self._at_end.enter_context(self._opened.cache)
            except Exception:
                self.left = True  # there is nothing to chat with
                raise
            self._is_open = True
            self._figures = Figures(self._opened.saver)
        return self._opened

    @property
    def saver(self) -> ChatSaver:
        return self.open().saver

    @property
    def session(self) -> ChatSession:
        return self.saver.session

    def run(self, prompt: ChatPrompt, run_command: RunCommand) -> None:
        """Read and answer until Ctrl-D, `/bye`, or Ctrl-C twice.

        `run_command` is called with the chat, the name of a command and its argument.
        """
        about_to_leave = False
        while not (self.left and self._may_leave()):
            try:
                self._turn(prompt, run_command)
                about_to_leave = False
            except EOFError:
                self.left = True
            except KeyboardInterrupt:
                # Ctrl-C stops a text that was sent. It clears one that was typed.
                was_about = about_to_leave
                about_to_leave = not (prompt.sent or prompt.typed)
                if prompt.sent:
                    self.screen.say("(stopped)\n")
                    self._note_attached()
                elif about_to_leave and was_about:
                    self.left = True
                elif about_to_leave:
                    self.screen.say("(Ctrl-C again, Ctrl-D or /bye leaves)")

    def _may_leave(self) -> bool:
        """Return whether the chat may end: it is saved, or a person leaves in spite of an error."""
        try:
            if self._is_open:
                self._save_at_end()
        except MixchatError as error:
            self._opened.reporter.error(error)
            self.left = False
        return self.left

    def _save_at_end(self) -> None:
        """Save a chat that is left, if that has failed before.

        If it fails again, raise `MixchatError` once for these turns, so that they can be exported.
        """
        turns = list(self.session.history)
        if self.saver.fault is None or turns == self._given_up:
            return
        try:
            with interrupts.deferred(), interrupts.saving():
                self.saver.save_or_raise()
        except MixchatError as error:
            self._given_up = turns
            error.hint = "/export FILE saves it elsewhere. To lose it, do the same again."
            raise

    def _turn(self, prompt: ChatPrompt, run_command: RunCommand) -> None:
        """Read one text. Run it as a command, or ask it."""
        draft = self.draft
        self.draft = ""
        # The thread that loads the model may print notes, which belong above the prompt.
        with nullcontext() if self._opened.is_open else prompt.notes_above():
            text = prompt.read(draft).strip()
        command = _COMMAND.fullmatch(text) or _LONG.fullmatch(text)
        typed = not prompt.quoted and text != draft
        # `exit` alone went to the model, which said good-bye, and the chat went on.
        if typed and text.lower() in LEAVING:
            self.left = True
        elif command and typed:
            worked = True
            try:
                with unseen_keys():
                    run_command(self, command[1], (command[2] or "").strip())
            except Exception as error:
                if self.left:  # without a model
                    raise
                self._opened.reporter.error(error)
                worked = False
            prompt.history.command_ended(worked=worked)
            self._count_figures()
        elif text or self.attached:
            prompt.history.command_ended(worked=True)  # of what only begins like one
            with unseen_keys():
                self.open()
            self.ask(self.with_files(text), instead=bool(draft))

    def with_files(self, text: str) -> str:
        """Return a text after the attached ones. A question can be all files."""
        return "\n\n".join(filter(None, (*self.attached.values(), text)))

    def ask(self, question: str, *, instead: bool = False) -> None:
        """Answer a question that has the attached files, or that one `instead` of the last."""
        history = self.session.history
        ask = self.session.ask_instead if instead else self.session.ask
        try:
            self.answer(ask(question))
        finally:  # Ctrl-C may come when the answer is there
            if self.session.history is not history:
                self.attached.clear()
        self._note_attached()

    def answer(self, events: Iterator[ChatEvent], said: str = "") -> None:
        """Show an answer, or the rest of one that has `said` something, and save the chat."""
        history = self.session.history
        try:
            # The first Ctrl-C waits for a token, which is remembered. The next one does not.
            with interrupts.stopping(self.session.interrupt), unseen_keys(self.screen.pause):
                end = self.screen.show(
                    events,
                    said,
                    lambda: self._figures.line(is_answering=True),
                    shows_thinking=self.session.shows_thinking,
                    expected=self._opened.reading_time.seconds,
                )
        except KeyboardInterrupt:
            self.screen.say("(stopped)\n")
        except Exception as error:
            self._opened.reporter.error(error)
            if self.session.history is not history:  # the server has gone in the middle
                self.screen.say("(what came is kept; /continue resumes it)\n")
        else:
            note = self._note_on(end, said, remembered=self.session.history is not history)
            self.screen.say(f"({note})\n" if note else "")
            self._figures.turn(end)
            self._opened.reading_time.note(end.stats)
            self._warn_of_context(told=end.reason == "context")
            self._opened.after_turn(end)
        finally:  # also if the terminal has been closed
            if self.session.history is not history:
                with interrupts.deferred(), interrupts.saving():
                    self.saver.save()

    def _note_on(self, end: End, said: str, *, remembered: bool) -> str:
        """Return why an answer is not whole, and what to type then, or nothing."""
        if end.reason == "interrupted":
            return "stopped; /continue resumes it" if remembered else "stopped"
        if end.reason == "length":
            more = "/continue resumes it, /set max-tokens N"
            return cut_off_note(end.stats.generated_tokens, more, is_thinking=end.is_thinking)
        if end.reason == "context" and self.session.overflow == "drop-oldest":
            return "cut off: the context is full; /continue leaves the oldest turns out"
        if end.reason == "context":
            has_earlier = len(self.session.history) > 2
            drop = ", /set overflow drop-oldest leaves old turns out" if has_earlier else ""
            return f"cut off: the context is full; /clear starts a new chat{drop}"
        if end.reason == "stop" and end.is_thinking:
            return "the model thought, but ended without an answer"
        if end.reason == "stop" and self.session.history[-1].content == said:
            return "the model ended the answer at once"
        return ""

    def resume(self, chat: SavedChat) -> None:
        """Continue a saved chat in place of this one."""
        self._save_at_end()
        self.open().cache.leave_chat()
        with interrupts.deferred():  # else one chat's turns could be saved as another's
            self.saver.resume(chat)
            self.attached.clear()
        self.open().cache.enter_chat()
        self.show_last_turn()

    def start_new(self) -> None:
        """Start a new chat. The old one stays as it was saved."""
        self._save_at_end()
        self.open().cache.leave_chat()
        # Ctrl-C in between would save the new conversation over the old one.
        with interrupts.deferred():
            self.session.clear()
            self.saver.start_new()
            self.attached.clear()

    def change_model(self, name: str) -> None:
        """Continue with another model. Raises `MixchatError` if it cannot be loaded."""
        try:
            self.models.check(name, self.saver.model)
            with self.open().cache.changing_model():
                self._opened.change(name)
        except KeyboardInterrupt:
            self.screen.say(f"(stopped; the model is still {one_line(self.saver.model)})")
            return
        finally:
            self.left = self.session.is_closed
        self._figures = Figures(self.saver)
        self._warned = False
        self.saver.save()
        self.screen.say(f"(the model is {one_line(name)} from here on)")
        self._warn_of_context()

    def other_models(self) -> list[str]:
        """Return the names of the models that the chat may change to."""
        return self.models.others(self._opened.name)

    def show_last_turn(self) -> None:
        """Show the last turn of a chat that was resumed, and how many came before it."""
        history = self.session.history
        self._count_figures()
        turns = sum(message.role == "user" for message in history)
        if turns > 1:
            self.screen.say(f"({format_count(turns - 1, 'earlier turn')})")
        questions = [i for i, message in enumerate(history) if message.role == "user"]
        self.screen.show_turns(history[questions[-1] if questions else 0 :])

    def attach(self, source: str, text: str) -> None:
        """Put the text of a file or a web page before the next question."""
        self.attached[source] = text
        count = f"{len(text):,} characters"
        name = source if is_url(source) else Path(source).name
        self.screen.say(f"({one_line(name)}, {count}, goes before the next question)")

    def status(self) -> str:
        """Return the status line, as wide as the terminal is now."""
        if not self._opened.is_open:
            return f"{self._opened.name} · loading"
        self.open()
        return self._figures.line()

    def _note_attached(self) -> None:
        if self.attached:  # without an answer, nothing is lost, and nothing hidden
            names = one_line(", ".join(self.attached))
            self.screen.say(f"({names} still goes before the next question; /read none drops it)\n")

    def _count_figures(self) -> None:
        # A command may have closed the engine, or been one that needs none.
        if self._is_open and not self.left:
            self._figures.count()

    def _warn_of_context(self, *, told: bool = False) -> None:
        """Warn once that the context is nearly full, unless a person was `told` that it is full."""
        used = self._figures.used
        size = self._figures.size
        if used is None or size is None:
            return
        full = used >= NEARLY_FULL * size
        if full and not self._warned and not told:
            policy = (
                "the oldest turns will be left out"
                if self.session.overflow == "drop-oldest"
                else "/clear starts a new chat, /set overflow drop-oldest leaves old turns out"
            )
            self.screen.say(f"({used:,} of {size:,} tokens of the context are used: {policy})\n")
        self._warned = full
