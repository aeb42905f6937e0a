"""Types keys into a chat, and looks at what it says."""

import io
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mixchat.base.errors import MixchatError, ModelNotFoundError
from mixchat.chat.saved.chat_saver import ChatSaver
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.chat.terminal.active_chat import ActiveChat
from mixchat.chat.terminal.commands import completions, run_command
from mixchat.chat.terminal.prompt import ChatPrompt
from mixchat.chat.terminal.screen import Screen
from mixchat.face.reading_time import ReadingTime

CTRL_C, CTRL_D, CTRL_U = "\x03", "\x04", "\x15"


class NoCache(nullcontext):
    """No KV cache is saved."""

    def leave_chat(self): ...

    def enter_chat(self): ...

    @contextmanager
    def changing_model(self):
        yield


class OneModel:
    """There is no other model to change to."""

    place = "on this machine"

    def others(self, current):
        return []

    def check(self, name, current):
        raise ModelNotFoundError(f"there is no model {name!r}")


class OpenedChat:
    """An `OpenChat` whose model is loaded."""

    is_open, name, cache = True, "demo", NoCache()

    def __init__(self, saver, models, after_turn, errors):
        self.saver, self.store, self.models = saver, saver.store, models
        self.after_turn, self.reading_time = after_turn, ReadingTime()
        self.reporter = SimpleNamespace(error=errors.append)

    def wait(self): ...

    def change(self, name):
        self.after_turn, self.reading_time = self.models.change(name)


class Chat:
    """Types `keys` into a chat with `session`; afterwards: `text`, `errors`, `turns`."""

    def __init__(self, session, keys, after_turn=None, store=None, models=None, history=None):
        self.session, self.errors, self.turns = session, [], []
        with create_pipe_input() as source, create_app_session(source, DummyOutput()):
            source.send_text(keys)
            out = io.StringIO()
            self.saver = ChatSaver(
                session,
                store or ChatStore(Path("/nowhere")),
                "demo",
                autosave=store is not None,
                warn=self.errors.append,
            )
            models = models(self.saver) if models else OneModel()
            opened = OpenedChat(self.saver, models, after_turn or self.turns.append, self.errors)
            self.active = ActiveChat(opened, Screen(out), ExitStack())
            offered = completions(self.active)
            self.prompt = ChatPrompt(history, offered, self.active.status)
            self.active.run(self.prompt, run_command)
            self.text = out.getvalue()


def prompts_of(session):
    return ["".join(map(chr, ids)) for ids in session.engine.prompts]


def typed(session, *lines, store=None):
    """A chat in which these lines were typed."""
    return Chat(session, "".join(f"{line}\r" for line in lines) + CTRL_U + CTRL_D, store=store)


def error_of(chat):
    """The one error that was reported, which is one for a person."""
    (error,) = chat.errors
    assert isinstance(error, MixchatError)
    return str(error)
