"""Opens a chat or asks one question, saves it, and changes its model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mixchat.base import interrupts
from mixchat.base.errors import ChatNotFoundError, MixchatError, ModelNotFoundError, ResourceError
from mixchat.base.options import ChatOptions
from mixchat.base.progress import Reporter
from mixchat.base.settings import data_dir
from mixchat.sessions.provider import ModelProvider, Predictor

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession, Finished
    from mixchat.chat.terminal.active_chat import AfterTurn, Predict

# Makes the report after each turn of a session.
NewReport = Callable[["ChatSession", Predictor], "AfterTurn"]


class OpenChat:
    """A model's session and its saver, and the `ChatModels` of the terminal.

    The saved chat `resumed` is continued with its settings, except for those in `except_for`.
    """

    def __init__(
        self,
        models: ModelProvider,
        name: str,
        options: ChatOptions,
        reporter: Reporter,
        *,
        new_report: NewReport,
        autosave: bool,
        resumed: SavedChat | None = None,
        except_for: Collection[str] = (),
    ) -> None:
        self._models, self._options, self._reporter = models, options, reporter
        self._new_report = new_report
        self.place = models.place
        self.session = models.open(name, options, resumed)
        self.saver = new_saver(self.session, name, reporter, autosave=autosave)
        if resumed is not None:
            self.saver.resume(resumed, except_for)

    def ask(self, answer: Callable[[ChatSession], Finished]) -> None:
        """Let `answer` ask one question, and save the answer."""
        after_turn, _ = self._hooks()
        with self._models.cache(self.saver, asks_once=True), saved_turn(self.saver):
            after_turn(answer(self.session))

    def talk(self, files: Mapping[Path, str], *, raw: bool, vi: bool) -> None:
        """Chat in the terminal. The texts of `files` go before the first question."""
        from mixchat.chat.terminal.active_chat import ActiveChat
        from mixchat.chat.terminal.commands import completions
        from mixchat.chat.terminal.prompt import ChatPrompt
        from mixchat.chat.terminal.repl import Repl
        from mixchat.chat.terminal.screen import Screen

        after_turn, predict = self._hooks()
        with self._models.cache(self.saver, asks_once=False) as cache:
            screen = Screen(raw=raw)
            context = self.session.context  # None if a server does not tell
            size = f" with a context of {context.tokens:,} tokens" if context else ""
            screen.say(f"{self.saver.model}{size}; /help shows the commands, Ctrl-D leaves")
            chat = ActiveChat(
                self.saver,
                screen,
                cache,
                models=self,
                report=self._reporter.error,
                after_turn=after_turn,
                predict=predict,
            )
            if self.session.history:
                chat.show_last_turn()
            for path, text in files.items():
                chat.attach(path, text)
            history = data_dir() / "history" if self.saver.autosave else None
            prompt = ChatPrompt(
                history, completions(chat), chat.status, vi=vi, warn=self._reporter.note
            )
            Repl(chat, prompt).run()

    def close(self) -> None:
        """Save the figures that `mixchat stats` shows."""
        save_report(self.session, self.saver.model)

    def others(self) -> list[str]:
        return self._models.others(self.saver.model)

    def check(self, name: str) -> None:
        self._models.check(name, self.saver.model)

    def change(self, name: str) -> tuple[AfterTurn, Predict]:
        engine, before = self.session.backend.engine, self.saver.model
        if engine is not None:
            save_report(self.session, before)
            engine.close()
        try:
            self._take(name)
        except (Exception, KeyboardInterrupt) as error:
            if engine is not None:
                _free_frames(error)
                with interrupts.deferred():
                    self._take_again(before, error)
            raise
        return self._hooks()

    def _take(self, name: str) -> None:
        opened = self._models.open(name, self._options)
        with interrupts.deferred():  # else the chat could be saved with the other model's name
            self.session.take_model(opened)
            self.saver.model = name

    def _take_again(self, name: str, reason: BaseException) -> None:
        try:
            self._take(name)
        except Exception as error:
            hint = getattr(error, "hint", None)
            raise MixchatError(
                f"{reason}; nor can {name} be loaded again: {error}", hint=hint
            ) from None

    def _hooks(self) -> tuple[AfterTurn, Predict]:
        predictor = self._models.predictor(self.session, self.saver.model)
        return self._new_report(self.session, predictor), _reading_seconds(predictor, self.session)


def find_chat(wanted: str | None) -> SavedChat | None:
    """Return the saved chat of this ID or name, or the last one. Raises `ChatNotFoundError`."""
    if wanted is None:
        return None
    from mixchat.chat.saved.chat_store import ChatStore

    try:
        return ChatStore().load(wanted)
    except ChatNotFoundError as error:
        if " " in wanted:  # it looks like a question
            error.hint = f"Put a PROMPT before --resume, or after --resume ID. {error.hint}"
        raise


def new_saver(session: ChatSession, model: str, reporter: Reporter, *, autosave: bool) -> ChatSaver:
    """Return the saver of a session's chat."""
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.saved.chat_store import ChatStore

    warn, note = reporter.error, reporter.note
    return ChatSaver(session, ChatStore(), model, autosave=autosave, warn=warn, note=note)


@contextmanager
def saved_turn(saver: ChatSaver) -> Iterator[None]:
    """Save the answer that the block brings, even if it could not be printed.

    Raises `ResourceError` if it cannot be saved. After another error, this one is only printed.
    """
    before = saver.session.history
    try:
        yield
    except BaseException:
        if saver.session.history is not before:
            with interrupts.deferred(), interrupts.saving():
                saver.save()
        raise
    if saver.session.history is not before:
        try:
            with interrupts.deferred(), interrupts.saving():
                saver.save_or_raise()
        except MixchatError as error:
            hint = "The answer is whole. Free some space, or set MIXCHAT_HOME to another place."
            raise ResourceError(str(error), hint=hint) from None


def save_report(session: ChatSession, model: str) -> None:
    """Save the figures of `mixchat stats`, if possible. A server has none."""
    from mixchat.engine.report import report_of, report_path, save_report

    engine = session.backend.engine
    if engine is None or engine.is_closed:
        return
    with suppress(OSError, ModelNotFoundError):
        save_report(report_path(model), report_of(engine, model))


def _reading_seconds(predictor: Predictor, session: ChatSession) -> Predict:

    def seconds(tokens: int, first: bool) -> float | None:
        predicted, engine = predictor(), session.backend.engine
        # If all experts fit, they come before anyone asks.
        fit = engine is not None and engine.experts.slots >= engine.blueprint.expert_count
        cold = first and (engine is None or not fit or engine.experts.is_filling)
        speed = None if predicted is None else predicted.prompt(tokens, cold=cold)
        return None if speed is None else 2 * tokens / (speed.low + speed.high)

    return seconds


def _free_frames(error: BaseException | None) -> None:
    """Drop the variables of an error's frames, which hold what was loaded."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
