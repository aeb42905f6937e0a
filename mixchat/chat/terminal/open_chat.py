"""Opens a chat or asks one question, saves it, and changes its model."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from mixchat.base import interrupts
from mixchat.base.errors import (
    ChatNotFoundError,
    MixchatError,
    ModelNotFoundError,
    PromptError,
    ResourceError,
)
from mixchat.base.model_config import DEFAULT_TOKENS
from mixchat.base.options import ChatOptions
from mixchat.base.progress import Reporter
from mixchat.base.settings import data_dir
from mixchat.chat.terminal.loading import Loading
from mixchat.face.numbers import with_numbers
from mixchat.face.reading_time import Predictor, ReadingTime

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.saved.cache_saver import CacheSaver
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.session import ChatSession, ModelProvider
    from mixchat.chat.terminal.active_chat import AfterTurn
    from mixchat.face.events import End
    from mixchat.text.form.output_constraint import OutputConstraint
    from mixchat.text.template import Template


@dataclass(frozen=True)
class Saving:
    """The files of a chat: its text if `autosave`, and its KV cache.

    cache: the file of the KV cache for all chats of a run. keep_caches: one for each chat.
    """

    autosave: bool = True
    cache: Path | None = None
    keep_caches: bool = False


class Resumed(NamedTuple):
    """A saved chat that is continued with its settings, except for those in `except_for`."""

    chat: SavedChat
    except_for: Collection[str] = ()


# Makes the report after each turn of a session.
NewReport = Callable[["ChatSession", Predictor], "AfterTurn"]


class OpenChat:
    """A model's session and its saver, for a question or a chat in the terminal."""

    def __init__(
        self,
        models: ModelProvider,
        name: str,
        options: ChatOptions,
        reporter: Reporter,
        *,
        new_report: NewReport,
        saving: Saving,
        form: OutputConstraint | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        from mixchat.chat.saved.chat_store import ChatStore

        self._store = ChatStore()
        self.models, self._name, self._options, self._reporter = models, name, options, reporter
        self._new_report, self._form, self._saving = new_report, form, saving
        self._resumed = resumed
        self._is_open = False

    def open(self, *, shown: bool = True) -> None:
        """Load the model, and show that if `shown`. Any thread may do it."""
        from mixchat.chat.saved.chat_saver import ChatSaver

        resumed, reporter = self._resumed, self._reporter
        self.session = self._open(self._name, resumed and resumed.chat, shown=shown)
        self.saver = ChatSaver(
            self.session,
            self._store,
            self._name,
            autosave=self._saving.autosave,
            warn=reporter.error,
            note=reporter.note,
        )
        if resumed is not None:
            self.saver.resume(*resumed)
        self._is_open = True

    def ask(self, answer: Callable[[ChatSession], End]) -> None:
        """Let `answer` ask one question. Save what came, even if it could not be printed.

        Raises `ResourceError` if it cannot be saved. After another error, this one is only printed.
        """
        self.open()
        after_turn, _ = self._hooks()
        history = self.session.history
        with self._cache_saver():
            try:
                after_turn(answer(self.session))
            except BaseException:
                if self.session.history is not history:
                    with interrupts.deferred(), interrupts.saving():
                        self.saver.save()
                raise
            if self.session.history is history:
                return
            with suppress(MixchatError), interrupts.deferred(), interrupts.saving():
                self.saver.save_or_raise()
            self._raise_fault("The answer is whole. ")

    def talk(self, files: Mapping[Path, str], *, raw: bool, vi: bool) -> None:
        """Chat in the terminal. The texts of `files` go before the first question.

        The model of a new chat is loaded behind the prompt.
        """
        from mixchat.chat.terminal.active_chat import ActiveChat, Opened
        from mixchat.chat.terminal.commands import completions, run_command
        from mixchat.chat.terminal.prompt import ChatPrompt
        from mixchat.chat.terminal.screen import Screen

        # A resumed chat shows its last turn first. A KV cache may take long to read.
        waits = self._resumed is not None or self._saving.cache is not None
        behind = sys.stdout.isatty() and not waits and self.models.prepare(self._name)
        if not behind:
            self.open()
        screen, name = Screen(raw=raw), self._name
        screen.say(f"{name}; /help shows the commands, Ctrl-D leaves")
        loading = Loading(lambda: self.open(shown=False))
        with ExitStack() as stack:

            def is_loaded() -> bool:
                return not behind or loading.is_done

            def opened() -> Opened:
                if not is_loaded():
                    with self._reporter.status(f"loading {name}"):
                        loading.wait()
                cache = stack.enter_context(self._cache_saver())
                return Opened(self.saver, cache, *self._hooks())

            chat = ActiveChat(
                name,
                screen,
                self._store,
                opened,
                is_loaded=is_loaded,
                models=self.models,
                change_model=self.change,
                report=self._reporter.error,
            )
            if not behind and chat.open().saver.session.history:
                chat.show_last_turn()
            for path, text in files.items():
                chat.attach(path, text)
            history = data_dir() / "history" if self._saving.autosave else None
            prompt = ChatPrompt(
                history, completions(chat), chat.status, vi=vi, warn=self._reporter.note
            )
            if behind:
                # After the prompt is there, because Python's threads take turns.
                prompt.when_drawn(lambda: loading.start(prompt.end, prompt.redraw))
            chat.run(prompt, run_command)
            if self._is_open:
                self._raise_fault()

    def close(self) -> None:
        """Save the figures that `mixchat stats` shows."""
        if self._is_open:
            save_report(self.session, self.saver.model)

    def change(self, name: str) -> tuple[AfterTurn, ReadingTime]:
        """Put a model in place of the chat's. Returns what reports its turns, and its pace.

        Raises `MixchatError` if it cannot be loaded. Then the old model is loaded again. If that
        fails as well, the session's engine stays closed.
        """
        is_local, former = self.session.model.engine is not None, self.saver.model
        # Two models may not fit into memory together, so the old one goes before the new one comes.
        if is_local:
            save_report(self.session, former)
            self.session.model.close()
        try:
            self._take(name)
        except (Exception, KeyboardInterrupt) as error:
            if not is_local:
                raise
            # The variables of the error's frames hold what was loaded, and both may not fit.
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            try:
                with interrupts.deferred():
                    self._take(former)
            except Exception as second:
                hint = getattr(second, "hint", None)
                message = f"{error}; nor can {former} be loaded again: {second}"
                raise MixchatError(message, hint=hint) from None
            raise
        return self._hooks()

    def _raise_fault(self, comfort: str = "") -> None:
        """Raise `ResourceError` if the chat could not be saved."""
        if self.saver.fault is not None:
            hint = f"{comfort}Free some space, or set MIXCHAT_HOME to another place."
            raise ResourceError(str(self.saver.fault), hint=hint)

    def _open(
        self, name: str, resumed: SavedChat | None = None, *, shown: bool = True
    ) -> ChatSession:
        """Return a session with a model, whose context holds the `resumed` chat if possible."""
        from mixchat.chat.session import ChatSession

        def least_context(template: Template) -> int:
            """Return the tokens of the chat or of its KV cache, and of one more answer.

            A chat that leaves out old turns fits into every context. Its KV cache need not.
            """
            from mixchat.engine.prompt_cache import saved_tokens

            tokens = 0 if self._saving.cache is None else saved_tokens(self._saving.cache)
            if resumed is not None:
                tokens = max(tokens, saved_tokens(self._store.kv_path(resumed.id)))
                if self._options.overflow == "stop" and resumed.messages:
                    with suppress(PromptError):
                        tokens = max(tokens, len(template.encode(resumed.messages)))
            return tokens and tokens + DEFAULT_TOKENS // 4

        model = self.models.open(name, least_context, shown=shown)
        sampling = with_numbers(model.sampling, self._options.sampling)
        if model.engine is not None and sampling.seed is None:  # drawn here, to be shown
            sampling = replace(sampling, seed=secrets.randbelow(2**32))
        return ChatSession(model, sampling, self._options, self._form)

    def _cache_saver(self) -> CacheSaver:
        from mixchat.chat.saved.cache_saver import CacheSaver

        named, keep = self._saving.cache, self._saving.keep_caches
        return CacheSaver(self.saver, self._reporter, named=named, create=keep)

    def _take(self, name: str) -> None:
        opened = self._open(name)
        with interrupts.deferred():  # else the chat could be saved with the other model's name
            self.session.take_model(opened)
            self.saver.model = name

    def _hooks(self) -> tuple[AfterTurn, ReadingTime]:
        model = self.session.model
        predictor = self.models.predictor(model, self.saver.model)
        return self._new_report(self.session, predictor), ReadingTime(predictor, model.engine)


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


def save_report(session: ChatSession, model: str) -> None:
    """Save the figures of `mixchat stats`, if possible. A server has none."""
    from mixchat.engine.report import report_of, report_path, save_report

    engine = session.model.engine
    if engine is None or engine.is_closed:
        return
    with suppress(OSError, ModelNotFoundError):
        save_report(report_path(model), report_of(engine, model))
