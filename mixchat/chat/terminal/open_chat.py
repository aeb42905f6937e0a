"""Opens a chat or asks one question, saves it, and changes its model."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
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
from mixchat.base.progress import Reporter, in_background
from mixchat.face.reading_time import Predictor, ReadingTime

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.saved.saved_chat import SavedChat
    from mixchat.chat.session import ChatSession, ModelProvider
    from mixchat.chat.tools.toolbox import Toolbox
    from mixchat.engine.generate import Engine
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


AfterTurn = Callable[["End"], object]
# Takes the engine, None if a server answers. Returns what reports each turn.
NewReport = Callable[["Engine | None", Predictor], AfterTurn]


class OpenChat:
    """A chat with a model, for a question or for the terminal.

    When its model is loaded, it has `session`, `saver`, `cache` (of keys and values), `after_turn`
    and `reading_time`.
    """

    def __init__(
        self,
        models: ModelProvider,
        name: str,
        options: ChatOptions,
        reporter: Reporter,
        *,
        saving: Saving,
        new_report: NewReport | None = None,
        form: OutputConstraint | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        from mixchat.chat.saved.chat_store import ChatStore

        self.models = models
        self.reporter = reporter
        self.store = ChatStore()
        self._name = name
        self._options = options
        self._form = form
        self.tools: Toolbox | None = None  # set before the chat opens
        self.saving = saving
        self._new_report = new_report
        self.resumed = resumed
        self.is_open = False
        self._loading: Future[None] | None = None

    @property
    def name(self) -> str:
        """Return the name of the model."""
        return self.saver.model if self.is_open else self._name

    def open(self, *, shown: bool = True) -> None:
        """Load the model, and show that if `shown`. Any thread may do it."""
        from mixchat.chat.saved.cache_saver import CacheSaver
        from mixchat.chat.saved.chat_saver import ChatSaver

        reporter = self.reporter
        saving = self.saving
        resumed = self.resumed
        self.session = self._new_session(self._name, resumed and resumed.chat, shown=shown)
        self.saver = ChatSaver(
            self.session,
            self.store,
            self._name,
            autosave=saving.autosave,
            warn=reporter.error,
            note=reporter.note,
        )
        if resumed is not None:
            self.saver.resume(*resumed)
        self.cache = CacheSaver(self.saver, reporter, named=saving.cache, create=saving.keep_caches)
        self._predict()
        self.is_open = True

    def start(self, failed: Callable[[BaseException], object], done: Callable[[], object]) -> None:
        """Open the chat in a thread, unless that was started. `failed` or `done` is called then."""
        if self._loading is None:
            self._loading = in_background(lambda: self.open(shown=False))
            self._loading.add_done_callback(
                lambda loaded: done() if (error := loaded.exception()) is None else failed(error)
            )

    def wait(self) -> None:
        """Wait until the chat is open. Raises the error of loading its model."""
        if not self.is_open:
            with self.reporter.status(f"loading {self._name}"):
                if self._loading is None:
                    self.open(shown=False)
                else:
                    self._loading.result()

    def ask(self, answer: Callable[[ChatSession], End]) -> None:
        """Let `answer` ask one question. Save what came, even if it could not be printed.

        Raises `ResourceError` if it cannot be saved. After another error, this one is only printed.
        """
        self.open()
        history = self.session.history
        with self.cache:
            try:
                self.after_turn(answer(self.session))
            except BaseException:
                if self.session.history is not history:
                    with interrupts.deferred(), interrupts.saving():
                        self.saver.save()
                raise
            if self.session.history is history:
                return
            with suppress(MixchatError), interrupts.deferred(), interrupts.saving():
                self.saver.save_or_raise()
            self.raise_fault("The answer is whole. ")

    def close(self) -> None:
        """Save the figures that `mixchat stats` shows."""
        if self.is_open:
            self._save_report()

    def change(self, name: str) -> None:
        """Put a model in place of the chat's.

        Raises `MixchatError` if it cannot be loaded. Then the old model is loaded again. If that
        fails as well, the session's engine stays closed.
        """
        is_local = self.session.model.engine is not None
        former = self.saver.model
        # Two models may not fit into memory together, so the old one goes before the new one comes.
        if is_local:
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

    def raise_fault(self, comfort: str = "") -> None:
        """Raise `ResourceError` if the chat could not be saved."""
        if self.is_open and self.saver.fault is not None:
            hint = f"{comfort}Free some space, or set MIXCHAT_HOME to another place."
            raise ResourceError(str(self.saver.fault), hint=hint)

    def _new_session(
        self, name: str, resumed: SavedChat | None = None, *, shown: bool = True
    ) -> ChatSession:
        """Return a session with a model, whose context holds the `resumed` chat if possible."""
        from mixchat.chat.session import ChatSession

        def least_context(template: Template) -> int:
            """Return the tokens of the chat or of its KV cache, and of one more answer.

            A chat that leaves out old turns fits into every context. Its KV cache need not.
            """
            from mixchat.engine.prompt_cache import saved_tokens

            tokens = 0 if self.saving.cache is None else saved_tokens(self.saving.cache)
            if resumed is not None:
                tokens = max(tokens, saved_tokens(self.store.kv_path(resumed.id)))
                if self._options.overflow == "stop" and resumed.messages:
                    with suppress(PromptError):
                        tokens = max(tokens, len(template.encode(resumed.messages)))
            return tokens and tokens + DEFAULT_TOKENS // 4

        model = self.models.open(name, least_context, shown=shown)
        options = self._options
        if model.engine is not None and options.sampling.get("seed") is None:  # to be shown
            sampling = {**options.sampling, "seed": secrets.randbelow(2**32)}
            options = replace(options, sampling=sampling)
        if self.tools is not None and not model.knows_tools:
            self.reporter.note(
                f"the template of {self._name} knows no tools: a text describes them, "
                "which the model may not follow"
            )
        return ChatSession(model, options, self._form, self.tools)

    def _take(self, name: str) -> None:
        opened = self._new_session(name)
        with interrupts.deferred():  # else the chat could be saved with the other model's name
            self.session.take_model(opened)
            self.saver.model = name
        self._predict()

    def _predict(self) -> None:
        """Make what predicts the speed of the model, and what reports turns beside that."""
        model = self.session.model
        predictor = self.models.predictor(model, self.saver.model)
        self.reading_time = ReadingTime(predictor, model.engine)
        new_report = self._new_report
        report = None if new_report is None else new_report(model.engine, predictor)
        self.after_turn: AfterTurn = report or (lambda end: None)

    def _save_report(self) -> None:
        """Save the figures of `mixchat stats`, if possible. A server has none."""
        from mixchat.engine.report import report_of, save_report
        from mixchat.face.local_models import report_path

        engine = self.session.model.engine
        model = self.saver.model
        if engine is not None and not engine.is_closed:
            with suppress(OSError, ModelNotFoundError):
                save_report(report_path(model), report_of(engine, model))


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
