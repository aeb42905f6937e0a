"""`/model NAME` in a chat: gives the memory of one model back, and loads another one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from mixchat.base import interrupts
from mixchat.base.errors import MixchatError, ModelNotFoundError, UsageError
from mixchat.base.model_config import Context
from mixchat.cli.flags.checks import checked_model
from mixchat.cli.opening import find_or_build
from mixchat.cli.output.show_progress import status

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.base.options import LoadOptions
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn, Predict


class ModelChanger:
    """The `ChatModels` of a chat, with the flags of its run.

    `open_model` returns a session with a model, `hooks` its `after_turn` and `predict`.
    """

    place = "on this machine"

    def __init__(
        self,
        saver: ChatSaver,
        load: LoadOptions,
        open_model: Callable[[str], ChatSession],
        hooks: Callable[[str], tuple[AfterTurn, Predict]],
    ) -> None:
        self._saver, self._load = saver, load
        self._open, self._hooks = open_model, hooks

    def others(self) -> list[str]:
        from mixchat.weights.models import installed_directory, installed_names

        current = self._directory()
        return [name for name in installed_names() if installed_directory(name) != current]

    def check(self, name: str) -> None:
        from mixchat.text.checkpoint_text import CheckpointText
        from mixchat.weights.format.installed_model import InstalledModel

        if self._load.trace is not None:
            raise UsageError("the model cannot change: --trace records the routing of one model")
        directory = find_or_build(checked_model(name))
        if directory == self._directory():
            raise UsageError(f"this chat already has the model {name}")
        text = CheckpointText(directory)
        try:
            with status(f"checking {name}"), InstalledModel(directory) as installed:
                Context.of(installed.config, self._load.context_size)
                text.tokenizer()
        finally:
            text.close()

    def change(self, name: str) -> tuple[AfterTurn, Predict]:
        session, before = self._saver.session, self._saver.model
        save_report(session, before)
        session.engine.close()
        try:
            self._take(name)
        except (Exception, KeyboardInterrupt) as error:
            _free_frames(error)
            with interrupts.deferred():
                self._take_again(before, error)
            raise
        return self._hooks(name)

    def _take(self, name: str) -> None:
        opened = self._open(name)
        with interrupts.deferred():  # else the chat could be saved with the other model's name
            self._saver.session.take_model(opened)
            self._saver.model = name

    def _take_again(self, name: str, reason: BaseException) -> None:
        try:
            self._take(name)
        except Exception as error:
            hint = getattr(error, "hint", None)
            raise MixchatError(
                f"{reason}; nor can {name} be loaded again: {error}", hint=hint
            ) from None

    def _directory(self) -> Path | None:
        """Return the directory of the model that the chat has; None where it is gone."""
        from mixchat.weights.models import installed_directory

        with suppress(MixchatError):
            return installed_directory(self._saver.model)
        return None


def save_report(session: ChatSession, model: str) -> None:
    """Save what `mixchat stats` shows, unless a server answers, or the engine is closed: then it
    was saved before.

    A full disk, or a model that was removed meanwhile, is no reason to complain about an answer.
    """
    from mixchat.engine.report import report_of, report_path, save_report

    engine = session.backend.engine
    if engine is None or engine.is_closed:
        return
    with suppress(OSError, ModelNotFoundError):
        save_report(report_path(model), report_of(engine, model))


def _free_frames(error: BaseException | None) -> None:
    """Drop the variables of an error's frames, which hold what was loaded until then."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
